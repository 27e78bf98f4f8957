"""The folder of an unfinished run, ``OUT.partial``: work in files, and what is true about it in ``state.json``.

Files are written beside their place and renamed; the state names them only after that. So a kill at any moment leaves a
state that is true, and the same command goes on from it. The state begins with the run's fingerprint: model files,
recipe, calibration tokens, versions. A run with another fingerprint refuses to continue and says what differs.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from compress.calibrate.errors import InputError

STATE = "state.json"
LOCK = ".lock"
SUFFIX = ".partial"


def partial_folder(out: Path) -> Path:
    """Where a run that will end in ``out`` keeps its work."""
    return out.with_name(out.name + SUFFIX)


def refuse_other_run(out: Path, fingerprint: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state of the run begun for ``out``, or None if there is none.

    Args:
        out: where the artifact will stand.
        fingerprint: of this run; keys that it lacks are not compared.

    Raises:
        InputError: the run begun there is another one, or its state can't be read.
    """
    file = partial_folder(out) / STATE
    if not file.exists():
        return None
    try:
        kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        changes = changed(kept["fingerprint"], fingerprint)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError("--resume", file, "can't be read", fix="start over with --fresh") from error
    if changes:
        raise InputError(
            "--resume",
            partial_folder(out),
            f"the run begun there was another one: {'; '.join(changes)}",
            fix="start over with --fresh, or choose another --out",
        )
    return kept


class WorkFolder:
    """The work of one run; use it as a context manager, which keeps other runs out.

    Args:
        out: where the artifact will stand.
        fingerprint: what the result depends on, as nested mappings of JSON types.
        resume: go on with what is there; False throws it away.
        began: when this process began with the run, by ``time.perf_counter``; by default now.

    Raises:
        InputError: on entering, when another run is in the folder, or the work there belongs to another fingerprint.
    """

    def __init__(self, out: Path, fingerprint: Mapping[str, Any], resume: bool, began: float | None = None) -> None:
        self.out = out
        self.path = partial_folder(out)
        self.artifact = self.path / "artifact"
        self.state: dict[str, Any] = {"fingerprint": json.loads(json.dumps(fingerprint)), "stages": {}}
        self._resume = resume
        self._began = time.perf_counter() if began is None else began
        self._earlier = 0.0
        self._lock = FileLock(str(self.path / LOCK))

    def __enter__(self) -> "WorkFolder":
        if self.path.exists() and not self.path.is_dir():
            raise InputError("--out", self.out, f"{self.path} is in the way", fix="choose another folder")
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise InputError(
                "--out", self.out, "another run is writing there", fix="wait for it or choose another folder"
            ) from error
        try:
            self._open()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def _open(self) -> None:
        ours = (self.path / STATE).exists()
        found = [path for path in self.path.iterdir() if path.name != LOCK and path.suffix != ".part"]
        if found and not ours:
            fix = "remove it, or choose another --out"
            raise InputError("--out", self.out, f"{self.path} isn't the work of a run", fix=fix)
        if self.out.exists() and any(self.out.iterdir()):
            raise InputError("--out", self.out, "was written meanwhile", fix="give the same command again")
        if not self._resume:
            for path in found:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        kept = refuse_other_run(self.out, self.state["fingerprint"])
        if kept is None:
            self.save()
        else:
            self.state = kept
            self._earlier = float(kept.get("seconds", 0.0))

    def seconds(self) -> float:
        """Time that was spent on the run: by earlier processes until they last saved, and by this one."""
        return self._earlier + time.perf_counter() - self._began

    def stage(self, name: str) -> dict[str, Any]:
        """The state of one stage, to be changed in place and then saved."""
        section: dict[str, Any] = self.state["stages"].setdefault(name, {})
        return section

    def save(self) -> None:
        """Write the state, atomically."""
        self.state["seconds"] = round(self.seconds(), 3)
        write_text(self.path / STATE, json.dumps(self.state, indent=1))

    def save_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> Path:
        """Write a safetensors file, atomically.

        Raises:
            OSError: it can't be written, with the system's error number, which safetensors only mentions.
        """
        return write_tensors(self.path / name, tensors)

    def publish(self) -> None:
        """Move the finished artifact to its place and remove the work."""
        self.artifact.replace(self.out)
        sweep(self.out)


def sweep(out: Path) -> None:
    """Remove the work of a run whose artifact is in its place."""
    if (partial_folder(out) / STATE).exists():
        shutil.rmtree(partial_folder(out))


def write_tensors(target: Path, tensors: Mapping[str, Tensor]) -> Path:
    """Write a safetensors file so that it is there whole or not at all.

    Raises:
        OSError: as :meth:`WorkFolder.save_tensors`.
    """
    part = target.with_name(target.name + ".part")
    try:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, part, metadata={"format": "pt"})
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), str(error), str(part)) from error
    _settle(part, target)
    return target


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it is there whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    _settle(part, path)


def _settle(part: Path, target: Path) -> None:
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    part.replace(target)


def changed(kept: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> list[str]:
    """What differs between a kept fingerprint and a run's, as :func:`differences`; keys that the run lacks don't count.

    Args:
        kept: read from JSON.
        fingerprint: of the run.
    """
    old = {key: value for key, value in kept.items() if key in fingerprint}
    return differences(old, json.loads(json.dumps(fingerprint)))


def differences(old: Any, new: Any, place: str = "") -> list[str]:
    """What differs between two nested mappings, as ``key: old, now new``, at most five entries."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found = []
        for key in [*old, *(key for key in new if key not in old)]:
            found += differences(old.get(key), new.get(key), f"{place}.{key}" if place else str(key))
        return found if len(found) <= 5 else [*found[:4], f"and {len(found) - 4} more"]
    return [] if old == new else [f"{place} was {_short(old)}, now {_short(new)}"]


def _short(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 40 else text[:12] + "…"
