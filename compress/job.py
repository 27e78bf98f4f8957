"""What a stage is, and what it gets to work with. Stages know the job, never each other."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from compress.calibrate.windows import CalibrationSet
from compress.events import Event
from compress.model import ModelFacts, ModelView
from compress.plan import AttentionPlan
from compress.recipe import Recipe
from compress.scheme import Scheme
from compress.work import WorkFolder

PROBE_TOKENS = 64  # of the reload check


@dataclass
class Job:
    """One run, as the stages see it.

    Attributes:
        view: the model, weights layer by layer.
        recipe: the resolved recipe.
        calibration: token windows, or None if the recipe has no calibration.
        folder: where work is kept until the artifact is whole.
        device: where layers run.
        emit: tells the user.
        report: what the run found, filled by stage name; becomes ``report.json``.
        result: what the export needs to know, filled by the stage that changes weights; None while they are the model's
            own.
        plan: what attention does at run time, written by the stages; None if nothing is asked of it.
        files: further files that belong in the artifact, under their own names.
    """

    view: ModelView
    recipe: Recipe
    calibration: CalibrationSet | None
    folder: WorkFolder
    device: torch.device
    emit: Callable[[Event], None]
    report: dict[str, Any] = field(default_factory=dict)
    result: "Result | None" = None
    plan: AttentionPlan | None = None
    files: list[Path] = field(default_factory=list)


@dataclass
class Result:
    """A model whose weights lie in files, ready to be exported.

    Attributes:
        parts: safetensors files in the order of the model.
        schemes: how every quantized module is stored.
        untied: the head is stored apart from an embedding that it was tied to.
        dtype: storage type of everything that isn't quantized.
        probe: token ids ``[T]`` of the reload check.
        logits: what the model in memory answers to them, ``[T, vocab]`` float32.
        carried: the artifact whose files these are, and are to be again, byte for byte; None for a model that is
            written from its parts.
    """

    parts: list[Path]
    schemes: dict[str, Scheme]
    untied: bool
    dtype: torch.dtype
    probe: torch.Tensor
    logits: torch.Tensor
    carried: Path | None = None


@dataclass(frozen=True)
class Estimate:
    """What a stage expects to need.

    Attributes:
        lines: what will happen and what was chosen automatically, one sentence each.
        flops: floating-point operations.
        scratch_bytes: disk space of the work folder beyond the artifact.
        memory_bytes: resident memory beyond what Python and its libraries take.
        artifact_bytes: size of the weights it leaves behind.
        facts: the same as values, for scripts.
    """

    lines: list[str]
    flops: float
    scratch_bytes: int
    memory_bytes: int
    artifact_bytes: int
    facts: dict[str, Any]


class Stage(Protocol):
    """One step of a recipe, named as its section."""

    name: str

    def preflight(self, facts: ModelFacts, recipe: Recipe) -> None:
        """Find from the config alone what can't work.

        Raises:
            InputError: the first problem found.
        """

    def estimate(self, facts: ModelFacts, recipe: Recipe) -> Estimate:
        """What will happen and what it will take, from the config alone."""

    def run(self, job: Job) -> None:
        """Do it; resumable from ``job.folder``, reporting to ``job.report``."""
