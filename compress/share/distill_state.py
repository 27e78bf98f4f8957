"""What a distillation keeps on disk: all that the next step depends on, every few steps, and the best weights so far.

Files are written beside their place and renamed, and named by ``distill.json`` only after that; so a kill at any moment
costs the steps since, and nothing else.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file
from torch import Tensor, nn

from compress.calibrate.errors import InputError
from compress.work import changed, write_tensors, write_text

STATE = "distill.json"
LOCK = ".lock"
KINDS = ("last", "best")
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, as PyTorch calls them
PARTS = ("loss", "hidden", "soft", "hard", "next")


@dataclass
class Progress:
    """How far a distillation is.

    Attributes:
        step: steps made.
        seconds: spent learning, checks included, by this process and those before it.
        stage: 1 or 2.
        sums: of the losses since the last check, by name, and how many steps they are of.
        history: of the checks.
        best: of the stage: ``step``, ``value``; None before its first check.
        ended: why it is over; None while it isn't.
    """

    step: int = 0
    seconds: float = 0.0
    stage: int = 1
    sums: dict[str, float] = field(default_factory=lambda: {**dict.fromkeys(PARTS, 0.0), "steps": 0})
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, float] | None = None
    ended: str | None = None


class Kept:
    """The folder of a distillation.

    Args:
        folder: made if it isn't there.
        fingerprint: what the outcome depends on, of JSON types.
        writes: whether this process writes; of several on a machine one does.

    Raises:
        InputError: another distillation was begun there.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any], writes: bool = True) -> None:
        self.folder, self.writes = folder, writes
        self.fingerprint: dict[str, Any] = json.loads(json.dumps(fingerprint))
        self.progress = Progress()
        self._files: dict[str, str] = {}
        if (folder / STATE).exists():
            self._read()

    def _read(self) -> None:
        kept = json.loads((self.folder / STATE).read_text(encoding="utf-8"))
        if changes := changed(kept["fingerprint"], self.fingerprint):
            raise InputError(
                "--resume",
                self.folder,
                f"the distillation begun there was another one: {'; '.join(changes)}",
                fix="start over with --fresh, or remove that folder",
            )
        self.progress, self._files = Progress(**kept["progress"]), kept["files"]

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other runs out of the folder, as long as this one is in it.

        Raises:
            InputError: another run is.
        """
        if not self.writes:
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(str(self.folder / LOCK))
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            fix = "wait for it, or end the processes that an earlier run left behind"
            raise InputError("--resume", self.folder, "another run trains there", fix=fix) from error
        try:
            yield
        finally:
            lock.release()

    def restore(self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """Put weights and AdamW's moments where they were; nothing if there are none yet."""
        if "last" not in self._files:
            return
        tensors = load_file(self.folder / self._files["last"])
        self._assign(parameters, tensors)
        for name, parameter in parameters.items() if "steps" in tensors else ():
            state: dict[str, Any] = {key: tensors[f"{key}/{name}"].to(parameter.device) for key in MOMENTS}
            optimizer.state[parameter] = {"step": tensors["steps"].clone(), **state}

    def restore_best(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Put the best weights in place."""
        self._assign(parameters, load_file(self.folder / self._files["best"]))

    @torch.no_grad()
    def _assign(self, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])

    def save_best(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Write weights that are the best so far; the next :meth:`save` makes it known."""
        self._write("best", {name: parameter.detach() for name, parameter in parameters.items()})

    def save(self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer | None) -> None:
        """Write all that the next step depends on; without an optimizer there is no next one."""
        if optimizer is not None:
            tensors = {name: parameter.detach() for name, parameter in parameters.items()}
            if optimizer.state:
                tensors["steps"] = next(iter(optimizer.state.values()))["step"]  # of AdamW, which stages begin anew
                for key in MOMENTS:
                    tensors |= {f"{key}/{name}": optimizer.state[p][key] for name, p in parameters.items()}
            self._write("last", tensors)
        else:
            self._files.pop("last", None)
        if not self.writes:
            return
        state = {"fingerprint": self.fingerprint, "progress": asdict(self.progress), "files": self._files}
        write_text(self.folder / STATE, json.dumps(state, indent=1))
        for kind in KINDS:
            for path in self.folder.glob(f"{kind}-*"):
                if path.name not in self._files.values():
                    path.unlink()

    def _write(self, kind: str, tensors: Mapping[str, Tensor]) -> None:
        name = f"{kind}-{self.progress.stage}-{self.progress.step:07d}.safetensors"
        if self.writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_tensors(self.folder / name, {key: tensor.cpu() for key, tensor in tensors.items()})
        self._files[kind] = name


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of tensors and their names."""
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def ended(folder: Path) -> bool:
    """Whether the distillation of a folder is over."""
    file = folder / STATE
    return file.exists() and json.loads(file.read_text(encoding="utf-8"))["progress"]["ended"] is not None
