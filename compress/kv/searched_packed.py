"""Packed KV heads that attend sinks, a window, and blocks that are searched for among the packed keys.

A prompt that comes at once attends in full precision, so its lists are found among keys as they come; a further chunk
attends all that is packed. For a new token the search reads packed keys at their places (``packed_keys.py``). What it
lists is copied, code by code, in one piece for each class of tokens; sinks and window are attended where they lie,
since a class is filled in the order of its tokens.
"""

import torch
from torch import Tensor

from compress.evalsuite.efficiency import allocated
from compress.kernels.block_attention import block_attention
from compress.kernels.flash_prefill import flash_prefill
from compress.kernels.segment_attention import Segment
from compress.kv.arena import Arena, Change, Epoch
from compress.kv.bytes import KVBytes
from compress.kv.packed import PackedFormat, PackedPart
from compress.kv.packed_keys import PackedKeys
from compress.kv.part import Call
from compress.kv.window import Tokens
from compress.sparse.finder import Finder
from compress.sparse.found import Found


class SearchedPackedPart(PackedPart):
    """See the module's text, and :class:`compress.kv.part.Part`.

    Args:
        format: how tokens are kept.
        finder: the policy; its window holds at least what isn't packed yet, its sinks those of the store.
        sink: first tokens that are attended anyway.
    """

    def __init__(self, format: PackedFormat, finder: Finder, sink: int) -> None:
        super().__init__(format)
        self.finder, self.sink = finder, sink
        self._found: Found | None = None
        self._listed: list[Segment] = []

    def fresh(self) -> "SearchedPackedPart":
        """See :class:`compress.kv.part.Part`."""
        return SearchedPackedPart(self.format, self.finder, self.sink)

    def read(self, query: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        """See :class:`compress.kv.packed.PackedPart`; the query is a new token's, which isn't held yet."""
        ends = self._held() + 1
        length = int(ends.max())
        if length <= self.finder.gate:
            self._forget()
            return super().read(query, scaling)
        keys = PackedKeys(self.store, length)
        found = self.finder.token(query, keys, keys, ends.to(query.device), self._found)
        assert found is not None  # a policy that has to see earlier queries isn't run over packed keys
        self._found = found
        if found.fresh:
            self._listed = list(_listed(keys, found))
            self.reader.forget()
        return super().read(query, scaling)

    def crop(self, removed: Tensor) -> None:
        """See :class:`compress.kv.part.Part`."""
        super().crop(removed)
        self._forget()

    def change(self, change: Change) -> None:
        """See :class:`compress.kv.part.Part`."""
        super().change(change)
        self._forget()

    def nbytes(self) -> KVBytes:
        """See :class:`compress.kv.part.Part`; copies, and what a policy keeps of blocks, are room, not payload."""
        own = super().nbytes()
        return KVBytes(own.payload, own.stored, allocated((self.window, self.store, self._listed, self._found)).nbytes)

    def _take(self, new: Tokens, first: Tensor) -> None:
        self._forget()
        super()._take(new, first)

    def _attended(self, query: Tensor, new: Tokens, call: Call) -> Tensor:
        if len(new) <= self.finder.gate:
            return super()._attended(query, new, call)
        if not call.ragged:
            return self._sparse(query, new, call.scaling)
        out = torch.zeros_like(query)
        for b, first in enumerate(call.first.tolist()):
            own = Tokens(new.keys[b : b + 1, :, first:], new.values[b : b + 1, :, first:])
            out[b : b + 1, :, first:] = self._sparse(query[b : b + 1, :, first:], own, call.scaling)
        return out

    def _sparse(self, query: Tensor, new: Tokens, scaling: float) -> Tensor:
        if len(new) <= self.finder.gate:
            return flash_prefill(query, new.keys, new.values, scaling)[0]
        blocks = self.finder.prompt(query, new.keys, new.values, len(new))
        assert blocks is not None  # all queries are there
        return block_attention(query, new.keys, new.values, blocks, scaling)[0]

    def _held(self) -> Tensor:
        """Tokens of every sequence [batch]."""
        sinks = self.store.sinks
        packed = self.store.packed()[:, 0]
        return packed + (0 if sinks is None else sinks.counts[:, 0]) + len(self.window) - self.window.first

    def _segments(self) -> list[Segment]:
        if self._found is None:
            return super()._segments()
        sinks = self.store.sinks
        near = [] if sinks is None or not int(sinks.counts.max()) else [sinks.segment()]
        keys = PackedKeys(self.store, int(self._held().max()))
        return [*near, *_outer(keys, self._found, self.sink), *self._listed, self.window.segment()]

    def _forget(self) -> None:
        """The tokens are others: the next one searches everywhere."""
        if self._found is not None:
            self._found, self._listed = None, []
            self.reader.forget()


def _outer(keys: PackedKeys, found: Found, sink: int) -> list[Segment]:
    """Packed tokens among the first ``sink`` and in the window: in every class the first and the last ones."""
    index, held = torch.arange(keys.classed.slots.shape[2], device=keys.device), keys.packed[..., None]
    before = (index < (sink - keys.sinks)[..., None]) & (index < held)
    near = found.near[:, None].clamp(min=sink) - keys.sinks
    earlier = (index < near[..., None]) & (index < held)
    segments = []
    for first, arena in keys.classes:
        own = keys.classed.salient == first
        head, tail = ((own & part).sum(2) for part in (before, earlier))
        for epoch in arena.epochs:
            begin, end = epoch.bounds.long().unbind(2)
            for low, high in ((begin, torch.minimum(end, head)), (torch.maximum(begin, tail), end)):
                bounds = torch.stack([low, torch.maximum(low, high)], 2)
                if longest := int((bounds[..., 1] - bounds[..., 0]).max()):
                    segments.append(_segment(arena, epoch, bounds.to(torch.int32), longest))
    return segments


def _listed(keys: PackedKeys, found: Found) -> list[Segment]:
    """Copies of the listed tokens, by class and channel vectors."""
    blocks, classed = found.blocks, keys.classed
    if not classed.slots.shape[2]:
        return []
    places = blocks.starts[:, :, 0, :, None] + torch.arange(blocks.block_k, device=keys.device)
    valid = torch.arange(blocks.most, device=keys.device) < blocks.counts[:, :, 0, None]
    index = places.flatten(2).long() - keys.sinks[..., None]
    there = valid.repeat_interleave(blocks.block_k, 2) & (index >= 0) & (index < keys.packed[..., None])
    inside = index.clamp(0, classed.slots.shape[2] - 1)
    salient, slots = classed.salient.gather(2, inside), classed.slots.gather(2, inside)
    segments = []
    for first, arena in keys.classes:
        for epoch in arena.epochs:
            own = there & (salient == first) & (slots >= epoch.bounds[..., :1]) & (slots < epoch.bounds[..., 1:])
            counts = own.sum(2)
            if longest := int(counts.max()):
                order = (~own).to(torch.int8).argsort(dim=2, stable=True)[..., :longest]
                room = int(arena.counts.max())  # behind a head's own tokens come others, which may be in no slot here
                chosen = slots.gather(2, order).clamp(0, room - 1)
                bounds = torch.stack([torch.zeros_like(counts), counts], 2).to(torch.int32)
                segments.append(_segment(_copied(arena, chosen), epoch, bounds, longest))
    return segments


def _copied(arena: Arena, slots: Tensor) -> Arena:
    """An arena of some of its slots, [batch, KV heads, n]."""
    batch, heads, _ = slots.shape
    copy = Arena(arena.widths, batch, heads, arena.device)
    for name in ("keys", "values", "key_params", "value_params"):
        if (room := getattr(arena, name)) is not None:
            setattr(copy, name, room.gather(2, slots[..., None].expand(-1, -1, -1, room.shape[3])))
    return copy


def _segment(arena: Arena, epoch: Epoch, bounds: Tensor, longest: int) -> Segment:
    assert arena.keys is not None
    assert arena.values is not None
    channels = epoch.channels
    return Segment(
        arena.keys,
        arena.values,
        arena.widths.key_bits,
        arena.widths.value_bits,
        arena.key_params,
        arena.value_params,
        channels.keys,
        channels.values,
        bounds,
        longest,
    )
