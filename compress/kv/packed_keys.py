"""Packed keys, as a search reads them: by their places in the text, and no more of them than it looks at."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from compress.kernels.chunk_scores import descend
from compress.kernels.kv_pack import kv_unpack
from compress.kv.arena import Arena, Epoch, Place
from compress.kv.store import Store

EVERYTHING = Place(slice(None), slice(None))


@dataclass(frozen=True)
class Classed:
    """Where packed tokens lie.

    Attributes:
        salient: of every packed token, [batch, KV heads, tokens] bool, whether it is in the first class.
        slots: its slot in its class, alike, int64.
    """

    salient: Tensor
    slots: Tensor


class PackedKeys:
    """Keys of a store [batch, KV heads, tokens, head_dim] at their places: sinks first, then what is packed, in order.

    They are those that are stored: turned where the cache turns them. Places that aren't held have any key.

    Args:
        store: what is held.
        length: tokens, those in the window among them.
    """

    def __init__(self, store: Store, length: int) -> None:
        self.store = store
        self.shape = (store.batch, store.heads, length, store.width)
        self.device = store.device

    @cached_property
    def sinks(self) -> Tensor:
        """Tokens that lie before the packed ones, [batch, KV heads] int64."""
        held = self.store.sinks
        counts = torch.zeros(self.store.batch, self.store.heads) if held is None else held.counts
        return counts.to(self.device, torch.int64)

    @cached_property
    def packed(self) -> Tensor:
        """Packed tokens, [batch, KV heads] int64."""
        return self.store.packed().to(self.device, torch.int64)

    @cached_property
    def classed(self) -> Classed:
        """Of all packed tokens."""
        count = int(self.store.packed().max())
        if self.store.labels is None:
            every = torch.arange(count, device=self.device).expand(self.store.batch, self.store.heads, count)
            return Classed(torch.ones_like(every, dtype=torch.bool), every)
        salient = self.store.labels.read(EVERYTHING, count)
        slots = torch.where(salient, salient.cumsum(2), (~salient).cumsum(2)) - 1
        return Classed(salient, slots)

    @property
    def classes(self) -> Iterator[tuple[bool, Arena]]:
        """The store's arenas, and whether their tokens are those that `Classed` calls salient."""
        for name, arena in self.store.arenas.items():
            yield name == "high" or self.store.labels is None, arena

    def span(self, first: int, end: int) -> Tensor:
        """Keys at consecutive places, [batch, KV heads, end - first, head_dim] float32."""
        batch, heads, length, width = self.shape
        rows = torch.arange(batch * heads, device=self.device)[:, None] * length
        return self.read((rows + torch.arange(first, end, device=self.device)).flatten()).view(batch, heads, -1, width)

    def scores(self, q: Tensor, base: Tensor, starts: Tensor, ends: Tensor, chunk: int) -> Tensor:
        """As :func:`compress.kernels.chunk_scores.chunk_scores`, over all sequences and heads side by side."""
        return descend(q, self.read, base, starts, ends, chunk)

    def read(self, places: Tensor) -> Tensor:
        """Keys at places ``(sequence * KV heads + head) * tokens + place`` [n], as [n, head_dim] float32."""
        row, place = places // self.shape[2], places % self.shape[2]
        index = place - self.sinks.flatten()[row]
        out = torch.empty(len(places), self.shape[3], device=self.device)
        self._read_sinks(out, row, place, index)
        classed = self.classed
        if not classed.slots.shape[2]:
            return out
        inside = index.clamp(0, classed.slots.shape[2] - 1)
        salient, slots = (part.flatten(0, 1)[row, inside] for part in (classed.salient, classed.slots))
        there = (index >= 0) & (index < self.packed.flatten()[row])
        for first, arena in self.classes:
            chosen = ((salient == first) & there).nonzero().flatten()
            if len(chosen):
                out[chosen] = _unpacked(arena, row[chosen], slots[chosen])
        return out

    def _read_sinks(self, out: Tensor, row: Tensor, place: Tensor, index: Tensor) -> None:
        chosen = (index < 0).nonzero().flatten()
        if self.store.sinks is not None and len(chosen):
            out[chosen] = self.store.sinks.keys.flatten(0, 1)[row[chosen], place[chosen]].float()


def _unpacked(arena: Arena, row: Tensor, slots: Tensor) -> Tensor:
    """Keys [n, head_dim] float32 in slots of sequences and heads, both [n]."""
    assert arena.keys is not None
    codes, params = (
        None if room is None else room.flatten(0, 1)[row, slots][None, None] for room in (arena.keys, arena.key_params)
    )
    assert codes is not None
    plain = kv_unpack(codes, params, arena.widths.key_bits)[0, 0]
    epochs = arena.epochs
    if epochs[0].channels.keys is None:
        return plain
    if len(epochs) == 1:
        scale, middle = _vectors(epochs[0])[row].unbind(1)
        return plain * scale + middle
    ends = torch.stack([epoch.bounds[..., 1].flatten() for epoch in epochs], 1)  # [rows, epochs]
    which = (slots[:, None] >= ends[row]).sum(1).clamp(max=len(epochs) - 1)
    scale, middle = torch.stack([_vectors(epoch) for epoch in epochs])[which, row].unbind(1)
    return plain * scale + middle


def _vectors(epoch: Epoch) -> Tensor:
    """Steps and middles of keys, [rows, 2, head_dim] float32."""
    assert epoch.channels.keys is not None
    return epoch.channels.keys.flatten(0, 1).float()
