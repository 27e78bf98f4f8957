"""A layer of the plan's cache that hands tensors instead of a handle to the attention function.

For models and attention functions that can't take a handle. ``update`` unpacks all that is held, returns it with the
new tokens behind it, and then keeps these. So attention is the same as over a handle, to rounding; it costs an unpacked
copy of one layer for every call. What needs more than keys and values isn't there:

- Queries aren't seen. Where some tokens of a flush are to be salient, they are its newest ones.
- Masks aren't seen. Padding is kept like tokens, and it is the model's mask that hides it: bytes count it, and first
  columns become sinks even where they are padding. A cache whose heads see different tokens would need a mask a head.
"""

import torch
from torch import Tensor

from compress.kv.layer import NO_GRADIENTS, PlanLayer
from compress.kv.packed import PackedPart
from compress.kv.plain import PlainPart


class MaterializedLayer(PlanLayer):
    """See the module's text; every head sees all tokens, packed or not."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Take in [batch, KV heads, new, head_dim]; returns all columns, the new ones as they came.

        Returns:
            Keys and values [batch, KV heads, columns, head_dim] of the model's dtype.

        Raises:
            ValueError: keys or values that need gradients, or aren't finite (found when they are packed).
        """
        if self._whole is not None:
            keys, values = super().update(key_states, value_states)
            return keys, values
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise ValueError(NO_GRADIENTS)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self._behind(key_states, value_states) if self._columns else (key_states, value_states)
        self._staged = key_states, value_states
        self.keep()
        return keys, values

    def _behind(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """New tokens behind all that is held."""
        batch, heads, new, width = key_states.shape
        shape = (batch, heads, self._columns + new, width)
        keys, values = key_states.new_empty(shape), value_states.new_empty(shape)
        for cluster in self.clusters:
            assert isinstance(cluster.part, PackedPart | PlainPart)  # no other one is in such a layer
            held, own = cluster.part.tokens(), slice(None) if cluster.heads is None else list(cluster.heads)
            keys[:, own, : self._columns] = held.keys.to(keys.dtype)
            values[:, own, : self._columns] = held.values.to(values.dtype)
        keys[:, :, self._columns :], values[:, :, self._columns :] = key_states, value_states
        return keys, values
