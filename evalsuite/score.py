"""One model, scored: perplexity, divergence, long-context tasks and lm-eval tasks, as one flat list of metrics."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from compress.calibrate.errors import InputError
from compress.evalsuite.catalogue import DIVERGENCE, PERPLEXITY, harness_tasks, long_context_tasks, text_tasks
from compress.evalsuite.divergence import Divergence, Reference
from compress.evalsuite.harness import Samples, evaluate_items, validate_tasks
from compress.evalsuite.head import CacheFactory
from compress.evalsuite.items import TaskItems
from compress.evalsuite.longcontext import LongContextSettings, check_long_context, long_context, results
from compress.evalsuite.perplexity import perplexity_of
from compress.evalsuite.scan import scan
from compress.evalsuite.scores import Metric, Scores
from compress.evalsuite.settings import EvalSettings
from compress.evalsuite.sliding import check_windows, context_of, lay_out

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
class Tokens:
    """A text as tokens.

    Attributes:
        name: what a report calls the text.
        ids: ``[N]``.
    """

    name: str
    ids: torch.Tensor


@dataclass(frozen=True)
class Material:
    """What models are scored on, beside lm-eval's tasks.

    Attributes:
        text: for perplexity and divergence.
        haystack: the text around the needles; None for RULER's repeated sentence.
        reference: the dense model's side of the divergence; score the dense model first, with the same one.
        tasks: lm-eval's tasks with their data, from ``load_tasks``; None loads them.
        on_samples: told what lm-eval logs for each document, by task.
    """

    text: Tokens | None = None
    haystack: Text | None = None
    reference: Reference | None = None
    tasks: dict[str, Any] | None = None
    on_samples: Callable[[Samples], object] | None = None


def tokenise(text: Text, tokenizer: Any) -> Tokens:
    """A text as tokens: as a whole, and without special tokens."""
    ids = tokenizer(text.text, add_special_tokens=False, verbose=False)["input_ids"]
    return Tokens(text.name, torch.tensor(ids, dtype=torch.long))


def score(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    settings: EvalSettings | None = None,
    material: Material | None = None,
    cache: CacheFactory | None = None,
) -> Scores:
    """Score a loaded model.

    Args:
        model: a transformers causal language model, on any device; it is left as it was.
        tokenizer: its tokenizer.
        tasks: names of lm-eval tasks, groups or tags, of long-context tasks, ``"perplexity"`` and ``"divergence"``.
        settings: how to measure.
        material: texts, and the dense model that divergence looks back to.
        cache: makes a fresh transformers ``Cache``, through which everything is scored and generated; None for the
            model's own. Perplexity and divergence are then of the tokens behind a prompt
            (:meth:`EvalSettings.through_cache`), so score what is compared with the same settings.

    Raises:
        InputError: a task doesn't exist or its data can't be had; perplexity without a text, or with one that is too
            short; divergence without a reference; a window or length beyond the model's context.
    """
    settings, material = settings or EvalSettings(), material or Material()
    settings = settings if cache is None else settings.through_cache()
    tasks = list(dict.fromkeys(tasks))
    validate_tasks(tasks, settings.task_path)
    on_text = text_tasks(tasks)
    if on_text and material.text is None:
        raise InputError("eval.text", None, f"the task {on_text[0]} needs a text")
    if DIVERGENCE in tasks and material.reference is None:
        raise InputError("eval.tasks", DIVERGENCE, "there is no dense model to compare with")
    long, named = long_context_tasks(tasks), harness_tasks(tasks)
    if long:
        check_long_context(long, long_settings(settings), context_of(model.config))
    found: list[_Found] = []
    if on_text:
        found.append(_on_text(model, on_text, settings, material, cache))
    if long:
        found.append(_long_context(model, tokenizer, long, settings, material.haystack, cache))
    if named:
        found.append(_harness(model, tokenizer, named, settings, material, cache))
    metrics = {name: part for metrics, _ in found for name, part in metrics.items()}
    order = sorted(metrics, key=lambda name: tasks.index(name) if name in tasks else len(tasks))
    facts = {name: value for _, facts in found for name, value in facts.items()}
    flat = tuple(metric for name in order for metric in metrics[name])
    return Scores(flat, settings, tokenizer_fingerprint(tokenizer), **facts)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A short hash that differs when a tokenizer's vocabulary, its splitting of text or its special tokens do."""
    facts = [sorted(tokenizer.get_vocab().items()), tokenizer(_PROBE)["input_ids"]]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def long_settings(settings: EvalSettings) -> LongContextSettings:
    """The part of the settings that long-context tasks know."""
    return LongContextSettings(settings.lengths, settings.depths, settings.samples, settings.seed)


