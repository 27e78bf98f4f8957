"""The trainer of the distillation: on accelerate, in one process or under torchrun, resumable, within a budget.

A step learns from ``batch`` windows, which all processes divide among them, so that their number changes the speed and
not the result. Which windows those are follows from the step alone. From time to time held-out windows are judged: by
their divergence from the teacher in the first stage, by their perplexity in the second. The best weights by that are
what remains; the first stage begins with the student as it was given, the second with the best weights of the first.
"""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor
from transformers import PreTrainedModel

from compress.calibrate.selfgen import fast_dtype
from compress.events import Event, Message, StageDone, StageStarted, StepDone
from compress.plan import Share
from compress.share.distill import Pair, Terms
from compress.share.distill_settings import Distillation, check, check_processes, held_out
from compress.share.distill_state import PARTS, Kept, Progress, digest
from compress.share.trainer_budget import Budget
from compress.share.trainer_parts import consumers, first_layer, learning, trained_parameters

BETAS = (0.9, 0.95)
PERCENT = 100
FINISHED = "the budget is spent"
WITHOUT_EFFECT = ("processes", "keep_steps", "keep_minutes")  # settings that don't change the outcome


@dataclass(frozen=True)
class Task:
    """What is to be distilled.

    Attributes:
        student: shares attention, in float32.
        teacher: the dense model, on the same device.
        shares: of the student's layers.
        ids: token windows [windows, T]; the last ones are held out.
        seed: of the windows' order.
    """

    student: PreTrainedModel
    teacher: PreTrainedModel
    shares: Mapping[int, Share]
    ids: Tensor
    seed: int = 0


@dataclass(frozen=True)
class Trained:
    """The outcome.

    Attributes:
        report: the report's section.
        parameters: what was learnt by name, the best of it; the student has it too.
    """

    report: dict[str, Any]
    parameters: Mapping[str, Tensor]


def train(task: Task, settings: Distillation, folder: Path, tell: Callable[[Event], None]) -> Trained:
    """Distil, or go on with it where the same call was interrupted; the student has the best weights afterwards.

    Args:
        task: models and text.
        settings: losses, budget, optimiser.
        folder: of this distillation's own, where it keeps its work until the caller removes it.
        tell: told what happens, in the main process.

    Raises:
        InputError: too small a text, or the folder belongs to another distillation.
        ValueError: no layer takes its attention from another.
    """
    if not consumers(task.shares):
        raise ValueError("no layer takes its attention from another, so there is nothing to distil")
    check(settings, len(task.ids))
    run = _Run(task, settings, folder, tell)
    with run.kept.alone(), learning(task.student, run.parameters.values()):
        if run.progress.ended is None:
            run.learn()
        return run.outcome()


