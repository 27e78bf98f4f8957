"""A user's folder of lm-eval task files: what each defines, and where its data lies.

lm-eval looks for ``dataset_kwargs.data_files`` below the current directory. Here such paths are relative to the file
that names them, so that a folder of tasks works from anywhere.
"""

from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

import yaml
from compress.calibrate.errors import InputError

try:
    from yaml import CSafeLoader as _YamlLoader
except ImportError:  # PyYAML built without libyaml
    from yaml import SafeLoader as _YamlLoader  # type: ignore[assignment]


class _TaskLoader(_YamlLoader):
    """Safe YAML in which lm-eval's ``!function module.name`` stays a string."""


_TaskLoader.add_constructor("!function", lambda loader, node: node.value)


@dataclass(frozen=True)
class TaskFile:
    """One task or group, as its YAML file defines it.

    Attributes:
        name: the name by which it is asked for.
        path: the YAML file.
        children: for a group, the names of the tasks and groups in it that are defined elsewhere.
        tags: names of collections that the task belongs to.
        data_folder: the folder against which its relative data files are resolved.
        data_files: its local data files, absolute; patterns with ``*`` are kept as such.
    """

    name: str
    path: Path
    children: tuple[str, ...]
    tags: tuple[str, ...]
    data_folder: Path
    data_files: tuple[Path, ...]


def read_task_folder(folder: Path) -> dict[str, TaskFile]:
    """All tasks and groups that the ``*.yaml`` files below a folder define, by name.

    Raises:
        InputError: a file isn't valid YAML, an included file is missing, or a tag or an include isn't a text.
    """
    files = [read_task_file(path) for path in sorted(folder.rglob("*.yaml"))]
    return {file.name: file for file in reversed([file for file in files if file is not None])}


def read_task_file(path: Path) -> TaskFile | None:
    """What one YAML file defines; None for a template or a file that isn't about tasks.

    Raises:
        InputError: the file isn't valid YAML, or a file that it includes is missing.
    """
    config, data_folder = _read_merged(path.resolve(), ())
    is_group = "group" in config and "class" not in config
    name = config.get("group" if is_group else "task")
    if not isinstance(name, str):
        return None
    tags = _texts(config.get("tag"), "tag", path)
    return TaskFile(
        name=name,
        path=path,
        children=tuple(_children(config.get("task"))) if is_group else (),
        tags=tags,
        data_folder=data_folder,
        data_files=tuple(_local_data_files(absolute_data_files(config, data_folder))),
    )


def absolute_data_files(config: Any, folder: Path) -> Any:
    """A copy of a task's configuration whose ``dataset_kwargs.data_files`` are absolute; URLs are left as they are."""
    if isinstance(config, list):
        return [absolute_data_files(item, folder) for item in config]
    if not isinstance(config, dict):
        return config
    out = {key: absolute_data_files(value, folder) for key, value in config.items()}
    kwargs = out.get("dataset_kwargs")
    if isinstance(kwargs, dict) and "data_files" in kwargs:
        out["dataset_kwargs"] = {**kwargs, "data_files": _absolute(kwargs["data_files"], folder)}
    return out


def check_data_files(file: TaskFile) -> None:
    """See that a task's local data files exist and hold something.

    Raises:
        InputError: a data file is missing or empty.
    """
    for data in file.data_files:
        found = [data] if data.exists() else [Path(name) for name in glob(str(data), recursive=True)]  # noqa: PTH207
        if not found:
            raise InputError(
                "eval.tasks",
                file.name,
                f"its data file {data} does not exist",
                fix=f"data files are relative to the task file {file.path}",
            )
        for path in found:
            if _is_empty(path):
                raise InputError("eval.tasks", file.name, f"its data file {path} is empty")


def _is_empty(path: Path) -> bool:
    """Whether a data file holds no document; a damaged one is left to who reads it."""
    if path.stat().st_size > 4096:
        return False
    if path.suffix == ".parquet":
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile

        try:
            return bool(ParquetFile(path).metadata.num_rows == 0)
        except ArrowInvalid:
            return False
    content = path.read_bytes().strip()
    return content in (b"", b"[]", b"{}") or (path.suffix in (".csv", ".tsv") and b"\n" not in content)


def _read_merged(path: Path, parents: tuple[Path, ...]) -> tuple[dict[str, Any], Path]:
    """A file's configuration over those that it includes, and the folder of the one that gives ``dataset_kwargs``."""
    if path in parents:
        raise InputError("eval.task_path", path, "the file includes itself")
    try:
        with path.open("rb") as stream:
            own = yaml.load(stream, Loader=_TaskLoader)
    except yaml.YAMLError as error:
        raise InputError("eval.task_path", path, f"not valid YAML ({' '.join(str(error).split())})") from error
    except OSError as error:
        raise InputError("eval.task_path", path, f"cannot be read ({error.strerror})") from error
    if not isinstance(own, dict):
        return {}, path.parent
    includes = _texts(own.pop("include", None), "include", path)
    merged: dict[str, Any] = {}
    data_folder = path.parent
    for include in includes:
        base, base_folder = _read_merged((path.parent / include).resolve(), (*parents, path))
        merged |= base
        if "dataset_kwargs" in base:
            data_folder = base_folder
    return merged | own, path.parent if "dataset_kwargs" in own else data_folder


def _texts(value: Any, key: str, path: Path) -> tuple[str, ...]:
    """A text, or a list of them."""
    texts = (value,) if isinstance(value, str) else value or ()
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise InputError("eval.task_path", path, f"its {key} is neither a text nor a list of texts, but {value!r}")
    return tuple(texts)


def _children(items: Any) -> list[str]:
    """Names that a group's ``task`` list refers to; tasks written out in the list itself are left out."""
    names: list[str] = []
    for item in items if isinstance(items, list) else []:
        if isinstance(item, str):
            names.append(item)
        elif isinstance(item, dict) and isinstance(item.get("task"), list):
            names += _children(item["task"])
        elif isinstance(item, dict) and "dataset_path" not in item:
            names.append(str(item.get("group") or item.get("task")))
    return names


def _absolute(data_files: Any, folder: Path) -> Any:
    if isinstance(data_files, dict):
        return {split: _absolute(files, folder) for split, files in data_files.items()}
    if isinstance(data_files, list):
        return [_absolute(files, folder) for files in data_files]
    if not isinstance(data_files, str) or "://" in data_files:
        return data_files
    return str((folder / data_files).resolve())


def _local_data_files(config: Any) -> list[Path]:
    """The local data files of a configuration whose paths are absolute."""
    if isinstance(config, list):
        return [path for item in config for path in _local_data_files(item)]
    if not isinstance(config, dict):
        return []
    found = [path for value in config.values() for path in _local_data_files(value)]
    kwargs = config.get("dataset_kwargs")
    if isinstance(kwargs, dict) and "data_files" in kwargs:
        found += [Path(name) for name in _flat(kwargs["data_files"]) if "://" not in name]
    return found


def _flat(data_files: Any) -> list[str]:
    if isinstance(data_files, dict):
        return [name for files in data_files.values() for name in _flat(files)]
    if isinstance(data_files, list):
        return [name for files in data_files for name in _flat(files)]
    return [str(data_files)]
