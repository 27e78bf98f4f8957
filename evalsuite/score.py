"""One model, scored: perplexity on a text and lm-eval tasks, as a flat list of metrics with their standard errors."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch
from compress.calibrate.errors import InputError
from compress.evalsuite.catalogue import PERPLEXITY
from compress.evalsuite.harness import evaluate_tasks, validate_tasks
from compress.evalsuite.perplexity import Perplexity, perplexity
from compress.evalsuite.settings import EvalSettings as EvalSettings

_PROBE = "The quick brown fox: 3.14 × naïve café\n\n\tdef f(x): return x  # 你好"


class Text(Protocol):
    """A text and the name by which a report calls it."""

    @property
    def name(self) -> str:
        """What a report calls it."""

    @property
    def text(self) -> str:
        """The whole text."""


@dataclass(frozen=True)
class Metric:
    """One figure of one task.

    Attributes:
        task: task or group, ``"perplexity"`` for ours.
        metric: lm-eval's name of the metric (with ``,filter`` where there is one), or ``perplexity@WINDOW``.
        value: the figure.
        stderr: its standard error, where there is one.
        higher_is_better: which way is up; None where the task doesn't say.
        n: questions answered; for perplexity, tokens predicted; None for a group.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool | None
    n: int | None


@dataclass(frozen=True)
class Scores:
    """Everything that one evaluation found, and what it takes to compare it with another.

    Attributes:
        metrics: one entry per task and metric, in the order in which the tasks were asked for.
        settings: how it was measured.
        tokenizer: fingerprint of the tokenizer, by its vocabulary and by what it makes of a short text.
        perplexity: losses per window, if perplexity was asked for.
        text: name of the perplexity text.
        text_tokens: sha256 over the ids of the perplexity text's windows.
        harness: lm-eval's own results, if any of its tasks were run.
    """

    metrics: tuple[Metric, ...]
    settings: EvalSettings
    tokenizer: str
    perplexity: Perplexity | None = None
    text: str | None = None
    text_tokens: str | None = None
    harness: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types; a figure that isn't finite becomes null, since JSON has no name for it."""
        return finite(asdict(self))

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Scores":
        """The inverse of ``to_json``; a null figure becomes NaN."""
        nll = data["perplexity"]
        return cls(
            **data
            | {
                "metrics": tuple(Metric(**metric | {"value": _number(metric["value"])}) for metric in data["metrics"]),
                "settings": EvalSettings(**data["settings"]),
                "perplexity": nll
                and Perplexity(
                    **nll | {"value": _number(nll["value"]), "nll": tuple(_number(value) for value in nll["nll"])}
                ),
            }
        )


def score(
    model: Any, tokenizer: Any, tasks: Sequence[str], settings: EvalSettings | None = None, text: Text | None = None
) -> Scores:
    """Score a loaded model.

    Args:
        model: a transformers causal language model, on any device; it is left as it was.
        tokenizer: its tokenizer.
        tasks: names of lm-eval tasks, groups or tags; ``"perplexity"`` for perplexity on ``text``.
        settings: how to measure.
        text: the text for perplexity, tokenised as a whole without special tokens.

    Raises:
        InputError: a task doesn't exist or its data can't be had; perplexity without a text, or with one that is too
            short; a window beyond the model's context.
    """
    settings = settings or EvalSettings()
    tasks = list(dict.fromkeys(tasks))
    validate_tasks(tasks, settings.task_path)
    if PERPLEXITY in tasks and text is None:
        raise InputError("eval.text", None, "the task perplexity needs a text")
    scores = Scores((), settings, tokenizer_fingerprint(tokenizer))
    metrics: dict[str, list[Metric]] = {}
    if PERPLEXITY in tasks and text is not None:
        ids = torch.tensor(tokenizer(text.text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
        found = perplexity(model, ids, settings.window, settings.windows)
        used = ids[: len(found.nll) * settings.window]
        digest = hashlib.sha256(used.numpy().tobytes()).hexdigest()
        scores = replace(scores, perplexity=found, text=text.name, text_tokens=digest)
        metrics[PERPLEXITY] = [Metric(PERPLEXITY, found.name, found.value, found.stderr, False, found.tokens)]
    named = [name for name in tasks if name != PERPLEXITY]
    if named:
        results = evaluate_tasks(model, tokenizer, named, settings)
        scores = replace(scores, harness=results)
        metrics |= {name: list(_metrics(name, results)) for name in results["results"]}
    order = sorted(metrics, key=lambda name: tasks.index(name) if name in tasks else len(tasks))
    return replace(scores, metrics=tuple(metric for name in order for metric in metrics[name]))


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A short hash that differs when a tokenizer's vocabulary, its splitting of text or its special tokens do."""
    facts = [sorted(tokenizer.get_vocab().items()), tokenizer(_PROBE)["input_ids"]]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _metrics(task: str, results: dict[str, Any]) -> list[Metric]:
    """The metrics in one entry of lm-eval's results, whose keys are ``metric,filter`` and ``metric_stderr,filter``."""
    entry = results["results"][task]
    directions = results["higher_is_better"].get(task, {})
    count = results["n-samples"].get(task, {}).get("effective")
    found = []
    for key, value in entry.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = entry.get(f"{metric}_stderr,{filter_name}")
        found.append(
            Metric(
                task=task,
                metric=metric if filter_name == "none" else key,
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, int | float) else None,
                higher_is_better=directions.get(metric),
                n=count,
            )
        )
    return found


def finite(value: Any) -> Any:
    """Nested lists and mappings with null in the place of every float that isn't finite; tuples become lists."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float | None) -> float:
    return math.nan if value is None else value
