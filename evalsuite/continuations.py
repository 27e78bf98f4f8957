"""Log-likelihoods of continuations: the forward passes behind multiple choice, as few and as full as they can be.

Three ways to the same figures:

- ``TreeScorer``: what sequences have in common is computed once. For models whose attention takes any mask.
- ``WholeScorer``: every sequence by itself, in batches of equal length without padding. For all other models, such as
  those whose attention is replaced by a method.
- ``CacheScorer``: the context goes into a cache that the caller provides, and the continuation is read on top of it.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, islice
from typing import Any, Protocol

import torch
from compress.calibrate.workers import Workers
from compress.evalsuite.head import CacheFactory
from compress.evalsuite.logits import Answer, TokenLogits, Wanted
from compress.evalsuite.prefix_tree import ROW_TOKENS, Continuation
from compress.evalsuite.tree_scorer import PROBE_PASSES, TreeScorer, layer_windows, rows_are_exact
from transformers import Cache

_PASS_TOKENS = 32
"""A forward pass reads all weights, which costs about what so many tokens do."""


class Scorer(Protocol):
    """One way to score."""

    def jobs(self) -> Iterable[Any]:
        """What there is to do, in parts that don't depend on each other; iterated over in one thread."""

    def run(self, job: Any) -> list[tuple[int, Answer]]:
        """Do one part, in any thread: numbers of items and their answers."""


@torch.no_grad()
def score_continuations(
    model: Any,
    items: Sequence[Continuation],
    batch_size: int = 8,
    cache: CacheFactory | None = None,
    done: Callable[[int], object] = lambda count: None,
) -> list[Answer]:
    """Log-likelihood of each continuation, and whether greedy decoding would have produced it.

    Args:
        model: a transformers causal language model in evaluation mode.
        items: the sequences, none longer than the model's context and one token.
        batch_size: questions, or sequences where nothing can be shared, in a forward pass.
        cache: makes the cache that holds each context, which must bear ``copy.deepcopy``, as transformers' own do;
            None for no cache at all.
        done: told how many items were answered since the last time.
    """
    answers: list[Answer] = [(0.0, True)] * len(items)
    if not items:
        return answers
    logits = TokenLogits(model, items[0].tokens)
    scorer = _pick_scorer(logits, items, batch_size, cache)
    with Workers(None if logits.device.type == "cpu" else 1) as workers:
        for found in workers.map(scorer.run, scorer.jobs()):
            for index, answer in found:
                answers[index] = answer
            done(len(found))
    return answers


def _pick_scorer(
    logits: TokenLogits, items: Sequence[Continuation], batch_size: int, cache: CacheFactory | None
) -> Scorer:
    """The fastest way that is exact."""
    if cache is not None:
        return CacheScorer(logits, items, cache)
    whole = WholeScorer(logits, items, batch_size)
    windows = layer_windows(logits.model.config)
    if windows is None:
        return whole
    tree = TreeScorer(logits, items, windows, batch_size)
    longest = max(len(item.inputs) for item in items)
    dear = _cost(tree.sizes()) + _cost([longest] * PROBE_PASSES) >= _cost(whole.sizes())
    return whole if dear or not rows_are_exact(logits, items, windows) else tree


def _cost(sizes: Iterable[int]) -> int:
    """What forward passes over so many tokens cost, in tokens."""
    return sum(_PASS_TOKENS + size for size in sizes)


class WholeScorer:
    """Each sequence by itself, batches of equal length.

    Args:
        logits: the model.
        items: what to score.
        batch_size: sequences in a forward pass.
    """

    def __init__(self, logits: TokenLogits, items: Sequence[Continuation], batch_size: int) -> None:
        self._logits, self._items, self._batch_size = logits, items, batch_size

    def jobs(self) -> Iterator[list[list[int]]]:
        """Batches, the longest first; of each sequence in it, the items that it answers."""
        items = self._items
        order = sorted(range(len(items)), key=lambda index: (-len(items[index].tokens), items[index].tokens))
        alike = [list(group) for _, group in groupby(order, key=lambda index: items[index].inputs)]
        for length, group in groupby(alike, key=lambda indices: len(items[indices[0]].inputs)):
            while batch := list(islice(group, max(1, min(self._batch_size, ROW_TOKENS // length)))):
                yield batch

    def sizes(self) -> Iterator[int]:
        """Tokens in each forward pass."""
        return (len(batch) * len(self._items[batch[0][0]].inputs) for batch in self.jobs())

    def run(self, job: list[list[int]]) -> list[tuple[int, Answer]]:
        """One batch."""
        rows = [self._items[indices[0]].inputs for indices in job]
        wanted: list[Wanted] = []
        for number, indices in enumerate(job):
            end = (number + 1) * len(rows[0])
            for index in indices:
                wanted.append((range(end - self._items[index].scored, end), self._items[index].targets))
        found = self._logits.answers(wanted, input_ids=self._logits.ids(rows), use_cache=False)
        return list(zip((index for indices in job for index in indices), found, strict=True))


class CacheScorer:
    """Contexts in a cache, as in generation: prefilled at once, then the continuation on top.

    The first token of a continuation is predicted by the prefill, the others with the cache's keys and values. Nothing
    is asked of the cache but that it can be copied.

    Args:
        logits: the model.
        items: what to score.
        cache: makes a fresh cache.
    """

    def __init__(self, logits: TokenLogits, items: Sequence[Continuation], cache: CacheFactory) -> None:
        self._logits, self._items, self._cache = logits, items, cache

    def jobs(self) -> Iterator[tuple[list[int], Cache]]:
        """Items of the same context with a cache for them, the longest contexts first."""
        same: dict[tuple[int, ...], list[int]] = {}
        for index, item in enumerate(self._items):
            same.setdefault(item.tokens[: item.context], []).append(index)
        for group in sorted(same.values(), key=lambda group: -self._items[group[0]].context):
            yield group, self._cache()  # here, since jobs are asked for in one thread

    def run(self, job: tuple[list[int], Cache]) -> list[tuple[int, Answer]]:
        """One context and all its continuations."""
        group, cache = job
        context = self._items[group[0]].tokens[: self._items[group[0]].context]
        first: list[Wanted] = [([len(context) - 1], self._items[index].targets[:1]) for index in group]
        found = self._logits.answers(first, **self._inputs(context, 0, cache))
        longer = [place for place, index in enumerate(group) if self._items[index].scored > 1]
        for place in longer:
            targets = self._items[group[place]].targets
            past = copy.deepcopy(cache) if place != longer[-1] else cache
            rest: list[Wanted] = [(range(len(targets) - 1), targets[1:])]
            ((value, greedy),) = self._logits.answers(rest, **self._inputs(targets[:-1], len(context), past))
            found[place] = found[place][0] + value, found[place][1] and greedy
        return list(zip(group, found, strict=True))

    def _inputs(self, tokens: Sequence[int], start: int, cache: Cache) -> dict[str, Any]:
        """Tokens from a position on, on top of a cache."""
        return {
            "input_ids": self._logits.ids([tokens]),
            "position_ids": self._logits.ids([range(start, start + len(tokens))]),
            "past_key_values": cache,
            "use_cache": True,
        }
