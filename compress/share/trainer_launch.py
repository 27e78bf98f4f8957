"""A distillation in several processes: its folder holds what they need, torchrun starts them, events come back.

The same folder is the way to other machines: a run that was interrupted has left ``order.json`` there, and

    torchrun --nnodes 2 --nproc_per_node 8 ... -m compress.share.trainer_worker FOLDER

goes on with it wherever the model can be opened and the folder is shared. The interrupted command then takes what came
of it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file
from torch import Tensor

from compress import events
from compress.calibrate.errors import InputError
from compress.plan import Share
from compress.share.distill_settings import Distillation, check, check_processes
from compress.share.distill_state import ended
from compress.share.trainer import Task, Trained, train
from compress.work import write_tensors, write_text

ORDER, WINDOWS, START = "order.json", "windows.safetensors", "start.safetensors"


def distil(
    task: Task, settings: Distillation, folder: Path, tell: Callable[[events.Event], None], model: str
) -> Trained:
    """Distil in as many processes as the settings say; see :func:`compress.share.trainer.train`.

    Args:
        task: models and text.
        settings: of the distillation.
        folder: of its own.
        tell: told what happens.
        model: the dense model, as the other processes open it.

    Raises:
        InputError: as :func:`train`; or a process failed, whose own words are then on stderr.
    """
    check(settings, len(task.ids))
    check_processes(settings, settings.processes)
    if settings.processes > 1 and not ended(folder):
        write_order(task, settings, folder, model)
        _launch(settings.processes, folder, tell)
    return train(task, settings, folder, tell)


@dataclass(frozen=True)
class Order:
    """What a process reads of an order.

    Attributes:
        model: to be opened.
        shares: of the student's layers.
        settings: of the distillation.
        ids: windows [windows, T].
        start: the student's tensors by name.
        seed: of the windows' order.
    """

    model: str
    shares: dict[int, Share]
    settings: Distillation
    ids: Tensor
    start: dict[str, Tensor]
    seed: int


def write_order(task: Task, settings: Distillation, folder: Path, model: str) -> None:
    """Write what other processes need: not whole models, but the student's tensors that aren't the teacher's."""
    folder.mkdir(parents=True, exist_ok=True)
    dense = dict(task.teacher.named_parameters())
    own = {
        name: parameter.detach().cpu()
        for name, parameter in task.student.named_parameters()
        if name not in dense or not torch.equal(parameter, dense[name])
    }
    write_tensors(folder / START, own)
    write_tensors(folder / WINDOWS, {"ids": task.ids})
    shares = {str(layer): asdict(share) for layer, share in task.shares.items()}
    content = {"model": model, "shares": shares, "settings": asdict(settings), "seed": task.seed}
    write_text(folder / ORDER, json.dumps(content, indent=1))


def read_order(folder: Path) -> Order:
    """Read what :func:`write_order` wrote.

    Raises:
        InputError: there is no order.
    """
    if not (folder / ORDER).is_file():
        raise InputError("FOLDER", folder, f"there is no {ORDER} in it", fix="begin with compress run")
    kept: dict[str, Any] = json.loads((folder / ORDER).read_text(encoding="utf-8"))
    shares = {int(layer): TypeAdapter(Share).validate_python(share) for layer, share in kept["shares"].items()}
    ids, start = load_file(folder / WINDOWS)["ids"], load_file(folder / START)
    return Order(kept["model"], shares, Distillation(**kept["settings"]), ids, start, kept["seed"])


def encoded(event: events.Event) -> str:
    """An event as a line."""
    return json.dumps({"event": type(event).__name__, **asdict(event)})


def decoded(line: str) -> events.Event | None:
    """The inverse; None for a line that isn't an event, such as a library's warning."""
    try:
        kept = json.loads(line)
        kind = getattr(events, kept.pop("event"))
    except (ValueError, KeyError, AttributeError):
        return None
    event: events.Event = kind(**kept)
    return event


def _launch(processes: int, folder: Path, tell: Callable[[events.Event], None]) -> None:
    """Start processes and pass on what the first of them tells; they end with this one, if it is left in good order."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    threads = str(max(1, torch.get_num_threads() // processes))
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    worker = [*command, "-m", "compress.share.trainer_worker", "--events", str(folder)]
    with subprocess.Popen(worker, stdout=subprocess.PIPE, text=True, env=environment) as started:
        assert started.stdout is not None
        try:
            for line in started.stdout:
                event = decoded(line)
                if event is not None:
                    tell(event)
        except BaseException:
            started.terminate()
            raise
    if started.returncode:
        raise InputError(
            "share.distill_processes",
            processes,
            f"a process of the distillation failed with status {started.returncode}",
            fix="its own words are above; the same command goes on from what is kept",
        )
