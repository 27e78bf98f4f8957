"""KV heads whose tokens are kept as they come: all of them, or the first ones and a window (arXiv 2309.17453).

A head with a window keeps ``sink`` first tokens in slots of their own and the newest ``span(N)`` tokens in a ring
behind them, where a new token takes the oldest one's slot. Keys carry their absolute positions. An elastic head's ring
grows with the text, ``span(N) = a + b N``, and no token is needed back: what a longer text doesn't see any more was
let go, and where the span grows the ring waits until it is full again. A strided head (arXiv 2407.17678) keeps blocks
at a fixed distance of what leaves the ring, before its sinks, the newest first: what is held is one stretch of slots,
however many of each there are, and heads of any kind attend in one call.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from compress.evalsuite.efficiency import allocated
from compress.kernels.flash_prefill import flash_prefill
from compress.kernels.ragged_decode import Cluster
from compress.kernels.segment_attention import Segment
from compress.kv.arena import Change
from compress.kv.bytes import KVBytes
from compress.kv.masked import masked_attention
from compress.kv.part import Call
from compress.kv.reader import Reader
from compress.kv.room import STEP, Room
from compress.kv.window import Tokens
from compress.plan import BLOCK, Stride, Window


@dataclass(frozen=True)
class Reach:
    """What some heads see.

    Attributes:
        sink: first tokens.
        window: how far back.
        stride: further blocks.
        length: tokens that the window is made for, prompt and answer together; None lets it grow with the text.
    """

    sink: int
    window: Window
    stride: Stride | None = None
    length: int | None = None

    def span(self, length: int) -> int | None:
        """Newest tokens that are seen at a length; None for all."""
        return None if self.window.full else max(1, self.window.span(self.length or length))

    @property
    def whole(self) -> float:
        """Up to how many tokens it is certain that all are seen."""
        if self.window.full:
            return math.inf
        window = self.window
        grows = self.length is None and window.b < 1 and window.max is None
        return max(self.sink + (self.span(0) or 0), (self.sink + window.a) / (1 - window.b) if grows else 0)

    def drops(self, length: int) -> bool:
        """Whether some of so many tokens aren't seen."""
        span = self.span(length)
        return span is not None and self.sink + span < length

    def strided(self, places: Tensor) -> Tensor:
        """Whether tokens at these places are in a block that is kept."""
        if self.stride is None:
            return torch.zeros_like(places, dtype=torch.bool)
        return (places // BLOCK - self.stride.phase) % self.stride.every == 0


class PlainPart:
    """See the module's text, and :class:`compress.kv.part.Part`.

    Args:
        reach: what its heads see.
    """

    joins = True  # one call can attend for its heads and others

    def __init__(self, reach: Reach) -> None:
        self.reach = reach
        self.reader = Reader()
        self.ring = reach.span(0)
        self._whole = reach.whole  # asked for every token
        self.counts = self.base = torch.zeros(0, dtype=torch.int64)
        self._even: tuple[int, int] | None = None  # counts and base where all sequences have the same

    def fresh(self) -> "PlainPart":
        """See :class:`compress.kv.part.Part`."""
        return PlainPart(self.reach)

    def begin(self, key: Tensor) -> None:
        """See :class:`compress.kv.part.Part`."""
        self.near, self.front = Room(key), 0  # slots before the sinks
        self.counts = torch.zeros(len(key), dtype=torch.int64)  # tokens that came
        self.base = torch.full_like(self.counts, self.reach.sink)  # token in the ring's first slot, at its first turn
        self.far_counts = torch.zeros_like(self.counts)
        self.far_places = torch.zeros(len(key), 0, dtype=torch.int64)

    def drops(self, length: int) -> bool:
        """Whether its heads don't see all of so many tokens."""
        return length > self._whole and self.reach.drops(length)

    @property
    def croppable(self) -> bool:
        """Whether nothing was dropped yet."""
        return self.ring is None or not bool(self._turned().any())

    def step(self, query: Tensor, new: Tokens, scaling: float) -> Tensor:
        """See :class:`compress.kv.part.Part`."""
        self.append(new)
        out, _ = self.reader.read(query, self._segments, scaling)
        return out.to(new.values.dtype)

    def cluster(self, heads: tuple[int, ...]) -> Cluster:
        """For :func:`compress.kernels.ragged_decode.ragged_decode`; ``heads`` are the layer's."""
        room = self.near
        return Cluster(room.keys, room.values, heads, room.bounds, room.keys.shape[2])

    def chunk(self, query: Tensor, new: Tokens, call: Call) -> Tensor:
        """See :class:`compress.kv.part.Part`; each row sees exactly its sink and window."""
        held, places = self._joined(new, call)
        begin = (places < 0).sum(1)
        span = self.reach.span(int(places.max()) + 1)
        if self.reach.stride is not None and span is not None:
            rows = places[:, -query.shape[2] :]
            seen = partial(self._seen, places=places, span=span)
            out = masked_attention(query, held, rows, seen, call.scaling)
        else:
            bounds = torch.stack([begin, torch.full_like(begin, len(held))], 1) if bool(begin.any()) else None
            reach = None if span is None or span >= len(held) else torch.tensor([[self.reach.sink, span]])
            if reach is not None:
                reach = reach.expand(held.keys.shape[1], 2).contiguous()
            own = (x if x is None else x.to(query.device) for x in (bounds, reach))
            out, _ = flash_prefill(query, held.keys, held.values, call.scaling, *own)
        self._hold(held, places)
        return out

    def keep(self, new: Tokens, call: Call) -> None:
        """See :class:`compress.kv.part.Part`."""
        self._hold(*self._joined(new, call))

    def tokens(self) -> Tokens:
        """All tokens in their order, where no head drops one and every sequence holds equally many."""
        assert self.ring is None
        slots = slice(0, int(self.counts[0]))
        return Tokens(self.near.keys[:, :, slots], self.near.values[:, :, slots])

    def crop(self, removed: Tensor) -> None:
        """See :class:`compress.kv.part.Part`."""
        self.counts = self.counts - removed
        self.near.end_at((self.front + self.counts).tolist())
        self._look()

    def change(self, change: Change) -> None:
        """See :class:`compress.kv.part.Part`."""
        self.near.change(change)
        for name in ("counts", "base", "far_counts", "far_places"):
            setattr(self, name, change(getattr(self, name)))
        self._look()

    def nbytes(self) -> KVBytes:
        """See :class:`compress.kv.part.Part`."""
        payload = self.near.payload()
        own = (self.near, self.counts, self.base, self.far_counts, self.far_places)
        return KVBytes(payload, payload, allocated(own).nbytes)

    def _segments(self) -> list[Segment]:
        return [self.near.segment()]

    def _turned(self) -> Tensor:
        """Which sequences have dropped tokens, [batch]."""
        assert self.ring is not None
        return (self.counts - self.base > self.ring) | (self.base > self.reach.sink)

    def append(self, new: Tokens) -> None:
        """Keep one token of every sequence."""
        if self._even is not None:
            self._append_evenly(new, *self._even)
            return
        span = self.reach.span(int(self.counts.max()) + 1)
        if span is not None and span != self.ring:
            self._widen(span)
        sink, place = self.reach.sink, self.counts
        slots = place
        if self.ring is not None:
            if self.reach.stride is not None:
                self._move_on()
            slots = torch.where(place < sink, place, sink + (place - self.base).clamp(min=0) % max(self.ring, 1))
        slots = self.front + slots
        self._reserve(int(slots.max()) + 1)
        self.near.write(slots.tolist(), new.keys, new.values)
        self.counts = place + 1
        self.near.end_at(self._ends().tolist())

    def _append_evenly(self, new: Tokens, count: int, base: int) -> None:
        """The same where all sequences hold equally many tokens, in numbers instead of tensors."""
        sink, ring = self.reach.sink, self.reach.span(count + 1)
        if ring is not None and ring != self.ring:
            self._widen(ring)
            base = int(self.base[0])
        slot = count if ring is None or count < sink else sink + max(0, count - base) % ring
        self._reserve(slot + 1)
        self.near.write([slot], new.keys, new.values)
        count += 1
        self.near.end_at([count if ring is None or count <= base else sink + min(count - base, ring)])
        self._even = count, base
        self.counts.add_(1)

    def _reserve(self, slots: int) -> None:
        if self.near.reserve(slots, None if self.ring is None else self.front + self.reach.sink + self.ring):
            self.reader.forget()

    def _ends(self) -> Tensor:
        """One past the last filled slot of every sequence."""
        if self.ring is None:
            return self.front + self.counts
        ring = (self.counts - self.base).clamp(min=0, max=self.ring)
        return self.front + torch.where(self.counts < self.base, self.counts, self.reach.sink + ring)

    def _widen(self, span: int) -> None:
        """A longer ring, whose first slot has the oldest token."""
        if bool(self._turned().any()):
            places = self._places()
            self._refill(*self._sorted(Tokens(self.near.keys, self.near.values), places), self._oldest())
        self.ring = span

    def _move_on(self) -> None:
        """Put what the next token will take the slot of before the sinks, where its block is kept."""
        assert self.ring is not None
        leaves = self.counts - self.ring
        kept = (self.counts - self.base >= self.ring) & self.reach.strided(leaves)
        if not bool(kept.any()):
            return
        if int(self.far_counts.max()) == self.front:
            self.near.grow_in_front(STEP)
            self.front += STEP
            self.far_places = torch.nn.functional.pad(self.far_places, (0, self.front - self.far_places.shape[1]))
            self.reader.forget()
        slots = self.front + self.reach.sink + (leaves - self.base).clamp(min=0) % self.ring
        rows = torch.arange(len(slots), device=self.near.keys.device)
        places = slots.to(rows.device)
        keys, values = (x[rows, :, places][:, :, None] for x in (self.near.keys, self.near.values))
        # where nothing is kept, a slot that isn't filled is written
        self.near.write((self.front - 1 - self.far_counts).tolist(), keys, values)
        self.far_places[torch.arange(len(slots)), self.far_counts] = leaves
        self.far_counts = self.far_counts + kept
        self.near.begin_at((self.front - self.far_counts).tolist())

    def _places(self) -> Tensor:
        """Which token is in every slot, [batch, slots]; -1 for none."""
        slots = torch.arange(self.near.keys.shape[2] - self.front).expand(len(self.counts), -1)
        if not self.front:
            return self._near_places(slots)
        far = torch.arange(self.front)
        before = torch.where(far < self.far_counts[:, None], self.far_places[:, : self.front], -1)
        return torch.cat([before.flip(1), self._near_places(slots)], 1)

    def _near_places(self, slots: Tensor) -> Tensor:
        """Which token is in each of these slots, [batch, slots], from the sinks on."""
        sink = self.reach.sink
        counts, base = self.counts[:, None], self.base[:, None]
        if self.ring is None:
            return torch.where(slots < counts, slots, -1)
        ring, turn = slots - sink, max(self.ring, 1)
        place = base + ring + (counts - 1 - base - ring).div(turn, rounding_mode="floor") * turn
        place = torch.where((place >= base) & (ring >= 0) & (ring < self.ring), place, -1)
        return torch.where(slots < sink, torch.where(slots < counts, slots, -1), place)

    def _joined(self, new: Tokens, call: Call) -> tuple[Tokens, Tensor]:
        """All that is held and new tokens, in the order of their places, and these, [batch, tokens]; -1 for none."""
        arrived = torch.arange(len(new)) - call.first[:, None]
        arrived = torch.where(arrived < 0, -1, arrived + self.counts[:, None])
        if call.alone:
            return new, arrived
        held = Tokens.joined(Tokens(self.near.keys, self.near.values), new)
        places = torch.cat([self._places(), arrived], 1)
        return self._sorted(held, places, len(new))

    @staticmethod
    def _sorted(held: Tokens, places: Tensor, least: int = 1) -> tuple[Tokens, Tensor]:
        """In the order of their places, none of them first, and as few as the longest sequence or ``least`` asks."""
        count = max(least, int((places >= 0).sum(1).max()))
        order = places.argsort(dim=1, stable=True)[:, -count:]
        return Tokens(*_both(held, order)), places.gather(1, order)

    def _oldest(self) -> Tensor:
        """The first token of every sequence's ring, or what it will be."""
        assert self.ring is not None
        return (self.counts - (self.counts - self.base).clamp(min=0, max=self.ring)).clamp(min=self.reach.sink)

    def _hold(self, held: Tokens, places: Tensor) -> None:
        """Keep of these tokens what later ones will see."""
        counts = torch.maximum(self.counts, places.max(1).values + 1)
        span = self.reach.span(int(counts.max()))
        oldest = None if span is None else torch.maximum(self._oldest(), counts - span)
        self.counts, self.ring = counts, span
        self._refill(held, places, oldest)

    def _refill(self, held: Tokens, places: Tensor, oldest: Tensor | None) -> None:
        """The room from tokens in the order of their places: sinks and what follows ``oldest``; None: all."""
        total, absent = places.shape[1], (places < 0).sum(1)
        if oldest is None:
            ends = self.counts
            order = torch.arange(int(ends.max())) + absent[:, None]
        else:
            self.base = oldest
            sinks = self.counts.clamp(max=self.reach.sink)[:, None]
            ends = sinks[:, 0] + (self.counts - oldest).clamp(min=0)
            slots = torch.arange(int(ends.max()))
            order = torch.where(slots < sinks, slots + absent[:, None], total - ends[:, None] + slots)
            if self.reach.stride is not None:
                far = self._kept_far(places)
                order, ends = torch.cat([far.flip(1), order], 1), ends + self.front
        self.near.fill(*_both(held, order.clamp(max=total - 1)), ends.tolist())
        if self.reach.stride is not None:
            self.near.begin_at((self.front - self.far_counts).tolist())
        self._look()

    def _look(self) -> None:
        """Tensors were exchanged, or cut."""
        self.reader.forget()
        pairs = set(zip(self.counts.tolist(), self.base.tolist(), strict=True))
        self._even = next(iter(pairs)) if len(pairs) == 1 and self.reach.stride is None else None

    def _kept_far(self, places: Tensor) -> Tensor:
        """Which of these tokens are kept by the stride, in their order, [batch, most of a sequence]."""
        kept = (places >= self.reach.sink) & (places < self.base[:, None]) & self.reach.strided(places)
        self.far_counts = kept.sum(1)
        self.front = int(self.far_counts.max())
        order = (~kept).to(torch.int8).argsort(dim=1, stable=True)[:, : self.front]
        self.far_places = places.gather(1, order)
        return order

    def _seen(self, rows: Tensor, places: Tensor, span: int) -> Tensor:
        """What rows at some places see of tokens at others, [batch, rows, tokens] bool."""
        row, there = rows[..., None], places[:, None]
        near = (there < self.reach.sink) | (there > row - span)
        return (near | self.reach.strided(there)) & (there >= 0) & (there <= row)


def _both(held: Tokens, order: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values in an order, [batch, tokens] on the CPU; views where it is one stretch for all."""
    first = order[0]
    if bool((order == first).all()):
        begin, count = int(first[0]) if len(first) else 0, len(first)
        if bool((first == torch.arange(begin, begin + count)).all()):
            return held.keys[:, :, begin : begin + count], held.values[:, :, begin : begin + count]
        chosen = first.to(held.keys.device)
        return held.keys[:, :, chosen], held.values[:, :, chosen]
    wide = order.to(held.keys.device)[:, None, :, None]
    wide = wide.expand(-1, held.keys.shape[1], -1, held.keys.shape[3])
    return held.keys.gather(2, wide), held.values.gather(2, wide)
