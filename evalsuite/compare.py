"""Before and after, side by side; only where the two can be compared at all."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from compress.calibrate.errors import InputError
from compress.evalsuite.scores import Metric, Scores, finite
from compress.evalsuite.statistics import Paired, paired


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
        paired: the two on the same items; None where the figure isn't made of items.
    """

    task: str
    metric: str
    before: Metric
    after: Metric
    delta: float
    ratio: float | None
    paired: Paired | None = None

    @property
    def better(self) -> bool | None:
        """Whether the model got better; None if it stayed equal or nobody says which way is up."""
        if self.before.higher_is_better is None or self.delta == 0 or math.isnan(self.delta):
            return None
        return (self.delta > 0) == self.before.higher_is_better

    def cells(self) -> tuple[str, ...]:
        """A cell for each of ``HEADINGS``: figures as value ± stderr, the arrow shows which way is better."""
        arrow = {True: " ↑", False: " ↓", None: ""}[self.before.higher_is_better]
        ratio = "–" if self.ratio is None else f"{self.ratio:.3f}×"
        delta = f"{self.delta:+.{_digits(self.before)}f}"
        return (self.task, self.metric + arrow, _figure(self.before), _figure(self.after), delta, ratio, self._p())

    def to_json(self) -> dict[str, Any]:
        """As JSON types; a figure that isn't finite is null."""
        data: dict[str, Any] = finite(
            {
                "task": self.task,
                "metric": self.metric,
                "before": self.before.value,
                "before_stderr": self.before.stderr,
                "after": self.after.value,
                "after_stderr": self.after.stderr,
                "delta": self.delta,
                "ratio": self.ratio,
                "higher_is_better": self.before.higher_is_better,
                "n": self.before.n,
                "paired": None if self.paired is None else asdict(self.paired),
            }
        )
        return data

    def _p(self) -> str:
        if self.paired is None or self.paired.p_value is None:
            return "–"
        p = self.paired.p_value
        text = "<0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"
        return f"{text} {self.paired.stars}".rstrip()


HEADINGS = ("task", "metric", "before", "after", "delta", "ratio", "p")
"""Headings of the columns of ``Row.cells``; p is explained by ``statistics.EXPLANATION``."""


def compare(before: Scores, after: Scores, option: str = "--baseline") -> list[Row]:
    """Pair the metrics of a baseline with those of a compressed model; metrics that only one of them has are left out.

    Args:
        before: the baseline's.
        after: the compressed model's.
        option: what the user named the baseline with, for errors.

    Raises:
        InputError: the two were measured differently (tokenizer, text, window, number of questions, few-shot examples
            or version of a task), or have no metric in common.
    """
    _check_comparable(before, after, option)
    baseline = {(metric.task, metric.metric): metric for metric in before.metrics}
    rows = [
        _row(baseline[key], metric) for metric in after.metrics if (key := (metric.task, metric.metric)) in baseline
    ]
    if not rows and after.divergence is None:
        have = sorted({metric.task for metric in before.metrics})
        raise InputError(option, ", ".join(have) or None, "no metric in common with the model that was scored")
    return rows


def markdown_table(rows: Sequence[Row]) -> str:
    """A GitHub table of the comparison; an arrow beside a metric shows which way is better."""
    lines = [f"| {' | '.join(HEADINGS)} |", f"|---|---|{'---:|' * (len(HEADINGS) - 2)}"]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row.cells())} |" for row in rows]
    return "\n".join(lines)


def _check_comparable(before: Scores, after: Scores, option: str) -> None:
    """Refuse a comparison whose two sides differ in more than the model."""
    for name, ours, theirs in [*_own_facts(before, after), *_harness_facts(before, after)]:
        if ours != theirs:
            raise InputError(option, None, f"cannot be compared: {name} differs ({ours} before, {theirs} after)")


_Fact = tuple[str, object, object]


def _own_facts(before: Scores, after: Scores) -> list[_Fact]:
    """What must be equal for our own tasks: name, before, after."""
    facts: list[_Fact] = [("tokenizer", before.tokenizer, after.tokenizer)]
    if before.perplexity and after.perplexity:
        facts += [
            ("perplexity window", before.perplexity.name, after.perplexity.name),
            ("number of perplexity windows", len(before.perplexity.nll), len(after.perplexity.nll)),
        ]
    if before.text_tokens and after.text_tokens:
        facts.append(("way through the KV cache", before.settings.feed, after.settings.feed))
        facts.append(("perplexity text", before.text_tokens, after.text_tokens))
    if before.long_context and after.long_context:
        facts.append(("haystack", before.haystack, after.haystack))
        for key in ("depths", "samples", "seed"):
            facts.append((f"long-context {key}", getattr(before.settings, key), getattr(after.settings, key)))
    return facts


def _harness_facts(before: Scores, after: Scores) -> list[_Fact]:
    """What must be equal for lm-eval's tasks."""
    if not (before.harness and after.harness):
        return []
    facts: list[_Fact] = [("max_length", before.harness["max_length"], after.harness["max_length"])]
    for key in ("limit", "apply_chat_template", "system_instruction", "fewshot_as_multiturn"):
        facts.append((key, getattr(before.settings, key), getattr(after.settings, key)))
    for task in before.harness["configs"].keys() & after.harness["configs"].keys():
        for name, key in (("version", "versions"), ("few-shot examples", "n-shot"), ("questions", "n-samples")):
            facts.append((f"{task}: {name}", before.harness[key].get(task), after.harness[key].get(task)))
    for task in before.documents.keys() & after.documents.keys():
        facts.append((f"{task}: text of the questions", before.documents[task], after.documents[task]))
    return facts


def _row(before: Metric, after: Metric) -> Row:
    ratio = after.value / before.value if before.value else None
    test = None
    if before.items is not None and after.items is not None and len(before.items) == len(after.items):
        test = paired(
            before.items,
            after.items,
            higher_is_better=before.higher_is_better,
            log=before.log,
            weights=before.weights,
        )
    return Row(before.task, before.metric, before, after, after.value - before.value, ratio, test)


def _digits(metric: Metric) -> int:
    """Decimals: four below 0.1 (divergences), three below 10 (accuracies), two above (perplexities)."""
    size = abs(metric.value)
    return 4 if 0 < size < 0.1 else 3 if size < 10 else 2


def _figure(metric: Metric) -> str:
    digits = _digits(metric)
    return f"{metric.value:.{digits}f}" + (f" ± {metric.stderr:.{digits}f}" if metric.stderr is not None else "")
