"""What one evaluation found: figures with their standard errors, and the items that paired tests need. As JSON, too."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from compress.evalsuite.divergence import Divergence
from compress.evalsuite.longcontext import Cell, grid
from compress.evalsuite.perplexity import Perplexity
from compress.evalsuite.settings import EvalSettings


@dataclass(frozen=True)
class Metric:
    """One figure of one task.

    Attributes:
        task: task or group, ``"perplexity"`` for ours.
        metric: lm-eval's name of the metric (with ``,filter`` where there is one), ``perplexity@WINDOW`` (see
            :class:`Perplexity`), or ``string_match@LENGTH`` for a long-context task.
        value: the figure.
        stderr: its standard error, where there is one.
        higher_is_better: which way is up; None where the task doesn't say.
        n: questions answered; for perplexity, tokens predicted; None for a group.
        items: one number a question or window, in order, whose mean is the figure; None where it isn't such a mean.
        log: the mean of the items is the logarithm of the figure instead.
        weights: weight of each item in that mean, where they differ.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool | None
    n: int | None
    items: tuple[float, ...] | None = None
    log: bool = False
    weights: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Scores:
    """Everything that one evaluation found, and what it takes to compare it with another.

    Attributes:
        metrics: one entry per task and metric, in the order in which the tasks were asked for.
        settings: how it was measured.
        tokenizer: fingerprint of the tokenizer, by its vocabulary and by what it makes of a short text.
        perplexity: losses per window, if perplexity was asked for.
        text: name of the text of perplexity and divergence.
        text_tokens: sha256 over the ids of the text's windows.
        harness: lm-eval's own results, if any of its tasks were run.
        divergence: from the dense model, if it was asked for and this isn't the dense model.
        long_context: every length and depth, without the answers, if a long-context task was run.
        haystack: sha256 of the text in which needles were hidden; None for RULER's repeated sentence.
        documents: of each lm-eval task, sha256 over its documents in order.
    """

    metrics: tuple[Metric, ...]
    settings: EvalSettings
    tokenizer: str
    perplexity: Perplexity | None = None
    text: str | None = None
    text_tokens: str | None = None
    harness: dict[str, Any] | None = None
    divergence: Divergence | None = None
    long_context: tuple[Cell, ...] = ()
    haystack: str | None = None
    documents: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types; a figure that isn't finite becomes null, since JSON has no name for it."""
        data = finite(asdict(self))
        for metric in data["metrics"]:
            # Right or wrong: 1 rather than 1.0, for the sake of thousands of them.
            metric["items"] = metric["items"] and [_short(item) for item in metric["items"]]
        return data | {"long_context": finite(grid(self.long_context))}


def finite(value: Any) -> Any:
    """Nested lists and mappings with null in the place of every float that isn't finite; tuples become lists."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short(item: float | None) -> float | None:
    return int(item) if item in (0.0, 1.0) and item is not None else item
