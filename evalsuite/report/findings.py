"""What one row of ``report.json``'s table says: direction, change, and whether chance explains it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compress.evalsuite.report import glossary
from compress.evalsuite.report.blocks import Tone
from compress.evalsuite.report.wording import (
    CLEAR,
    MISSING,
    change,
    dig,
    is_number,
    number,
    p_value,
    percent,
    times,
)

_NO_SHARE = ("mcc", "bleu", "ter", "chrf")
_TWO_SIDED = 1.96  # standard errors of a 95 % interval, where the number of items isn't known


@dataclass(frozen=True)
class Finding:
    """One metric before and after.

    Attributes:
        task: its name in the report.
        metric: the same.
        before: the original's figure, None if it wasn't finite.
        after: the compressed model's.
        before_stderr: its standard error, if known.
        after_stderr: the same.
        higher_is_better: which way is up, if known.
        n: items that were answered, if known.
        paired: the report's paired test, if there is one.
    """

    task: str
    metric: str
    before: float | None
    after: float | None
    before_stderr: float | None
    after_stderr: float | None
    higher_is_better: bool | None
    n: int | None
    paired: Mapping[str, Any] | None

    @property
    def share(self) -> bool:
        """Whether the figures are shares, to be shown as per cent."""
        values = (self.before, self.after)
        within = all(value is not None and 0 <= value <= 1 for value in values)
        return within and bool(self.higher_is_better) and self.metric.split(",")[0] not in _NO_SHARE

    @property
    def gain(self) -> float | None:
        """Relative change with the sign turned so that a plus is an improvement; None where that can't be said."""
        if self.before is None or self.after is None or not self.before or self.higher_is_better is None:
            return None
        relative = (self.after - self.before) / abs(self.before)
        return relative if self.higher_is_better else -relative

    @property
    def p(self) -> float | None:
        """The p-value of the paired test."""
        value = dig(self.paired, "p_value")
        return float(value) if is_number(value) else None

    @property
    def tone(self) -> Tone:
        """Good or bad where the difference is clear: by the paired test, or without one by its 95 % interval."""
        gain, ends = self.gain, self.gain_range()
        if gain is None or gain == 0:
            return ""
        clear = self.p < CLEAR if self.p is not None else ends is not None and not ends[0] <= 0 <= ends[1]
        return ("good" if gain > 0 else "bad") if clear else ""

    def title(self) -> str:
        """The task by its usual name."""
        return glossary.task(self.task).title

    def metric_words(self) -> str:
        """The metric in words, with an arrow for the direction that is better."""
        arrow = {True: " ↑", False: " ↓", None: ""}[self.higher_is_better]
        return glossary.metric(self.metric) + arrow

    def figure(self, value: float | None, stderr: float | None) -> str:
        """A figure of this metric with its standard error."""
        if not is_number(value):
            return "not finite"
        if self.share:
            error = f" ± {number(100 * stderr, 1)}" if is_number(stderr) and stderr is not None else ""
            return f"{percent(value).removesuffix(' %')}{error} %"
        digits = 3 if abs(value or 0.0) < 10 else 2
        error = f" ± {number(stderr, digits)}" if is_number(stderr) else ""
        return number(value, digits) + error

    def change(self) -> str:
        """The change in the metric's own terms: points for shares, per cent for anything else."""
        if self.before is None or self.after is None:
            return MISSING
        if self.share:
            return change(100 * (self.after - self.before), 1, "points")
        if not self.before:
            return change(self.after, 3, "")
        ratio = self.after / self.before
        return times(ratio) if ratio >= 2 else change(100 * (ratio - 1), 1)

    def verdict(self) -> str:
        """What the change amounts to, in words, with the p-value of the paired test."""
        gain = self.gain
        if self.after is None:
            return "Broken: the compressed model's figure isn't finite"
        if self.before is None or (gain is None and self.before != self.after):
            return "Changed; nobody says which way is better"
        if self.after == self.before:
            return "Unchanged"
        better = "Better" if (gain or 0) > 0 else "Worse"
        if self.p is None:
            return f"{better}; not tested against chance"
        if self.p >= CLEAR:
            return f"No clear difference; chance alone would explain it ({p_value(self.p)})"
        return f"{better}; chance hardly explains it ({p_value(self.p)})"

    def gain_range(self) -> tuple[float, float] | None:
        """The 95 % interval of ``gain``: from the paired test where it fits, else from both standard errors."""
        gain = self.gain
        if gain is None or self.before is None or self.after is None:
            return None
        sign = 1.0 if self.higher_is_better else -1.0
        difference, stderr = dig(self.paired, "difference"), dig(self.paired, "stderr")
        if is_number(difference) and is_number(stderr):
            wide = _standard_errors(dig(self.paired, "n")) * stderr
            if math.isclose(difference, self.after - self.before, rel_tol=0.01, abs_tol=1e-6):
                return _ordered(gain - wide / abs(self.before), gain + wide / abs(self.before))
            if abs(difference) < 50 and math.isclose(math.exp(difference), self.after / self.before, rel_tol=0.01):
                # perplexity is tested by its logarithm
                return _ordered(*(sign * (math.exp(end) - 1) for end in (difference - wide, difference + wide)))
        if self.before_stderr is None or self.after_stderr is None:
            return None
        wide = _TWO_SIDED * math.hypot(self.before_stderr, self.after_stderr) / abs(self.before)
        return gain - wide, gain + wide


def _standard_errors(items: Any) -> float:
    """Of a 95 % interval around a mean over so many items, by Student's t as in the paired test."""
    if not is_number(items) or items < 2:
        return _TWO_SIDED
    from scipy.special import stdtrit  # half a second, which a report without scores shouldn't wait

    return float(stdtrit(items - 1, 0.975))


def findings(report: Mapping[str, Any]) -> list[Finding]:
    """The rows of a report's evaluation."""
    return [_finding(row) for row in dig(report, "eval", "rows") or []]


def _finding(row: Mapping[str, Any]) -> Finding:
    def figure(key: str) -> float | None:
        value = row.get(key)
        return float(value) if is_number(value) else None

    metric = str(row.get("metric", ""))
    direction = row.get("higher_is_better")
    if direction is None and metric.startswith(("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")):
        direction = False
    return Finding(
        task=str(row.get("task", "")),
        metric=metric,
        before=figure("before"),
        after=figure("after"),
        before_stderr=figure("before_stderr"),
        after_stderr=figure("after_stderr"),
        higher_is_better=direction,
        n=row.get("n"),
        paired=row.get("paired"),
    )


def _ordered(one: float, other: float) -> tuple[float, float]:
    return (one, other) if one <= other else (other, one)
