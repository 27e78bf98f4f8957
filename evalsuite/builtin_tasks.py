"""The names of lm-eval's built-in tasks, read without importing lm-eval.

lm-eval finds its tasks by parsing all 14,000 of its YAML files, which takes 10 to 20 seconds. Here only the top-level
keys that name a task are searched for, as plain text; the result is the same index in well under a second.
"""

import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path

_HEAD = re.compile(r"""^["']?(task|group|tag|include|class)["']?[ \t]*:(.*(?:\n[ \t]*-[ \t].*)*)""", re.MULTILINE)
_COMMENT = re.compile(r"(?:^|\s)#.*")


@dataclass(frozen=True)
class BuiltinTasks:
    """lm-eval's own tasks.

    Attributes:
        files: task or group name -> the YAML file that defines it.
        tags: tag -> names of the tasks that carry it.
    """

    files: dict[str, Path]
    tags: dict[str, frozenset[str]]

    def names(self) -> list[str]:
        """Everything that can be asked for: tasks, groups and tags."""
        return [*self.files, *self.tags]


def find_builtin_tasks() -> BuiltinTasks:
    """Search the installed lm-eval for its task files."""
    spec = importlib.util.find_spec("lm_eval")
    folders = spec.submodule_search_locations if spec is not None else None
    root = Path(next(iter(folders or []))) / "tasks"
    files: dict[str, Path] = {}
    tags: dict[str, set[str]] = {}
    heads: dict[str, dict[str, str]] = {}
    for file in _yaml_files(root):
        head = _head(file, heads)
        is_group = "group" in head and "class" not in head
        names = _values(head.get("group" if is_group else "task", ""))
        if not names or names[0] in files:
            continue
        files[names[0]] = Path(file)
        if not is_group:
            for tag in _values(head.get("tag", "")):
                tags.setdefault(tag, set()).add(names[0])
    return BuiltinTasks(files, {tag: frozenset(members) for tag, members in tags.items()})


def _yaml_files(root: Path) -> list[str]:
    # Strings, because pathlib would take longer than reading the 14,000 files.
    return sorted(
        os.path.join(folder, name)  # noqa: PTH118
        for folder, _, names in os.walk(root)
        for name in names
        if name.endswith(".yaml")
    )


def _head(file: str, seen: dict[str, dict[str, str]]) -> dict[str, str]:
    """The raw text of the keys that name a task, those of included templates among them; a file's own keys win."""
    if file in seen:
        return seen[file]
    try:
        with open(file, encoding="utf-8") as stream:  # noqa: PTH123
            head = dict(_HEAD.findall(stream.read()))
    except (FileNotFoundError, UnicodeDecodeError):
        head = {}
    seen[file] = head
    for include in _values(head.get("include", "")):
        template = os.path.normpath(os.path.join(os.path.dirname(file), include))  # noqa: PTH118, PTH120
        for key, value in _head(template, seen).items():
            head.setdefault(key, value)
    return head


def _values(text: str) -> list[str]:
    """The strings of a YAML scalar, flow list or block list."""
    out = []
    for line in text.split("\n"):
        item = line.strip().removeprefix("- ")
        if "#" in item:
            item = _COMMENT.sub("", item)
        parts = item.strip("[] ").split(",") if item.startswith("[") else [item]
        out += [value for part in parts if (value := part.strip(" \t\"'"))]
    return out
