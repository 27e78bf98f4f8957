"""The first tokens of every sequence, kept at 16 bits: nearly every head attends to them (attention sinks)."""

import torch
from torch import Tensor

from compress.kernels.segment_attention import Segment
from compress.kv.arena import Change, Place
from compress.kv.window import stored_dtype


class Sinks:
    """Room for ``size`` tokens a sequence, shaped like ``key`` [batch, KV heads, tokens, head_dim]."""

    def __init__(self, size: int, key: Tensor) -> None:
        batch, heads, _, width = key.shape
        dtype = stored_dtype(key.dtype)
        self.keys, self.values = (
            torch.zeros(batch, heads, size, width, dtype=dtype, device=key.device) for _ in range(2)
        )
        self.counts = torch.zeros(batch, heads, dtype=torch.int32)  # on the CPU, where lengths are decided
        self.bounds = torch.zeros(batch, heads, 2, dtype=torch.int32, device=key.device)

    def lacking(self, place: Place) -> int:
        """How many tokens there is room for."""
        return self.keys.shape[2] - int(self.counts[place.rows, place.heads].max())

    def append(self, place: Place, keys: Tensor, values: Tensor) -> None:
        """Keep [rows, heads, tokens, head_dim], no more than there is room for.

        Raises:
            ValueError: a key or value beyond the range of the 16-bit type.
        """
        held = int(self.counts[place.rows, place.heads].max())
        slots = slice(held, held + keys.shape[2])
        self.keys[place.rows, place.heads, slots] = keys.to(self.keys.dtype)
        self.values[place.rows, place.heads, slots] = values.to(self.values.dtype)
        for name, kept in (("key", self.keys), ("value", self.values)):
            if not bool(kept[place.rows, place.heads, slots].isfinite().all()):
                raise ValueError(f"a {name} of the model is beyond the range of {kept.dtype}, in which sinks are kept")
        self._set(self.counts, place, slots.stop)

    def crop(self, counts: Tensor) -> None:
        """Keep the first so many tokens, [batch, KV heads] int32."""
        self.counts = counts
        self.bounds[..., 1] = counts.to(self.bounds.device)

    def change(self, change: Change) -> None:
        """Apply a function of the batch's dimension to every tensor."""
        for name in ("keys", "values", "counts", "bounds"):
            setattr(self, name, change(getattr(self, name)))

    def segment(self) -> Segment:
        """For :func:`compress.kernels.segment_attention.segment_attention`."""
        longest = int(self.counts.max())
        return Segment(self.keys, self.values, 16, 16, None, None, None, None, self.bounds, longest)

    def payload(self) -> int:
        """Bytes of the tokens."""
        return int(self.counts.sum()) * self.keys.shape[3] * 4

    def _set(self, counts: Tensor, place: Place, count: int) -> None:
        counts[place.rows, place.heads] = count
        self.bounds[place.rows, place.heads, 1] = count
