"""Continuations scored in rows that compute shared beginnings once, for models whose attention takes any mask."""

import copy
from collections.abc import Iterator, Sequence
from threading import Lock
from typing import Any

import torch
from compress.evalsuite.logits import Answer, TokenLogits
from compress.evalsuite.prefix_tree import Continuation, Family, Row, plan_rows, probe
from transformers import DynamicCache

_MASKED_ATTENTION = ("sdpa", "eager")
_LAYER_TYPES = {"full_attention", "sliding_attention"}
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}
_TOLERANCE = {4: 1e-3, 2: 0.5}  # nats per token, by bytes per number
_UNSUPPORTED = (TypeError, ValueError, AttributeError, LookupError, RuntimeError)

PROBE_PASSES = 4
"""What ``rows_are_exact`` costs, in forward passes over the longest sequence."""

Windows = dict[str, int | None]
"""Sliding window of each type of layer; None for full attention."""


def layer_windows(config: Any) -> Windows | None:
    """The windows of a model; None if its masks can't be ours."""
    config = config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    if config._attn_implementation not in _MASKED_ATTENTION or kinds & _LENGTH_DEPENDENT_ROPE:
        return None
    types = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if not types:
        return {"full_attention": window}
    if not types <= _LAYER_TYPES:
        return None
    return {kind: window if kind == "sliding_attention" else None for kind in types}


def rows_are_exact(logits: TokenLogits, items: Sequence[Continuation], windows: Windows) -> bool:
    """Whether sequences as long as the longest get the same answers in a row as by themselves.

    A model may use its mask or its positions in a way that its config doesn't tell, or refuse ours.
    """
    pair, family = probe(items)
    scorer = TreeScorer(logits, pair, windows, len(pair))
    try:
        found = dict(answer for job in scorer.family_jobs(family) for answer in scorer.run(job))
    except _UNSUPPORTED:
        return False
    tolerance = _TOLERANCE[min(logits.model.dtype.itemsize, 4)]
    for index, item in enumerate(pair):
        size = len(item.inputs)
        wanted = [(range(size - item.scored, size), item.targets)]
        ((alone, _),) = logits.answers(wanted, input_ids=logits.ids([item.inputs]), use_cache=False)
        if abs(found[index][0] - alone) > tolerance * item.scored:
            return False
    return True


class TreeScorer:
    """Shared beginnings once.

    Args:
        logits: the model.
        items: what to score.
        windows: from ``layer_windows``.
        batch_size: questions in a row.
    """

    def __init__(self, logits: TokenLogits, items: Sequence[Continuation], windows: Windows, batch_size: int) -> None:
        self._logits, self._items, self._windows, self._batch_size = logits, items, windows, batch_size

    def jobs(self) -> Iterator[tuple["_Prefix", Row]]:
        """Rows with their prefixes; a prefix is gone when the last of its rows is."""
        for family in plan_rows(self._items, self._batch_size):
            yield from self.family_jobs(family)

    def sizes(self) -> Iterator[int]:
        """Tokens in each forward pass."""
        for family in plan_rows(self._items, self._batch_size):
            if family.prefix:
                yield len(family.prefix)
            yield from (len(row.tokens) for row in family.rows)

    def run(self, job: tuple["_Prefix", Row]) -> list[tuple[int, Answer]]:
        """One row."""
        prefix, row = job
        inputs: dict[str, Any] = {"input_ids": self._logits.ids([row.tokens]), "use_cache": False}
        if prefix.tokens:
            inputs["past_key_values"] = prefix.cache()
        if prefix.tokens or row.branches:
            inputs["position_ids"] = self._logits.ids([row.positions])
        if row.branches:
            inputs["attention_mask"] = self._mask(row, len(prefix.tokens))
        wanted = []
        for member, path in zip(row.members, row.paths, strict=True):
            item = self._items[member]
            wanted.append((path[-item.scored :], item.targets))
        return list(zip(row.members, self._logits.answers(wanted, **inputs), strict=True))

    def family_jobs(self, family: Family) -> Iterator[tuple["_Prefix", Row]]:
        """The rows of one family."""
        prefix = _Prefix(self._logits, family.prefix)
        for row in family.rows:
            yield prefix, row

    def _mask(self, row: Row, prefix: int) -> Any:
        """``[1, 1, T, prefix + T]``; one for each type of layer where they differ."""
        longest = max(row.positions) + 1
        windows = {kind: None if size is None or size >= longest else size for kind, size in self._windows.items()}
        masks = {size: self._prepared(row.mask(prefix, size)) for size in set(windows.values())}
        return next(iter(masks.values())) if len(masks) == 1 else {kind: masks[size] for kind, size in windows.items()}

    def _prepared(self, seen: torch.Tensor) -> torch.Tensor:
        # Added to the scores: the one form that both attentions take without converting it in each layer.
        mask = torch.zeros(seen.shape, dtype=self._logits.model.dtype)
        return mask.masked_fill(~seen, torch.finfo(mask.dtype).min)[None, None].to(self._logits.device)


class _Prefix:
    """Tokens whose keys and values are computed by the first thread that needs them."""

    def __init__(self, logits: TokenLogits, tokens: tuple[int, ...]) -> None:
        self.tokens = tokens
        self._logits = logits
        self._lock = Lock()
        self._made: DynamicCache | None = None

    def cache(self) -> DynamicCache:
        """A cache that holds the prefix; it may be added to."""
        with self._lock:
            if self._made is None:
                # Without the config, so that layers with a sliding window keep everything: our mask cuts it.
                self._made = DynamicCache()
                ids = self._logits.ids([self.tokens])
                self._logits.model.base_model(input_ids=ids, past_key_values=self._made, use_cache=True)
        cache = copy.copy(self._made)
        cache.layers = [copy.copy(layer) for layer in self._made.layers]  # tensors are shared, and replaced on update
        return cache
