"""The most recent tokens of a layer, at 8 or 16 bits, and what is known of their saliency.

Slots are filled from the front; a sequence with fewer tokens than another begins later, so that all end in the same
slot. At 8 bits a token's keys, and its values, are int8 with one float16 step.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.kernels.kv_pack import kv_pack, kv_unpack
from compress.kernels.segment_attention import Segment
from compress.kv.arena import Change
from compress.kv.bytes import KVBytes

STEP = 8  # slots that room grows by


@dataclass
class Tokens:
    """Tokens on their way into a cache, aligned to the right like the window.

    Attributes:
        keys: [batch, KV heads, tokens, head_dim].
        values: alike.
        mass: attention received from probe rows, [batch, KV heads, tokens] float32; None where nobody asks.
        seen: by how many of them, [batch, tokens] float32.
    """

    keys: Tensor
    values: Tensor
    mass: Tensor | None = None
    seen: Tensor | None = None

    def __getitem__(self, slots: slice) -> "Tokens":
        mass, seen = self.mass, self.seen
        return Tokens(
            self.keys[:, :, slots],
            self.values[:, :, slots],
            None if mass is None else mass[:, :, slots],
            None if seen is None else seen[:, slots],
        )

    def __len__(self) -> int:
        return self.keys.shape[2]

    @classmethod
    def joined(cls, first: "Tokens", then: "Tokens") -> "Tokens":
        """One behind the other."""
        scores: tuple[Tensor | None, Tensor | None] = (None, None)
        if first.mass is not None and then.mass is not None and first.seen is not None and then.seen is not None:
            scores = torch.cat([first.mass, then.mass], 2), torch.cat([first.seen, then.seen], 1)
        keys, values = (
            torch.cat([a.to(b.dtype), b], 2) for a, b in ((first.keys, then.keys), (first.values, then.values))
        )
        return cls(keys, values, *scores)

    def add_scores(self, mass: Tensor, seen: Tensor) -> None:
        """Further probes have looked; both shaped as the attributes."""
        self.mass = mass if self.mass is None else self.mass + mass
        self.seen = seen if self.seen is None else self.seen + seen

    def gathered(self, order: Tensor) -> "Tokens":
        """Every sequence in an order of its own, ``order`` [batch, tokens]."""
        wide = order[:, None, :, None].expand(self.keys.shape)
        mass, seen = self.mass, self.seen
        return Tokens(
            self.keys.gather(2, wide),
            self.values.gather(2, wide),
            None if mass is None else mass.gather(2, order[:, None].expand(mass.shape)),
            None if seen is None else seen.gather(1, order),
        )


class Window:
    """A window over tensors shaped like ``key``.

    Args:
        bits: 8 or 16.
        key: [batch, KV heads, tokens, head_dim]; only its shape, device and dtype matter.
        scored: whether saliency is kept.
    """

    def __init__(self, bits: int, key: Tensor, scored: bool) -> None:
        self.bits, self.scored = bits, scored
        self.filled = 0
        batch, heads, _, self.width = key.shape
        self.first = torch.zeros(batch, dtype=torch.int64)  # on the CPU, where lengths are decided
        self.bounds = torch.zeros(batch, heads, 2, dtype=torch.int32, device=key.device)
        self.dtype = torch.int8 if bits == 8 else stored_dtype(key.dtype)
        self.keys, self.values = (self._room(key, 0) for _ in range(2))
        self.key_params, self.value_params = (self._params(0) if bits == 8 else None for _ in range(2))
        self.mass = key.new_zeros(batch, heads, 0, dtype=torch.float32) if scored else None
        self.seen = key.new_zeros(batch, 0, dtype=torch.float32) if scored else None

    def append(self, new: Tokens) -> bool:
        """Put tokens behind the others, all valid where the window isn't empty; returns whether the room was moved."""
        count = len(new)
        moved = self._grow(self.filled + count)
        slots = slice(self.filled, self.filled + count)
        for name, states in (("key", new.keys), ("value", new.values)):
            room, params = getattr(self, f"{name}s"), getattr(self, f"{name}_params")
            if params is None:
                room[:, :, slots] = states
            else:
                room[:, :, slots], params[:, :, slots] = kv_pack(states, 8)
        if self.mass is not None and self.seen is not None:
            self.mass[:, :, slots] = 0.0 if new.mass is None else new.mass
            self.seen[:, slots] = 0.0 if new.seen is None else new.seen
        self.filled += count
        self.bounds[..., 1] = self.filled
        return moved

    def begin_at(self, first: Tensor) -> None:
        """Where each sequence begins, [batch]."""
        self.first = first
        self.bounds[..., 0] = first.to(self.bounds)[:, None]

    def tokens(self) -> Tokens:
        """All of it, keys and values in float32."""
        slots = slice(0, self.filled)
        keys, values = (
            room[:, :, slots].float() if params is None else kv_unpack(room[:, :, slots], params[:, :, slots], 8)
            for room, params in ((self.keys, self.key_params), (self.values, self.value_params))
        )
        mass = None if self.mass is None else self.mass[:, :, slots]
        seen = None if self.seen is None else self.seen[:, slots]
        return Tokens(keys, values, mass, seen)

    def set_scores(self, tokens: Tokens) -> None:
        """Take the scores of as many tokens as there are."""
        if self.mass is not None and self.seen is not None and tokens.mass is not None and tokens.seen is not None:
            self.mass[:, :, : self.filled] = tokens.mass
            self.seen[:, : self.filled] = tokens.seen

    def drop(self, count: int) -> None:
        """Forget the first slots, and give back the room that isn't needed."""
        self._refit(slice(count, self.filled))
        self.begin_at((self.first - count).clamp(min=0))

    def cut(self, removed: Tensor) -> None:
        """Forget the last tokens, ``removed`` [batch] of each sequence, at most what it has."""
        if bool((removed == removed[0]).all()):
            self._refit(slice(0, self.filled - int(removed[0])))
            self.begin_at(self.first.clamp(max=self.filled))
            return
        slots = torch.arange(self.filled)
        order = (slots - removed[:, None]).clamp(min=0).to(self.keys.device)  # to the right, by what was behind them
        for name in ("keys", "values", "key_params", "value_params", "mass"):
            if (held := getattr(self, name)) is not None:
                own = order.view(len(order), 1, -1, *(1,) * (held.dim() - 3))
                kept = held[:, :, : self.filled]
                setattr(self, name, kept.gather(2, own.expand(kept.shape)))
        if self.seen is not None:
            self.seen = self.seen[:, : self.filled].gather(1, order)
        self.begin_at(self.first + removed)

    def change(self, change: Change) -> None:
        """Apply a function of the batch's dimension to every tensor."""
        for name in ("first", "bounds", "keys", "values", "key_params", "value_params", "mass", "seen"):
            if (held := getattr(self, name)) is not None:
                setattr(self, name, change(held))

    def segment(self) -> Segment:
        """For :func:`compress.kernels.segment_attention.segment_attention`."""
        return Segment(
            self.keys,
            self.values,
            self.bits,
            self.bits,
            self.key_params,
            self.value_params,
            None,
            None,
            self.bounds,
            self.keys.shape[2],  # not only what is filled now: the segment is kept while more is
        )

    def __len__(self) -> int:
        return self.filled

    def stored(self) -> KVBytes:
        """Bytes of the tokens that are held; allocated is counted elsewhere."""
        tokens = int((self.filled - self.first).sum())
        heads = self.keys.shape[1]
        payload = 2 * tokens * heads * self.width * self.bits // 8
        params = 4 * tokens * heads if self.bits == 8 else 0
        scores = 4 * tokens * (heads + 1) if self.scored else 0
        return KVBytes(payload, payload + params + scores, 0)

    def _grow(self, slots: int) -> bool:
        if slots <= self.keys.shape[2]:
            return False
        self._refit(slice(0, self.filled), -(-slots // STEP) * STEP)
        return True

    def _refit(self, kept: slice, room: int | None = None) -> None:
        """Move some slots to the front of new room."""
        count = kept.stop - kept.start
        room = -(-count // STEP) * STEP if room is None else room
        for name in ("keys", "values", "key_params", "value_params", "mass"):
            if (held := getattr(self, name)) is not None:
                new = held.new_zeros(*held.shape[:2], room, *held.shape[3:])
                new[:, :, :count] = held[:, :, kept]
                setattr(self, name, new)
        if self.seen is not None:
            seen = self.seen.new_zeros(len(self.seen), room)
            seen[:, :count] = self.seen[:, kept]
            self.seen = seen
        self.filled = count
        self.bounds[..., 1] = count

    def _room(self, key: Tensor, slots: int) -> Tensor:
        return torch.zeros(*key.shape[:2], slots, self.width, dtype=self.dtype, device=key.device)

    def _params(self, slots: int) -> Tensor:
        return torch.zeros(*self.bounds.shape[:2], slots, 1, dtype=torch.float16, device=self.bounds.device)


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """The 16-bit type in which states of a type are kept."""
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float16
