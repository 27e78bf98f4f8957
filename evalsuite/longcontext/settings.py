"""Which long-context questions are asked."""

from collections.abc import Sequence
from dataclasses import dataclass

from compress.calibrate.errors import InputError, did_you_mean
from compress.evalsuite.catalogue import LONG_CONTEXT

TASKS: tuple[str, ...] = LONG_CONTEXT


@dataclass(frozen=True)
class LongContextSettings:
    """A grid of prompts: every length with every depth.

    Attributes:
        lengths: tokens of a prompt together with the room for its answer.
        depths: places of the needle, evenly spread from the beginning (0) to the end (1); a single one is the middle.
        samples: questions for each length and depth.
        seed: of keys, values, and everything else that is drawn.
    """

    lengths: tuple[int, ...] = (2048, 4096)
    depths: int = 5
    samples: int = 1
    seed: int = 0

    def places(self) -> list[float]:
        """The depths as fractions of the haystack."""
        if self.depths == 1:
            return [0.5]
        return [index / (self.depths - 1) for index in range(self.depths)]


def check_long_context(tasks: Sequence[str], settings: LongContextSettings, context: int | None) -> None:
    """Find what can't work before a model is loaded.

    Args:
        tasks: names out of ``TASKS``.
        settings: the grid.
        context: positions that the model knows, or None if it doesn't say.

    Raises:
        InputError: an unknown task; no or a repeated length; a length beyond the context; no depth or sample.
    """
    for task in tasks:
        if task not in TASKS:
            raise InputError(
                "eval.tasks",
                task,
                "is not a long-context task",
                allowed=", ".join(TASKS),
                fix=did_you_mean(task, TASKS),
            )
    if not settings.lengths:
        raise InputError("eval.lengths", None, "names no length", fix="for instance 2048,4096")
    for place, length in enumerate(settings.lengths):
        if length in settings.lengths[:place]:
            raise InputError("eval.lengths", length, "is named twice")
        if length < 1:
            raise InputError("eval.lengths", length, "is not a number of tokens", allowed="1 or more")
        if context is not None and length > context:
            raise InputError(
                "eval.lengths", length, f"is beyond the model's context of {context} tokens", allowed=f"up to {context}"
            )
    for name, value in (("eval.depths", settings.depths), ("eval.samples", settings.samples)):
        if value < 1:
            raise InputError(name, value, "asks nothing", allowed="1 or more")
