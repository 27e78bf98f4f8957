"""``compress eval``, and the scores of ``compress run``: models scored one at a time, and laid side by side."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from compress.calibrate.errors import InputError
from compress.device import pick_device
from compress.eval_inputs import Prepared, check_context, check_eval, prepare_eval
from compress.eval_output import Output
from compress.evalsuite.catalogue import DIVERGENCE
from compress.evalsuite.compare import Row, compare, markdown_table
from compress.evalsuite.divergence import Reference
from compress.evalsuite.harness import Samples
from compress.evalsuite.score import score, tokenizer_fingerprint
from compress.evalsuite.scores import Scores, finite
from compress.evalsuite.statistics import EXPLANATION
from compress.heads.sinks import SinkChange, sink_rate, sink_windows
from compress.memory import release
from compress.options import EvalOptions
from compress.runtime import Compute, Unloaded, find

SINK_BATCH = 4
Open = Callable[[], PreTrainedModel]
"""Loads a model to the device where it is scored."""


@dataclass(frozen=True)
class Candidate:
    """A model to score.

    Attributes:
        open: loads it.
        cache: makes the cache that it is scored and generates through; None is the one that it makes itself where it
            generates, while what is only read goes through none.
    """

    open: Open
    cache: Callable[[], Cache] | None = None


@dataclass(frozen=True)
class EvalOutcome:
    """What an evaluation found.

    Attributes:
        scores: of the model.
        baseline: of the baseline, if one was asked for.
        rows: the two side by side.
        text: origin of the text of perplexity and divergence.
        haystack: origin of the text around needles.
        sinks: how many heads rest on the first token, where divergence was asked for.
    """

    scores: Scores
    baseline: Scores | None
    rows: list[Row]
    text: str | None
    haystack: str | None = None
    sinks: SinkChange | None = None

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "text": self.text,
            "scores": self.scores.to_json(),
            "baseline": None if self.baseline is None else self.baseline.to_json(),
            **self.findings(),
        }

    def findings(self) -> dict[str, Any]:
        """What follows from the scores, as JSON types: ``rows``, ``divergence``, ``sinks`` and ``long_context``."""
        return {
            "rows": [row.to_json() for row in self.rows],
            "divergence": self._divergence(),
            "sinks": None if self.sinks is None else self.sinks.to_json(),
            "long_context": self._long_context(),
        }

    def note(self) -> str:
        """What a reader of the table must know, as sentences."""
        settings, parts = self.scores.settings, []
        if self.text is not None:
            stride = "" if settings.stride in (None, settings.window) else f" that overlap, {settings.stride} apart"
            parts.append(f"Text in windows of {settings.window} tokens{stride}: {self.text}.")
            parts += self._fed()
        if self.haystack is not None:
            parts.append(f"Needles hidden in: {self.haystack}.")
        if self.scores.divergence is not None:
            parts.append(self.scores.divergence.sentence())
        if any(row.paired is not None for row in self.rows):
            parts.append(EXPLANATION)
        return " ".join(parts)

    def lines(self) -> list[str]:
        """For a terminal: one table, and what it rests on."""
        if self.rows:
            table = markdown_table(self.rows).splitlines()
        else:
            table = ["| task | metric | value |", "|---|---|---:|"]
            for metric in self.scores.metrics:
                error = "" if metric.stderr is None else f" ± {metric.stderr:.4g}"
                table.append(f"| {metric.task} | {metric.metric} | {metric.value:.5g}{error} |")
        lines = [f"text: {self.text}", *self._fed()] if self.text else []
        lines += [f"haystack: {self.haystack}"] if self.haystack else []
        lines += table
        if self.rows and self.scores.divergence is not None:
            lines.append(self.scores.divergence.sentence())
        return [*lines, EXPLANATION] if any(row.paired is not None for row in self.rows) else lines

    def _fed(self) -> list[str]:
        """How windows went through the cache, where they did."""
        feed = self.scores.settings.feed
        if feed is None:
            return []
        return [
            f"The first {feed.prompt} tokens of a window fill the KV cache at once and aren't scored; the others follow"
            f" {feed.chunk} at a time, and see what the cache has kept of those before. The original is scored on the"
            " same tokens."
        ]

    def _divergence(self) -> dict[str, Any] | None:
        if self.scores.divergence is None:
            return None
        facts: dict[str, Any] = finite({"text": self.text, **asdict(self.scores.divergence)})
        return facts

    def _long_context(self) -> dict[str, Any] | None:
        if not self.scores.long_context:
            return None
        settings = self.scores.settings
        return {
            "lengths": list(settings.lengths),
            "depths": settings.depths,
            "samples": settings.samples,
            "seed": settings.seed,
            "haystack": self.haystack,
            "before": None if self.baseline is None else self.baseline.to_json()["long_context"],
            "after": self.scores.to_json()["long_context"],
        }


def evaluate(
    model: str,
    tasks: list[str],
    options: EvalOptions | None = None,
    cache: Callable[[], Cache] | None = None,
    output: Output | None = None,
) -> EvalOutcome:
    """Score a model, and a baseline on the same items if one is named.

    Args:
        model: an artifact, a Hub id, a folder or a ``.gguf`` file.
        tasks: lm-eval tasks by name, long-context tasks, ``perplexity`` and ``divergence``.
        options: how.
        cache: makes a fresh transformers ``Cache`` for each sequence that the model, not the baseline, is scored on or
            generates; None is the model's own, that of an artifact's plan if it has one.
        output: where the figures are written; None writes nothing.

    Raises:
        InputError: as ``check_eval``, :meth:`Output.check`, ``prepare_eval`` and :func:`compress.load`; divergence
            without a baseline; a baseline with another tokenizer.
    """
    options = options or EvalOptions()
    if not tasks:
        raise InputError("--tasks", None, "names no task", fix="for instance --tasks perplexity")
    if DIVERGENCE in tasks and options.baseline is None:
        problem = "compares with a dense model, and none is named"
        raise InputError("--tasks", DIVERGENCE, problem, fix="name the original: --baseline MODEL")
    check_eval(options, tasks, None)
    if output is not None:
        output.check(tasks)
    device = pick_device(options.device)
    found = find(model, trust_remote_code=options.trust_remote_code)
    other = None if options.baseline is None else _baseline(options.baseline, options, found)
    contexts = [one.context for one in (found, other) if one is not None and one.context is not None]
    check_context(options, tasks, min(contexts, default=None))
    prepared = prepare_eval(options, tasks, found.tokenizer)
    if output is not None:
        names = {"compressed": model, "original": options.baseline or ""}
        template = found.tokenizer.get_chat_template() if options.apply_chat_template else None
        prepared = replace(
            prepared, on_scores=lambda which, scores, samples: output.keep(names[which], scores, samples, template)
        )
    packed = options.packed or options.activations == "int8"
    compute = Compute(activations=options.activations, threads=options.threads)
    outcome = score_models(
        partial(found.open, compute, device) if packed else partial(load_to, found, device),
        None if other is None else partial(load_to, other, device),
        found.tokenizer,
        prepared,
        cache or found.cache,
    )
    if output is not None:
        output.finish(outcome.to_json())
    return outcome


def score_models(
    model: Open,
    baseline: Open | None,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Prepared,
    cache: Callable[[], Cache] | None = None,
    told: Callable[[str, float], None] = lambda which, seconds: None,
) -> EvalOutcome:
    """Score a baseline and a model on the same items: :func:`score_all` for one model, named ``compressed``."""
    (outcome,) = score_all({"compressed": Candidate(model, cache)}, baseline, tokenizer, prepared, told)
    return outcome


def score_all(
    models: Mapping[str, Candidate],
    baseline: Open | None,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Prepared,
    told: Callable[[str, float], None] = lambda which, seconds: None,
) -> Iterator[EvalOutcome]:
    """Score a baseline once, and models on the same items, one in memory at a time.

    Args:
        models: by name; with a cache for one of them, all windows go through caches, the others' through their own.
        baseline: loads the baseline, if there is one.
        tokenizer: of all of them.
        prepared: tasks, settings and texts.
        told: called when a model is scored, with its name or ``original``, and seconds.

    Yields:
        Each model's outcome as soon as it is there, in their order.

    Raises:
        InputError: a task that doesn't fit a model; a baseline that can't be compared.
    """
    cached = any(model.cache is not None for model in models.values())
    settings = prepared.settings.through_cache() if cached else prepared.settings

    def measure(which: str, model: Candidate) -> tuple[Scores, float | None]:
        started = time.perf_counter()
        samples: Samples = {}
        used = material if prepared.on_scores is None else replace(material, on_samples=samples.update)
        loaded = model.open()
        scores = score(loaded, tokenizer, prepared.tasks, settings, used, model.cache)
        rate = sink_rate(loaded, pieces.split(SINK_BATCH)) if len(pieces) else None
        del loaded
        release()
        if prepared.on_scores is not None:
            prepared.on_scores(which, scores, samples)
        told(which, time.perf_counter() - started)
        return scores, rate

    with TemporaryDirectory(prefix="compress-") as folder:
        reference = Reference(Path(folder)) if DIVERGENCE in prepared.tasks else None
        material = replace(prepared.material, reference=reference)
        text = material.text.ids if reference is not None and material.text is not None else torch.empty(0)
        pieces = sink_windows(text)
        # The baseline comes first, because divergence looks back to it.
        before, first = (None, None) if baseline is None else measure("original", Candidate(baseline))
        for name, model in models.items():
            after, rate = measure(name, model)
            rows = [] if before is None else compare(before, after)
            sinks = None if first is None or rate is None else SinkChange(first, rate, len(pieces))
            yield EvalOutcome(after, before, rows, prepared.text, prepared.haystack, sinks)


def eval_section(settings: dict[str, Any], outcome: EvalOutcome) -> dict[str, Any]:
    """The section ``eval`` of ``report.json``.

    Args:
        settings: the recipe's section, as JSON types.
        outcome: with a baseline.
    """
    assert outcome.baseline is not None
    return {
        "settings": settings,
        "text": outcome.text,
        "note": outcome.note(),
        "table": markdown_table(outcome.rows),
        "before": outcome.baseline.to_json(),
        "after": outcome.scores.to_json(),
        **outcome.findings(),
    }


def token_problem(model: Unloaded, other: Unloaded, name: str) -> str | None:
    """Why a model can't be compared with another one token by token, from their configs and tokenizers alone.

    Embeddings of different sizes are no reason where they are only padded.

    Args:
        model: what the clause is about.
        other: what it is compared with.
        name: what the other is called.

    Returns:
        A clause, or None where they can be compared.
    """
    if tokenizer_fingerprint(model.tokenizer) != tokenizer_fingerprint(other.tokenizer):
        return f"has another tokenizer than {name}, so that their figures can't be compared"
    sizes, tokens = (model.vocabulary, other.vocabulary), max(model.tokenizer.get_vocab().values()) + 1
    if None not in sizes and sizes[0] != sizes[1] and min(size for size in sizes if size is not None) < tokens:
        rows = f"{sizes[0]} rows, that of {name} {sizes[1]}"
        return f"can't be compared: its embedding has {rows}, and their tokenizer has {tokens} tokens"
    return None


def load_to(found: Unloaded, device: torch.device) -> PreTrainedModel:
    """Load a model for scoring, dense and in float32."""
    return found.open(Compute(), device, packed=False)


def _baseline(name: str, options: EvalOptions, model: Unloaded) -> Unloaded:
    """The baseline, not loaded.

    Raises:
        InputError: no such model, or one with other tokens.
    """
    try:
        found = find(name, trust_remote_code=options.trust_remote_code)
    except InputError as error:
        raise error.under("--baseline") from error
    if problem := token_problem(found, model, "the model"):
        raise InputError("--baseline", name, problem, fix="name the model that was compressed")
    return found
