"""A causal language model in two parts: the decoder, and the head that turns its final states into logits.

Logits are the largest tensor of an evaluation, a vocabulary of numbers for every token. Apart from the decoder the head
can be applied to a few tokens at a time, and also later, to final states that were kept.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

CacheFactory = Callable[[], Cache]
"""Makes a fresh cache for one sequence or batch; a method that replaces the cache comes in this way.

It is called in the thread that asked for the evaluation, one call at a time, and so needn't be safe in several. The
caches that it makes are used in several threads on a CPU, each cache by one thread at a time, and up to twice as many
as there are threads are made before they are used: what they hold must be their own.
"""

LOGITS_BYTES = 64 * 2**20
"""Bound on the bytes of float32 logits and log-probabilities that exist at once in a thread."""

PROBE_TOKENS = 8


class Decoder:
    """The final states of a model, and what makes logits of them.

    Where the language-model head on the decoder's hidden states gives the model's own logits (checked on a few tokens,
    since some families scale or cap their logits behind the head), the states are hidden states. Otherwise the states
    are the model's full logits, and the head is the identity.

    Args:
        model: a transformers causal language model.
        sample: token ids ``[1, T]`` on the model's device; a few of them are used for the check.

    Attributes:
        head: states ``[..., F]`` to logits ``[..., vocabulary]``; it holds nothing of the decoder.
        vocabulary: number of logits.
    """

    def __init__(self, model: Any, sample: Tensor) -> None:
        self._model = model
        self.vocabulary: int = model.get_input_embeddings().weight.shape[0]
        head = self._own_head(sample[:, :PROBE_TOKENS])
        self._apart = head is not None
        self.head: nn.Module = nn.Identity() if head is None else head

    def states(self, **inputs: Any) -> Tensor:
        """Final states ``[batch, T, F]`` of one forward pass.

        Args:
            inputs: what the model is called with.
        """
        return self._pass(inputs)[0]

    def states_through_cache(self, ids: Tensor, sizes: Sequence[int], cache: Cache | None) -> Tensor:
        """Final states ``[batch, T, F]`` of several forward passes, one behind the other in a cache.

        Args:
            ids: ``[batch, T]``.
            sizes: tokens of each pass.
            cache: an empty cache; None lets the model make its own.
        """
        parts: list[Tensor] = []
        for part in ids.split(list(sizes), dim=1):
            states, cache = self._pass({"input_ids": part, "past_key_values": cache, "use_cache": True})
            parts.append(states)
        return torch.cat(parts, dim=1)

    def _pass(self, inputs: dict[str, Any]) -> tuple[Tensor, Cache | None]:
        found = (self._model.base_model if self._apart else self._model)(**inputs)
        return found.last_hidden_state if self._apart else found.logits, getattr(found, "past_key_values", None)

    @torch.no_grad()
    def _own_head(self, ids: Tensor) -> nn.Module | None:
        """The head, if it may be applied on its own."""
        model = self._model
        head: nn.Module | None = model.get_output_embeddings()
        if model.base_model is model or head is None:
            return None
        hidden = getattr(model.base_model(input_ids=ids, use_cache=False), "last_hidden_state", None)
        if hidden is None:
            return None
        ours, own = head(hidden).float(), model(input_ids=ids, use_cache=False).logits.float()
        # Strict, because a soft cap is nearly the identity on small logits; full logits are the safe way out.
        same = ours.shape == own.shape and torch.allclose(ours, own, rtol=0, atol=1e-6 * float(own.abs().max()))
        return head if same else None


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Within it the model is in evaluation mode and computes no gradients."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def chunk_tokens(vocabulary: int, copies: int) -> int:
    """How many tokens' logits may exist at once.

    Args:
        vocabulary: number of logits.
        copies: float32 tensors of their size that exist together.
    """
    return max(1, LOGITS_BYTES // (copies * 4 * vocabulary))


def logits_in_chunks(head: nn.Module, states: Tensor, tokens: int) -> Iterator[Tensor]:
    """Logits ``[tokens, vocabulary]`` of final states ``[T, F]``, so many tokens at a time."""
    for part in states.split(tokens):
        yield head(part)
