"""Two models measured in turns: a ratio for every round, so that what slows the machine slows both."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles

MANY = 10  # rounds from which on a 10-90 % range says more than the extremes


@dataclass(frozen=True)
class Row:
    """One figure of two models.

    Attributes:
        metric: its name.
        unit: ``bytes``, ``s`` or ``tokens/s``.
        baseline: of the baseline, the median over rounds.
        model: of the model, the median over rounds.
        ratio: model / baseline; where rounds were timed, the median of the rounds' ratios.
        ratio_low: low end of the rounds' ratios (see ``spread``); the ratio itself where a figure is exact; None where
            it was measured once.
        ratio_high: high end.
        higher_is_better: which way is up.
    """

    metric: str
    unit: str
    baseline: float
    model: float
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None
    higher_is_better: bool


def exact_row(metric: str, baseline: int, model: int) -> Row:
    """Bytes that are the same however often they are counted."""
    ratio = model / baseline if baseline else None
    return Row(metric, "bytes", baseline, model, ratio, ratio, ratio, False)


def paired_row(
    metric: str, unit: str, baseline: Sequence[float], model: Sequence[float], higher_is_better: bool
) -> Row:
    """Figures of rounds, in the order of the rounds; a single round has no spread."""
    ratios = [after / before for before, after in zip(baseline, model, strict=True) if before]
    low, high = _ends(ratios) if len(ratios) > 1 else (None, None)
    before, after = (round(median(side)) if unit == "bytes" else median(side) for side in (baseline, model))
    return Row(metric, unit, before, after, median(ratios) if ratios else None, low, high, higher_is_better)


def spread_name(rounds: int) -> str:
    """What ``ratio_low`` and ``ratio_high`` are."""
    return "10-90 %" if rounds >= MANY else "min-max"


def _ends(ratios: list[float]) -> tuple[float, float]:
    if len(ratios) < MANY:
        return min(ratios), max(ratios)
    deciles = quantiles(ratios, n=10, method="inclusive")
    return deciles[0], deciles[-1]
