"""The part of the stage ``weights`` that tunes: windows, epochs, resuming, and whether what was learnt is kept.

Some windows are held out. What was learnt on the others is kept only if it lowers their divergence from the dense
model; on text that is too little or too far off it doesn't, and then the report says so and the solver's scales stay.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from compress.calibrate.workers import Workers
from compress.events import Message, StageDone, StageStarted, StepDone
from compress.job import Job
from compress.schema import Weights
from compress.weights.learned import Learned, rate_at
from compress.weights.tuning import Parts, Tuner

HELD_OUT = 16  # one window of so many, and at least one, is held out


@dataclass(frozen=True)
class Tuned:
    """The outcome.

    Attributes:
        parts: the files that belong in the artifact; those that were given, if what was learnt isn't kept.
        report: the report's section.
    """

    parts: Parts
    report: dict[str, Any]


def held_out_windows(windows: int) -> int:
    """How many windows aren't learnt from; none if there is only one."""
    return 0 if windows == 1 else max(1, windows // HELD_OUT)


def tune(job: Job, settings: Weights, parts: Parts, ids: Tensor, workers: Workers) -> Tuned:
    """Tune the finished layers, or go on with it.

    Args:
        job: the run; the stage's state keeps how far the tuning is.
        settings: the recipe's section.
        parts: the solved model.
        ids: calibration windows ``[windows, T]``.
        workers: threads.
    """
    run = _Tuning(job, settings, parts, ids, workers)
    if not run.finished:
        run.learn()
    return run.outcome()


class _Tuning:
    """One tuning pass; its state holds the finished steps, their KL, and the held-out KL ``before`` and ``after``."""

    def __init__(self, job: Job, settings: Weights, parts: Parts, ids: Tensor, workers: Workers) -> None:
        self.job, self.settings, self.parts, self.ids, self.workers = job, settings, parts, ids, workers
        self.folder = job.folder.path
        empty = {"step": 0, "kl": [], "seconds": 0.0, "before": None, "after": None, "finished": False}
        self.state: dict[str, Any] = job.folder.stage("weights").setdefault("tuning", empty)
        held = held_out_windows(len(ids))
        self.training, self.held = range(len(ids) - held), range(len(ids) - held, len(ids))

    @property
    def finished(self) -> bool:
        """Whether the tuned files are written."""
        return bool(self.state["finished"])

    def learn(self) -> None:
        """All steps that are left, each kept when it is done."""
        started, total = time.perf_counter(), self.settings.tune_epochs * self._per_epoch
        self.job.emit(StageStarted("tuning", total, "steps"))
        tuner = Tuner(
            self.job.view, self.parts, self.job.device, self.workers, self.folder, self.ids, self.settings.tune_batch
        )
        tuner.teach()
        learned = self._learned(tuner)
        if self.state["before"] is None and self.held:
            self.state["before"] = tuner.divergence(learned, self.held)
        for step in range(self.state["step"], total):
            begun = time.perf_counter()
            kl = tuner.step(learned, self._windows(step), rate_at(step, total, self.settings.tune_lr))
            self.state["kl"].append(kl)
            self.state["seconds"] += time.perf_counter() - begun
            self._keep(learned)
            self.job.emit(StepDone(step, total, time.perf_counter() - begun, f"KL {kl:.4f}"))
        self._write(tuner, learned)
        tuner.close()
        self.job.emit(Message(self._told()))
        self.job.emit(StageDone("tuning", time.perf_counter() - started))

    def _learned(self, tuner: Tuner) -> Learned:
        step = self.state["step"]
        return Learned.load(self._file(step), step) if step else Learned.zeros(tuner.shapes())

    def _windows(self, step: int) -> list[int]:
        """The windows of a step: every epoch goes through all of them in an order of its own."""
        epoch, place = divmod(step, self._per_epoch)
        generator = torch.Generator().manual_seed(self.job.report["seed"] * 1000 + epoch)
        order = torch.randperm(len(self.training), generator=generator).tolist()
        return order[place * self.settings.tune_batch : (place + 1) * self.settings.tune_batch]

    def _keep(self, learned: Learned) -> None:
        self.job.folder.save_tensors(self._file(learned.steps).name, learned.tensors())
        before, self.state["step"] = self.state["step"], learned.steps
        self.job.folder.save()
        self._file(before).unlink(missing_ok=True)

    def _file(self, step: int) -> Path:
        return self.folder / f"learned-{step:06d}.safetensors"

    def _write(self, tuner: Tuner, learned: Learned) -> None:
        for index, path in enumerate(self.parts.layers):
            self.job.folder.save_tensors(_tuned(path).name, tuner.tuned(index, learned))
        (name, norm), *_ = load_file(self.parts.norm).items()
        self.job.folder.save_tensors(_tuned(self.parts.norm).name, {name: learned.apply(name, norm)})
        if self.held:  # with what the files hold, rounded to their types
            tuner.use(self._tuned_parts)
            self.state["after"] = tuner.divergence(Learned.nothing(), self.held)
        self.state["finished"] = True
        self.job.folder.save()

    @property
    def _per_epoch(self) -> int:
        """Steps an epoch."""
        return -(-len(self.training) // self.settings.tune_batch)

    @property
    def _tuned_parts(self) -> Parts:
        layers = [_tuned(path) for path in self.parts.layers]
        return replace(self.parts, layers=layers, norm=_tuned(self.parts.norm))

    @property
    def _kept(self) -> bool:
        before, after = self.state["before"], self.state["after"]
        return before is None or after < before

    def _told(self) -> str:
        before, after = self.state["before"], self.state["after"]
        if before is None:
            return "tuned; there was no second window to hold out, so the gain isn't known"
        told = f"KL from the dense model on held-out text {before:.4f} -> {after:.4f}"
        return f"{told}: kept" if self._kept else f"{told}: it didn't fall, so the solver's scales stay"

    def outcome(self) -> Tuned:
        """The files to use, and what the report says."""
        kl, size = self.state["kl"], self._per_epoch
        epochs = [sum(kl[i : i + size]) / size for i in range(0, len(kl), size)]
        report = {
            "epochs": self.settings.tune_epochs,
            "learning_rate": self.settings.tune_lr,
            "steps": len(kl),
            "kl_by_epoch": [round(value, 6) for value in epochs],
            "held_out": None
            if self.state["before"] is None
            else {"windows": len(self.held), "kl_before": self.state["before"], "kl_after": self.state["after"]},
            "kept": self._kept,
            "seconds": round(self.state["seconds"], 1),
        }
        return Tuned(self._tuned_parts if self._kept else self.parts, report)


def _tuned(path: Path) -> Path:
    return path.with_name(f"tuned-{path.name}")