class _Run:
    """One distillation, as one of its processes sees it."""

    def __init__(self, task: Task, settings: Distillation, folder: Path, tell: Callable[[Event], None]) -> None:
        self.task, self.settings, self.budget = task, settings, Budget(settings, len(task.ids))
        self.device = task.student.device
        quiet = DistributedDataParallelKwargs(broadcast_buffers=False)
        self.accelerator = Accelerator(cpu=self.device.type == "cpu", mixed_precision="no", kwargs_handlers=[quiet])
        self.rank, self.processes = self.accelerator.process_index, self.accelerator.num_processes
        check_processes(settings, self.processes)
        self.tell = tell if self.accelerator.is_main_process else _silence
        self.parameters = trained_parameters(task.student, task.shares, settings.trained)
        held = held_out(len(task.ids))
        self.training, self.held = task.ids[:-held], task.ids[-held:]
        self.dtype = fast_dtype(self.device) if settings.dtype == "auto" else getattr(torch, settings.dtype)
        self.kept = Kept(folder, self._fingerprint(), self.accelerator.is_main_process)
        self.accelerator.wait_for_everyone()  # until all have read what the main process is going to change

    @property
    def progress(self) -> Progress:
        """How far it is."""
        return self.kept.progress

    def learn(self) -> None:
        """All steps that are left."""
        began = time.perf_counter()
        total = self.budget.steps
        self.tell(StageStarted("distillation", *((total, "steps") if total else (PERCENT, "percent"))))
        task = self.task
        first = first_layer(task.shares, self.settings.trained)
        self.pair = Pair(task.student, task.teacher, first, consumers(task.shares), self.dtype)
        self.model = self.accelerator.prepare(self.pair, device_placement=[False])
        self.optimizer = self._fresh_optimizer()
        self.kept.restore(self.parameters, self.optimizer)
        self.clock = time.perf_counter() - self.progress.seconds
        self.saved = (self.progress.step, self.progress.seconds)
        while self.progress.ended is None:
            reached = self.budget.reached(self.progress.step, self.progress.seconds)
            if reached >= 1:
                self.progress.ended = FINISHED
                break
            self._enter(self.budget.stage(reached))
            if self.progress.ended is None:
                self._advance(reached)
        self.kept.save(self.parameters, None)
        self.tell(StageDone("distillation", time.perf_counter() - began))

    def outcome(self) -> Trained:
        """Put the best weights in place, and say how good they are."""
        self._restore_best()
        progress, found = self.progress, self.progress.history
        assert progress.best is not None
        best = [row for row in found if row["step"] == progress.best["step"]][-1]
        summary = (
            f"distillation: {progress.step} steps in {progress.seconds:.0f} s; held-out KL from the dense model"
            f" {found[0]['kl']:.4f} -> {best['kl']:.4f}, perplexity {found[0]['perplexity']:.3f} ->"
            f" {best['perplexity']:.3f}"
        )
        if best["step"] == 0:
            summary += "; it didn't help, so the weights stay as they were"
        elif best["step"] < progress.step:
            summary += f"; the weights of step {best['step']} are kept"
        if progress.ended != FINISHED:
            summary += f"; {progress.ended}"
            self.tell(Message(summary, "warning"))
        else:
            self.tell(Message(summary))
        report = {
            "summary": summary,
            "steps": progress.step,
            "tokens": progress.step * self.settings.batch * self.task.ids.shape[1],
            "seconds": round(progress.seconds, 1),
            "learnt_parameters": sum(parameter.numel() for parameter in self.parameters.values()),
            "windows": {"learnt": len(self.training), "held_out": len(self.held), "tokens": self.task.ids.shape[1]},
            "best": best,
            "ended": progress.ended,
            "settings": asdict(self.settings),
            "history": found,
        }
        return Trained(report, {name: parameter.detach() for name, parameter in self.parameters.items()})

    def _enter(self, stage: int) -> None:
        """Begin a stage, if it isn't the one in hand: at the best weights, and with a look at them."""
        if stage != self.progress.stage:
            self._restore_best()
            self.optimizer = self._fresh_optimizer()
            self.progress.stage, self.progress.best = stage, None
        if self.progress.best is None:
            self._check()
            self._save()

    def _advance(self, before: float) -> None:
        """One step, and what is due after it."""
        progress, began = self.progress, time.perf_counter()
        losses = self._step(self.budget.rate(progress.step, progress.seconds))
        progress.step += 1
        progress.seconds = self._agreed(time.perf_counter() - self.clock)
        if losses is None:
            progress.ended = f"the loss of step {progress.step} isn't finite, so training stopped there"
            return
        progress.sums = {name: progress.sums[name] + value for name, value in losses.items()}
        after = self.budget.reached(progress.step, progress.seconds)
        self._tell_step(after, losses["loss"], time.perf_counter() - began)
        if self.budget.passed(self.settings.check, before, after):
            self._check()
        step, seconds = self.saved
        long_ago = progress.seconds - seconds >= 60 * self.settings.keep_minutes
        if progress.ended is None and (progress.step - step >= self.settings.keep_steps or long_ago):
            self._save()

    def _step(self, rate: float) -> dict[str, float] | None:
        """Learn from one batch; the losses before it by name. Where they aren't finite None, and nothing is learnt."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        parts = self._windows(self.progress.step).split(self.settings.at_once)
        losses = torch.zeros(len(PARTS), device=self.device)
        for number, ids in enumerate(parts, 1):
            with nullcontext() if number == len(parts) else self.accelerator.no_sync(self.model):
                found = self.model(ids.to(self.device), self._terms())
                self.accelerator.backward(found[0] / len(parts))
            losses += found.detach() / len(parts)
        norm = self.accelerator.clip_grad_norm_(self.parameters.values(), self.settings.clip)
        losses = self.accelerator.reduce(losses, "mean")
        fine = bool(torch.isfinite(losses).all() and torch.isfinite(norm))
        if fine:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return {**dict(zip(PARTS, losses.tolist(), strict=True)), "steps": 1} if fine else None

    def _check(self) -> None:
        """Judge the held-out windows; keep the weights if they are the best of the stage, stop if far from it."""
        totals = torch.zeros(2, device=self.device)
        for ids in self.held[self.rank :: self.processes].split(self.settings.at_once):
            totals += len(ids) * self.pair.judge(ids.to(self.device))
        kl, lost = (self.accelerator.reduce(totals, "sum") / len(self.held)).tolist()
        progress = self.progress
        progress.seconds = self._agreed(time.perf_counter() - self.clock)
        perplexity = math.exp(lost) if lost < 700 else math.inf
        steps = progress.sums["steps"]
        means = {name: progress.sums[name] / steps for name in PARTS} if steps else {}
        progress.sums = dict.fromkeys(progress.sums, 0.0)
        row = {"stage": progress.stage, "step": progress.step, "seconds": round(progress.seconds, 1)}
        progress.history.append({**row, "kl": kl, "perplexity": perplexity, **means})
        told = f"KL {kl:.4f} from the dense model, perplexity {perplexity:.3f}"
        self.tell(Message(f"held-out text after step {progress.step}: {told}"))
        value, name = (kl, "divergence") if progress.stage == 1 else (perplexity, "perplexity")
        if progress.best is None or value < progress.best["value"]:
            progress.best = {"step": progress.step, "value": value}
            self.kept.save_best(self.parameters)
        elif not value <= self.settings.worst * progress.best["value"]:
            progress.ended = (
                f"the held-out {name} after step {progress.step} is {value:.4f}, more than"
                f" {self.settings.worst:g} times the best ({progress.best['value']:.4f}), so training stopped there"
            )

    def _restore_best(self) -> None:
        self.accelerator.wait_for_everyone()  # until the main process has written it
        self.kept.restore_best(self.parameters)

    def _save(self) -> None:
        self.kept.save(self.parameters, self.optimizer)
        self.saved = (self.progress.step, self.progress.seconds)

    def _terms(self) -> Terms:
        s = self.settings
        return Terms(s.hidden, s.soft, s.hard, 0.0, s.temperature) if self.progress.stage == 1 else Terms(next=1.0)

    def _windows(self, step: int) -> Tensor:
        """This process's windows of a step: every pass goes through all of them in an order of its own."""
        share = self.settings.batch // self.processes
        begin = step * self.settings.batch + self.rank * share
        chosen = []
        for position in range(begin, begin + share):
            turn, place = divmod(position, len(self.training))
            generator = torch.Generator().manual_seed(self.task.seed * 1000 + turn)
            chosen.append(int(torch.randperm(len(self.training), generator=generator)[place]))
        return self.training[chosen]

    def _fresh_optimizer(self) -> torch.optim.AdamW:
        matrices = [parameter for parameter in self.parameters.values() if parameter.ndim > 1]
        others = [parameter for parameter in self.parameters.values() if parameter.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": self.settings.decay}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=self.settings.lr, betas=BETAS)

    def _agreed(self, seconds: float) -> float:
        """A time that all processes go by."""
        time_spent = torch.tensor(seconds, device=self.device, dtype=torch.float32)
        return float(self.accelerator.reduce(time_spent, "mean"))

    def _tell_step(self, reached: float, loss: float, seconds: float) -> None:
        told, step = f"loss {loss:.4f}", self.progress.step
        if self.budget.steps is not None:
            self.tell(StepDone(step - 1, self.budget.steps, seconds, told))
        else:
            percent = min(PERCENT, math.ceil(reached * PERCENT))
            self.tell(StepDone(percent - 1, PERCENT, seconds, f"step {step}: {told}"))

    def _fingerprint(self) -> dict[str, Any]:
        return {
            "settings": {**asdict(self.settings), **dict.fromkeys(WITHOUT_EFFECT)},
            "shares": {str(layer): asdict(share) for layer, share in sorted(self.task.shares.items())},
            "windows": digest({"ids": self.task.ids}),
            "student": digest(self.parameters),
            "seed": self.task.seed,
        }


def _silence(event: Event) -> None:
    """For processes that tell nothing."""
