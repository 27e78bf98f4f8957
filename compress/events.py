"""What a run tells while it works: small records, handed to the ``on_event`` function of :func:`compress.run`.

The pipeline doesn't know who listens: the command line draws a progress bar, a notebook or a server may do otherwise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Level = Literal["info", "warning"]


@dataclass(frozen=True)
class StageStarted:
    """A stage begins; ``total`` is its number of layers, or of what ``unit`` says; 0 when it isn't counted."""

    name: str
    total: int = 0
    unit: str = "layers"


@dataclass(frozen=True)
class LayerStarted:
    """A decoder layer is taken in hand; ``index`` counts from 0."""

    index: int
    total: int


@dataclass(frozen=True)
class ModuleDone:
    """One linear module is quantized.

    Attributes:
        name: as in the checkpoint, without ``.weight``.
        bits: width of a code.
        group_size: columns a scale; -1 is a whole output channel.
        relative_error: ``||(W - W_hat) X||^2 / ||W X||^2``; None or NaN when there was no calibration input.
        damp: damping of the Hessian that was used; None or NaN when none was needed.
        seconds: time spent on this module.
        note: what is remarkable about it, empty if nothing.
        degraded: it was rounded to nearest although GPTQ was asked for.
    """

    name: str
    bits: int
    group_size: int
    relative_error: float | None
    damp: float | None
    seconds: float
    note: str = ""
    degraded: bool = False


@dataclass(frozen=True)
class LayerDone:
    """A decoder layer is finished and, in a resumable stage, safely on disk; ``index`` counts from 0."""

    index: int
    total: int
    seconds: float


@dataclass(frozen=True)
class StepDone:
    """A step of a stage that doesn't go layer by layer; ``index`` counts from 0, ``told`` is what came of it."""

    index: int
    total: int
    seconds: float
    told: str


@dataclass(frozen=True)
class Message:
    """One line for the user."""

    text: str
    level: Level = "info"


@dataclass(frozen=True)
class StageDone:
    """A stage is finished."""

    name: str
    seconds: float


Event = StageStarted | LayerStarted | ModuleDone | LayerDone | StepDone | Message | StageDone


class Every:
    """Tells the progress of writing text, every so many per cent."""

    def __init__(self, percent: int, emit: Callable[[Event], None]) -> None:
        self.step, self.told, self.emit = percent, 0, emit

    def __call__(self, done: int, wanted: int) -> None:
        """So many tokens of those wanted are there."""
        percent = done * 100 // wanted
        if percent >= self.told + self.step:
            self.told = percent - percent % self.step
            self.emit(Message(f"calibration text: {done:,} of {wanted:,} tokens written"))
