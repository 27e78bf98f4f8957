"""A key/value cache with reserved room: a new token is written behind the others instead of copying all of them.

transformers' ``DynamicLayer`` concatenates, which reads and writes the whole cache for each token. Here keys and values
lie in buffers that grow by ``STEP`` tokens; ``keys`` and ``values`` are views of their filled part, so everything that
transformers does with a cache (crop, beams, repetition, selection) works as before, and what is allocated beyond the
tokens is counted with the storage behind the views.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

STEP = 128  # tokens; a growth copies the cache once, so a share of length / STEP^2 of its tokens for every token


class GrowingLayer(DynamicLayer):
    """Keys and values [batch, heads, tokens, head_dim] of one layer."""

    keys: Any
    values: Any

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._room: tuple[Tensor, Tensor] | None = None
        self._shown: tuple[Tensor, Tensor] | None = None  # views of the room, as they were returned last

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [batch, heads, new, head_dim]; returns everything that is held, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held, new = self.get_seq_length(), key_states.shape[-2]
        if not self._fits(held + new):
            self._room = (
                _grown(self.keys, key_states, held, held + new),
                _grown(self.values, value_states, held, held + new),
            )
        assert self._room is not None
        keys, values = self._room
        keys.narrow(2, held, new).copy_(key_states)
        values.narrow(2, held, new).copy_(value_states)
        self.keys, self.values = self._shown = keys.narrow(2, 0, held + new), values.narrow(2, 0, held + new)
        return self._shown

    def get_seq_length(self) -> int:
        """Tokens that are held; keys may have no width, in a layer that takes its probabilities from another one."""
        return self.values.shape[-2] if self.is_initialized and self.values.numel() else 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the sequences in another order, as beam search does."""
        self.rearrange(lambda states: states.index_select(0, beam_idx.to(states.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        self.rearrange(lambda states: states.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some of the sequences."""
        self.rearrange(lambda states: states[indices, ...])

    def reset(self) -> None:
        """Forget everything."""
        self._room = self._shown = None
        super().reset()

    def rearrange(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a function of the batch's dimension, to the room too."""
        length = self.get_seq_length()
        if length == 0:
            return
        if not self._fits(length):
            self._room, self.keys, self.values = None, change(self.keys), change(self.values)
            return
        assert self._room is not None
        keys, values = self._room = change(self._room[0]), change(self._room[1])
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]

    def _fits(self, length: int) -> bool:
        """Whether what is held lies at the beginning of the room, and `length` tokens have a place there.

        It doesn't after others put a tensor into ``keys`` or ``values``; and tensors of inference mode can't be written
        to outside of it.
        """
        if self._room is None or self._room[0].shape[-2] < length:
            return False
        if self._room[0].is_inference() and not torch.is_inference_mode_enabled():
            return False
        if self._shown is not None and self.keys is self._shown[0] and self.values is self._shown[1]:
            return True
        return all(
            held.data_ptr() == room.data_ptr() and held.shape[0] == room.shape[0] and held.stride() == room.stride()
            for held, room in zip((self.keys, self.values), self._room, strict=True)
        )


class GrowingCache(DynamicCache):
    """A ``DynamicCache`` whose layers of full attention are :class:`GrowingLayer`.

    Args:
        config: of the model; sliding layers are transformers' own, which keep no more than their window.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.layers: list[Any] = self.growing(list(self.layers))

    @staticmethod
    def growing(layers: list[Any]) -> list[Any]:
        """The layers of an empty cache, those of full attention replaced."""
        return [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in layers]


def _grown(held: Tensor, new: Tensor, tokens: int, length: int) -> Tensor:
    """Room for at least ``length`` tokens shaped like ``new``, with ``held`` at its beginning."""
    batch, heads, _, width = new.shape
    room = new.new_empty(batch, heads, -(-length // STEP) * STEP, width)
    if tokens:
        room[:, :, :tokens] = held
    return room
