"""Before and after, side by side; only where the two can be compared at all."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from compress.calibrate.errors import InputError
from compress.evalsuite.score import Metric, Scores


@dataclass(frozen=True)
class Row:
    """One metric of the model before and after compression.

    Attributes:
        task: task or group.
        metric: name of the metric.
        before: the baseline's figure with its standard error.
        after: the compressed model's.
        delta: after - before.
        ratio: after / before; None where before is zero.
    """

    task: str
    metric: str
    before: Metric
    after: Metric
    delta: float
    ratio: float | None

    @property
    def better(self) -> bool | None:
        """Whether the model got better; None if it stayed equal or nobody says which way is up."""
        if self.before.higher_is_better is None or self.delta == 0 or math.isnan(self.delta):
            return None
        return (self.delta > 0) == self.before.higher_is_better

    def cells(self) -> tuple[str, str, str, str, str, str]:
        """Task, metric, before ± stderr, after ± stderr, delta and ratio as text, for a table."""
        arrow = {True: " ↑", False: " ↓", None: ""}[self.before.higher_is_better]
        ratio = "–" if self.ratio is None else f"{self.ratio:.3f}×"
        delta = f"{self.delta:+.{_digits(self.before)}f}"
        return (self.task, self.metric + arrow, _figure(self.before), _figure(self.after), delta, ratio)


HEADINGS = ("task", "metric", "before", "after", "delta", "ratio")
"""Headings of the columns of ``Row.cells``."""


def compare(before: Scores, after: Scores) -> list[Row]:
    """Pair the metrics of a baseline with those of a compressed model; metrics that only one of them has are left out.

    Raises:
        InputError: the two were measured differently (tokenizer, text, window, number of questions, few-shot examples
            or version of a task), or have no metric in common.
    """
    _check_comparable(before, after)
    baseline = {(metric.task, metric.metric): metric for metric in before.metrics}
    rows = [
        _row(baseline[key], metric) for metric in after.metrics if (key := (metric.task, metric.metric)) in baseline
    ]
    if not rows:
        have = sorted({metric.task for metric in before.metrics})
        raise InputError("--baseline", ", ".join(have) or None, "no metric in common with the model that was scored")
    return rows


def markdown_table(rows: Sequence[Row]) -> str:
    """A GitHub table of the comparison; an arrow beside a metric shows which way is better."""
    lines = [f"| {' | '.join(HEADINGS)} |", "|---|---|---:|---:|---:|---:|"]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row.cells())} |" for row in rows]
    return "\n".join(lines)


def _check_comparable(before: Scores, after: Scores) -> None:
    """Refuse a comparison whose two sides differ in more than the model."""
    facts: list[tuple[str, object, object]] = [("tokenizer", before.tokenizer, after.tokenizer)]
    if before.perplexity and after.perplexity:
        facts += [
            ("perplexity window", before.perplexity.name, after.perplexity.name),
            ("number of perplexity windows", len(before.perplexity.nll), len(after.perplexity.nll)),
            ("perplexity text", before.text_tokens, after.text_tokens),
        ]
    if before.harness and after.harness:
        facts.append(("limit", before.settings.limit, after.settings.limit))
        facts.append(("max_length", before.harness["max_length"], after.harness["max_length"]))
        for task in before.harness["configs"].keys() & after.harness["configs"].keys():
            for name, key in (("version", "versions"), ("few-shot examples", "n-shot"), ("questions", "n-samples")):
                facts.append((f"{task}: {name}", before.harness[key].get(task), after.harness[key].get(task)))
    for name, ours, theirs in facts:
        if ours != theirs:
            raise InputError("--baseline", None, f"cannot be compared: {name} differs ({ours} before, {theirs} after)")


def _row(before: Metric, after: Metric) -> Row:
    ratio = after.value / before.value if before.value else None
    return Row(before.task, before.metric, before, after, after.value - before.value, ratio)


def _digits(metric: Metric) -> int:
    """Decimals: three below 10 (accuracies), two above (perplexities)."""
    return 3 if abs(metric.value) < 10 else 2


def _figure(metric: Metric) -> str:
    digits = _digits(metric)
    return f"{metric.value:.{digits}f}" + (f" ± {metric.stderr:.{digits}f}" if metric.stderr is not None else "")