_Found = tuple[dict[str, list[Metric]], dict[str, Any]]
"""Metrics by task, and further fields of ``Scores``."""


def _on_text(
    model: Any, tasks: Sequence[str], settings: EvalSettings, material: Material, cache: CacheFactory | None
) -> _Found:
    """Perplexity and divergence in one pass."""
    assert material.text is not None
    ids = material.text.ids
    check_windows(settings.window, settings.stride, settings.windows, context_of(model.config), settings.feed)
    cut = lay_out(ids.numel(), settings.window, settings.stride, settings.windows, settings.feed)
    digest = hashlib.sha256(ids[: cut.length].numpy().tobytes()).hexdigest()
    facts: dict[str, Any] = {"text": material.text.name, "text_tokens": digest}
    metrics: dict[str, list[Metric]] = {}
    if DIVERGENCE in tasks and material.reference is not None:
        scores, kl = material.reference.score(model, ids, cut, cache)
        facts["divergence"] = kl
        metrics[DIVERGENCE] = [] if kl is None else _of_divergence(kl, cut.name)
    else:
        scores = scan(model, ids, cut, cache=cache)
    if PERPLEXITY in tasks:
        facts["perplexity"] = nll = perplexity_of(scores, cut)
        figures = (nll.value, nll.stderr, False, nll.tokens)
        metrics[PERPLEXITY] = [Metric(PERPLEXITY, nll.name, *figures, items=nll.nll, log=True, weights=nll.weights)]
    return metrics, facts


def _of_divergence(found: Divergence, windows: str) -> list[Metric]:
    changed, kl = found.greedy.changed_answers, (found.mean_kl, found.kl_stderr, False, found.tokens)
    return [
        Metric(DIVERGENCE, f"kl@{windows}", *kl, items=found.kl, weights=found.weights),
        Metric(DIVERGENCE, f"top1_agreement@{windows}", found.top1_agreement, None, True, found.tokens),
        Metric(DIVERGENCE, f"changed_answers@{found.greedy.tokens}", changed, None, False, found.greedy.prompts),
    ]


def _long_context(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    settings: EvalSettings,
    haystack: Text | None,
    cache: CacheFactory | None,
) -> _Found:
    """Needles at every length and depth; a metric is the mean over the depths and samples of one length."""
    text = None if haystack is None else haystack.text
    cells = long_context(model, tokenizer, tasks, long_settings(settings), text, cache)
    metrics: dict[str, list[Metric]] = {}
    for found in results(cells):
        figures = (f"string_match@{found.length}", found.score, found.stderr, True, len(found.scores), found.scores)
        metrics.setdefault(found.task, []).append(Metric(found.task, *figures))
    facts = {
        "long_context": tuple(replace(cell, answers=()) for cell in cells),
        "haystack": None if text is None else hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(),
    }
    return metrics, facts


def _harness(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    settings: EvalSettings,
    material: Material,
    cache: CacheFactory | None,
) -> _Found:
    """lm-eval's tasks."""
    evaluated = evaluate_items(model, tokenizer, tasks, settings, cache, material.tasks)
    results, items = evaluated.results, evaluated.items
    if material.on_samples is not None:
        material.on_samples(evaluated.samples)
    documents = {name: hashlib.sha256("".join(found.documents).encode()).hexdigest() for name, found in items.items()}
    metrics = {name: _of_task(name, results, items) for name in results["results"]}
    return metrics, {"harness": results, "documents": documents}


def _of_task(task: str, results: dict[str, Any], items: dict[str, TaskItems]) -> list[Metric]:
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
        values, log = _behind(float(value), _items_of(task, key, results, items))
        found.append(
            Metric(
                task=task,
                metric=metric if filter_name == "none" else key,
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, int | float) else None,
                higher_is_better=directions.get(metric),
                n=count,
                items=values,
                log=log,
            )
        )
    return found


def _items_of(task: str, key: str, results: dict[str, Any], items: dict[str, TaskItems]) -> tuple[float, ...]:
    """One number a document; of a group, those of all its tasks."""
    if task in items:
        return items[task].values.get(key, ())
    members = results.get("group_subtasks", {}).get(task, ())
    return tuple(value for member in members for value in _items_of(member, key, results, items))


def _behind(figure: float, items: tuple[float, ...]) -> tuple[tuple[float, ...] | None, bool]:
    """The items if the figure is their mean, or the log-likelihoods that it is the perplexity of, negated."""
    if not items:
        return None, False
    mean = math.fsum(items) / len(items)
    if math.isclose(mean, figure, rel_tol=1e-6, abs_tol=1e-12):
        return items, False
    if figure > 0 and math.isclose(-mean, math.log(figure), rel_tol=1e-6):
        return tuple(-item for item in items), True
    return None, False
