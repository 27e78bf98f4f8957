"""How far a training is in its budget of steps, tokens, passes and time, and what follows: stage and learning rate."""

import math
from dataclasses import dataclass

from compress.share.distill_settings import Distillation, most_steps, steps_of

RISE = 0.05  # part of a stage in which the learning rate rises
LAST_RATE = 0.05  # of the full rate, at the end of the cosine


@dataclass(frozen=True)
class Budget:
    """Of a distillation with so many windows, held-out ones among them."""

    settings: Distillation
    windows: int

    @property
    def steps(self) -> int | None:
        """Steps that will be made, None where time decides."""
        limit = steps_of(self.settings)
        return limit if self.settings.minutes is None else None

    def reached(self, step: int, seconds: float) -> float:
        """Part of the budget that is spent, 1 or more at its end.

        Args:
            step: steps made.
            seconds: spent.
        """
        limit = steps_of(self.settings)
        parts = [step / most_steps(self.settings, self.windows)]
        if limit is not None:
            parts.append(step / limit)
        if self.settings.minutes is not None:
            parts.append(seconds / (60 * self.settings.minutes))
        return max(parts)

    def stage(self, reached: float) -> int:
        """1 or 2."""
        return 2 if reached >= 1 - self.settings.next_share else 1

    def rate(self, step: int, seconds: float) -> float:
        """Learning rate of the step behind ``step`` others: a short rise, then half a cosine, in each stage."""
        reached = self.reached(step, seconds)
        border = 1 - self.settings.next_share
        begin, part = (0.0, border) if self.stage(reached) == 1 else (border, self.settings.next_share)
        ahead = self.reached(step + 1, seconds * (step + 1) / step if step else 0.0)
        rise = min(1.0, (ahead - begin) / part / RISE)
        cosine = 0.5 * (1 + math.cos(math.pi * min((reached - begin) / part, 1.0)))
        return self.settings.lr * rise * (LAST_RATE + (1 - LAST_RATE) * cosine)

    def passed(self, share: float, before: float, after: float) -> bool:
        """Whether a multiple of ``share``, the end of a stage or that of the budget lies between two points."""
        multiples = int(before / share + 1e-9), int(after / share + 1e-9)
        return after >= 1 or self.stage(before) != self.stage(after) or multiples[0] < multiples[1]
