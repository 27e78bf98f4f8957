"""Sampling many sequences at once from a causal language model, reproducibly and without touching global state."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

KEPT = 1024  # candidates among which top_p chooses; sorting a whole vocabulary would take longer than the model


@dataclass(frozen=True)
class Filter:
    """Which tokens may be drawn.

    Attributes:
        temperature: divides the logits.
        top_k: only the k likeliest tokens; 0 for all.
        top_p: only the likeliest tokens that together have this probability; 1 for all.
        min_p: only tokens at least this share as likely as the likeliest; 0 for all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def draw(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """One token a row, by inversion of the cumulative distribution.

        Args:
            logits: ``[batch, vocab]``, float32, ``-inf`` for tokens that may not come.
            uniform: one number of [0, 1) a row ``[batch]``: the only randomness.

        Returns:
            Token ids ``[batch]``.
        """
        if not (self.top_k or self.top_p < 1.0):
            return _invert(self._likely(torch.softmax(logits / self.temperature, dim=-1)), uniform)
        count = min(self.top_k or KEPT, logits.shape[-1])
        best, ids = torch.topk(logits / self.temperature, count, dim=-1)
        # Probabilities are of the whole vocabulary, so that top_p means what it says.
        probabilities = (best - torch.logsumexp(logits / self.temperature, dim=-1, keepdim=True)).exp()
        before = probabilities.cumsum(-1) - probabilities
        kept = self._likely(probabilities.masked_fill(before >= self.top_p, 0.0))
        return ids.gather(1, _invert(kept, uniform).unsqueeze(1)).squeeze(1)

    def _likely(self, probabilities: Tensor) -> Tensor:
        if self.min_p <= 0.0:
            return probabilities
        floor = probabilities.amax(dim=-1, keepdim=True) * self.min_p
        return probabilities.masked_fill(probabilities < floor, 0.0)


def _invert(probabilities: Tensor, uniform: Tensor) -> Tensor:
    cumulative = probabilities.cumsum(dim=-1)
    target = uniform.unsqueeze(1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp_(max=probabilities.shape[-1] - 1)


class Writer:
    """One sequence in the making: an opening, then what the model draws, then the next opening, and so on.

    Args:
        openings: token ids to begin a document with, in turn; never ends.
        ends: tokens that end a document when drawn. They are replaced by the next opening.
    """

    def __init__(self, openings: Iterator[list[int]], ends: frozenset[int]) -> None:
        self._openings = openings
        self._ends = ends
        self._due = deque(next(openings))

    def follow(self, drawn: int) -> int:
        """The token that comes next, given the one that the model would have."""
        if not self._due and drawn in self._ends:
            self._due.extend(next(self._openings))
        return self._due.popleft() if self._due else drawn


class _Room(DynamicLayer):
    """A key-value cache layer whose storage is made once: appending copies only the new tokens."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity = capacity
        self._length = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append, and return all keys and values so far ``[batch, heads, length, head_dim]``."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._stored = [
                states.new_empty(*states.shape[:2], self._capacity, states.shape[3])
                for states in (key_states, value_states)
            ]
        start, self._length = self._length, self._length + key_states.shape[2]
        for stored, states in zip(self._stored, (key_states, value_states), strict=True):
            stored[:, :, start : self._length] = states
        self.keys, self.values = (stored[:, :, : self._length] for stored in self._stored)
        return self.keys, self.values


def cache_for(model: PreTrainedModel, capacity: int) -> DynamicCache:
    """A key-value cache for ``capacity`` tokens; layers of other kinds than full attention stay the model's own."""
    cache = DynamicCache(config=model.config)
    cache.layers = [_Room(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


@torch.inference_mode()
def write(
    model: PreTrainedModel,
    writers: list[Writer],
    uniforms: Tensor,
    choice: Filter,
    banned: Tensor,
    step_done: Callable[[int], None],
) -> Tensor:
    """Write one sequence a writer, in one batch.

    Args:
        model: a causal language model in eval mode.
        writers: decide what follows what is drawn.
        uniforms: the randomness, ``[batch, length]`` in [0, 1), on the CPU.
        choice: which tokens may be drawn.
        banned: ids that may never be drawn ``[n]``.
        step_done: told the number of tokens written since the last call.

    Returns:
        Token ids ``[batch, length]``, int64 on the CPU.
    """
    batch, length = uniforms.shape
    ids = torch.empty(batch, length, dtype=torch.int64)
    ids[:, 0] = torch.tensor([writer.follow(-1) for writer in writers])
    cache = cache_for(model, length)
    for step in range(1, length):
        fed = ids[:, step - 1 : step].to(model.device)
        logits = model(input_ids=fed, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        logits = logits.float().cpu()
        logits[:, banned] = float("-inf")
        drawn = choice.draw(logits, uniforms[:, step]).tolist()
        ids[:, step] = torch.tensor([writer.follow(token) for writer, token in zip(writers, drawn, strict=True)])
        step_done(batch)
    return ids
