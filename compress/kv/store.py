"""What a layer keeps of the tokens that left its window: sinks, salient tokens, the others, and which is which."""

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.kernels.kv_pack import kv_pack, kv_unpack
from compress.kernels.segment_attention import Segment
from compress.kv import channels
from compress.kv.arena import Arena, Change, Channels, Place, Widths
from compress.kv.labels import Labels
from compress.kv.saliency import salient
from compress.kv.sinks import Sinks
from compress.kv.window import Tokens
from compress.plan import KVBits, Packing

DRIFT = 1.5  # a block whose error is so many times that of an epoch's first block begins another epoch
SAMPLE = 64  # tokens of a place by which that is judged
LEAST = 16  # tokens that a place must bring to be judged by


@dataclass
class _Block:
    """Tokens of one place that are packed together: [rows, heads, tokens, head_dim], and who is salient."""

    place: Place
    keys: Tensor
    values: Tensor
    chosen: Tensor


class Store:
    """The packed part of a layer's cache.

    Args:
        packing: what holds for the whole cache.
        bits: of this layer.
        key: [batch, KV heads, tokens, head_dim]; only its shape, device and dtype matter.
    """

    def __init__(self, packing: Packing, bits: KVBits, key: Tensor) -> None:
        self.packing, self.bits = packing, bits
        batch, heads, _, self.width = key.shape
        self.batch, self.heads, self.device = batch, heads, key.device
        self.sinks = Sinks(packing.sinks, key) if packing.sinks else None
        by_token = packing.key_scheme == "token"
        shares = {"high": bits.ratio, "low": 1 - bits.ratio}
        self.arenas = {
            name: Arena(Widths(*width, packing.clip and min(width) == 2, by_token), batch, heads, key.device)
            for name, width in (("high", bits.high), ("low", bits.low))
            if shares[name] > 0
        }
        self.labels = Labels(batch, heads, key.device) if len(self.arenas) == 2 else None
        self.error: float | None = None  # of the first tokens of the epoch that were enough to judge by

    @property
    def begun(self) -> bool:
        """Whether anything was packed."""
        return any(arena.epochs for arena in self.arenas.values())

    def packed(self) -> Tensor:
        """Packed tokens of every sequence and head, [batch, KV heads] int32."""
        return torch.stack([arena.counts for arena in self.arenas.values()]).sum(0, dtype=torch.int32)

    def segments(self) -> list[Segment]:
        """All of it, for attention."""
        parts = [segment for arena in self.arenas.values() for segment in arena.segments()]
        if self.sinks is not None and int(self.sinks.counts.max()):
            parts.append(self.sinks.segment())
        return parts

    def pack(self, tokens: Tokens, first: Tensor) -> None:
        """Take in tokens; sequence b begins at slot ``first[b]``.

        Raises:
            ValueError: a key or value that isn't finite.
        """
        # one sum each: a NaN or an infinity stays in it, and finite states of a model can't add up to one in float32
        if not all(bool(states.sum(dtype=torch.float32).isfinite()) for states in (tokens.keys, tokens.values)):
            raise ValueError("keys or values of the model aren't finite (NaN or infinity), so they can't be packed")
        blocks = [
            block for place, start in self._places(first) if (block := self._block(place, tokens[start:])) is not None
        ]
        if not blocks:
            return
        opened = self._opens(blocks)
        if opened:
            self._begin()
        for name, arena in self.arenas.items():
            most = max(self._after(arena, block, name == "high") for block in blocks)
            arena.reserve(most, self.width)
        for block in blocks:
            self._append(block)
        if opened or self.error is None:
            self.error = self._error(blocks)

    def crop(self, removed: Tensor) -> None:
        """Forget the last packed tokens, ``removed`` [batch] of each sequence, and sinks behind them."""
        if not int(removed.max()):
            return
        packed = self.packed()
        wanted = removed[:, None].to(torch.int32).expand(packed.shape)
        dropped = torch.minimum(wanted, packed)
        if self.sinks is not None:
            self.sinks.crop((self.sinks.counts - (wanted - dropped)).clamp(min=0))
        left = packed - dropped
        if self.labels is None:
            for arena in self.arenas.values():
                arena.crop(left)
            return
        high = torch.zeros_like(left)
        for row in range(self.batch):
            for head in range(self.heads):
                place = Place(slice(row, row + 1), slice(head, head + 1))
                high[row, head] = int(self.labels.read(place, int(left[row, head])).sum())
        self.arenas["high"].crop(high)
        self.arenas["low"].crop(left - high)

    def unpacked(self, row: int, head: int) -> tuple[Tensor, Tensor]:
        """Keys and values [tokens, head_dim] float32 of one head in the order of the tokens, sinks first."""
        count = int(self.packed()[row, head])
        keys, values = (torch.empty(count, self.width, device=self.device) for _ in range(2))
        place = Place(slice(row, row + 1), slice(head, head + 1))
        high = torch.ones(count, dtype=torch.bool) if self.labels is None else self.labels.read(place, count)[0, 0]
        for name, arena in self.arenas.items():
            if not int(arena.counts[row, head]):
                continue
            chosen = high if name == "high" or self.labels is None else ~high
            keys[chosen], values[chosen] = arena.unpacked(row, head)
        if self.sinks is None:
            return keys, values
        held = slice(0, int(self.sinks.counts[row, head]))
        sink_keys, sink_values = (x[row, head, held].float() for x in (self.sinks.keys, self.sinks.values))
        return torch.cat([sink_keys, keys]), torch.cat([sink_values, values])

    def tokens(self) -> Tokens:
        """All of it in the order of the tokens, sinks first, [batch, KV heads, tokens, head_dim] float32.

        Every sequence and head must hold equally many.
        """
        count = int(self.packed().max())
        parts = [arena.everything(self.width) for arena in self.arenas.values()]
        keys, values = (torch.cat(states, 2) for states in zip(*parts, strict=True))
        if self.labels is not None:  # salient tokens lie in front, in their order, the others behind all of their room
            high = self.labels.read(Place(slice(None), slice(None)), count)
            behind = parts[0][0].shape[2] + (~high).cumsum(2)
            slots = (torch.where(high, high.cumsum(2), behind) - 1)[..., None].expand(-1, -1, -1, self.width)
            keys, values = keys.gather(2, slots), values.gather(2, slots)
        held = Tokens(keys[:, :, :count], values[:, :, :count])
        if self.sinks is None:
            return held
        sinks = slice(0, int(self.sinks.counts.max()))
        return Tokens.joined(Tokens(self.sinks.keys[:, :, sinks], self.sinks.values[:, :, sinks]), held)

    def change(self, change: Change) -> None:
        """Apply a function of the batch's dimension to every tensor."""
        changed: dict[int, Tensor] = {}

        def once(vectors: Tensor) -> Tensor:  # which classes share
            if id(vectors) not in changed:
                changed[id(vectors)] = change(vectors)
            return changed[id(vectors)]

        for arena in self.arenas.values():
            arena.change(change, once)
        for part in (self.labels, self.sinks):
            if part is not None:
                part.change(change)
        self.batch = len(self.packed())

    def payload(self) -> int:
        """Bytes of codes and sinks."""
        return sum(arena.payload(self.width) for arena in self.arenas.values()) + (
            0 if self.sinks is None else self.sinks.payload()
        )

    def overhead(self) -> int:
        """Bytes of parameters, channel vectors and labels."""
        vectors = {
            id(held): held.nbytes
            for arena in self.arenas.values()
            for epoch in arena.epochs
            for held in (epoch.channels.keys, epoch.channels.values)
            if held is not None
        }
        labels = 0 if self.labels is None else -(-int(self.packed().sum()) // 8)
        return sum(arena.overhead() for arena in self.arenas.values()) + sum(vectors.values()) + labels

    def _places(self, first: Tensor) -> list[tuple[Place, int]]:
        """What can be packed at once, and the slot where its tokens begin."""
        counts = [arena.counts for arena in self.arenas.values()]
        counts += [] if self.sinks is None else [self.sinks.counts]
        heads_agree = all(bool((held == held[:, :1]).all()) for held in counts)
        rows_agree = bool((first == first[0]).all()) and all(bool((held == held[:1]).all()) for held in counts)
        everyone = slice(0, self.heads)
        if heads_agree and rows_agree:
            return [(Place(slice(0, self.batch), everyone), int(first[0]))]
        heads = [everyone] if heads_agree else [slice(head, head + 1) for head in range(self.heads)]
        return [(Place(slice(row, row + 1), head), int(first[row])) for row in range(self.batch) for head in heads]

    def _block(self, place: Place, tokens: Tokens) -> _Block | None:
        """The tokens of a place without those that become sinks; None if nothing is left."""
        keys, values = (x[place.rows, place.heads] for x in (tokens.keys, tokens.values))
        sinks = 0
        if self.sinks is not None and (sinks := min(self.sinks.lacking(place), keys.shape[2])):
            self.sinks.append(place, keys[:, :, :sinks], values[:, :, :sinks])
        keys, values = keys[:, :, sinks:], values[:, :, sinks:]
        if not keys.shape[2]:
            return None
        if self.labels is None:
            return _Block(place, keys, values, torch.full(keys.shape[:3], "high" in self.arenas, device=keys.device))
        if tokens.mass is None or tokens.seen is None:
            score = torch.arange(keys.shape[2], device=keys.device).float().expand(keys.shape[:3])  # the newest
        else:
            score = tokens.mass[place.rows, place.heads, sinks:] / tokens.seen[place.rows, None, sinks:].clamp(min=1)
        return _Block(place, keys, values, salient(score, self.bits.ratio))

    def _after(self, arena: Arena, block: _Block, high: bool) -> int:
        """Slots that an arena needs for a block."""
        held = int(arena.counts[block.place.rows, block.place.heads].max())
        return held + int((block.chosen if high else ~block.chosen)[0, 0].sum())

    def _opens(self, blocks: list[_Block]) -> bool:
        """Whether an epoch begins: the first one, one a flush for keys by channel, or tokens have drifted."""
        if not self.begun or self.packing.key_scheme == "channel":
            return True
        if self.error is None or not (self.packing.center or self.packing.key_cst or self.packing.value_cst):
            return False
        error = self._error(blocks)
        return error is not None and error > DRIFT * self.error

    def _begin(self) -> None:
        """An epoch whose channel vectors are filled in by the first block of every place."""
        shape = (self.batch, self.heads, 2, self.width)
        names = list(self.arenas)
        shared: dict[str, Tensor | None] = {
            "values": torch.zeros(shape, dtype=torch.float16, device=self.device) if self.packing.value_cst else None,
            "keys": torch.zeros(shape, dtype=torch.float16, device=self.device)
            if self.packing.center or self.packing.key_cst
            else None,
        }
        for name in names:
            keys = shared["keys"]
            if self.packing.key_scheme == "channel":
                keys = torch.zeros(shape, dtype=torch.float16, device=self.device)
            self.arenas[name].begin(Channels(keys, shared["values"]))

    def _append(self, block: _Block) -> None:
        self._fill_channels(block)
        if self.labels is not None:
            held = int(self.packed()[block.place.rows, block.place.heads].max())
            self.labels.append(block.place, held, block.chosen)
        for name, arena in self.arenas.items():
            chosen = block.chosen if name == "high" else ~block.chosen
            arena.append(block.place, _taken(block.keys, chosen), _taken(block.values, chosen))

    def _fill_channels(self, block: _Block) -> None:
        """Channel vectors of a place from the first of its tokens in the epoch."""
        packing = self.packing
        rows, heads = block.place.rows, block.place.heads
        held = {}
        for name, arena in self.arenas.items():
            bounds = arena.epochs[-1].bounds[rows, heads]
            held[name] = bool((bounds[..., 1] > bounds[..., 0]).any())
            if packing.key_scheme != "channel" or held[name]:
                continue
            own = _taken(block.keys, block.chosen if name == "high" else ~block.chosen)
            keys = arena.epochs[-1].channels.keys
            if own.shape[2] and keys is not None:
                keys[rows, heads] = channels.by_channel(own, arena.widths.key_bits)
        if any(held.values()):
            return  # the other class has written with the vectors that both share
        shared = next(iter(self.arenas.values())).epochs[-1].channels
        if packing.key_scheme == "token" and shared.keys is not None:
            middle = channels.centre(block.keys) if packing.center else None
            vectors = channels.separable(block.keys, middle) if packing.key_cst else channels.plain(block.keys, middle)
            assert vectors is not None
            shared.keys[rows, heads] = vectors
        if shared.values is not None:
            shared.values[rows, heads] = channels.separable(block.values)

    def _error(self, blocks: list[_Block]) -> float | None:
        """Relative squared error of a few tokens with the channel vectors in hand; None where they are too few."""
        judged = [block for block in blocks if block.keys.shape[2] >= LEAST]
        if not judged or self.packing.key_scheme == "channel":
            return None
        arena = list(self.arenas.values())[-1]
        epoch, worst = arena.epochs[-1], 0.0
        for name, bits, vectors in (
            ("keys", arena.widths.key_bits, epoch.channels.keys),
            ("values", arena.widths.value_bits, epoch.channels.values),
        ):
            wrong, spread = 0.0, 0.0
            for block in judged:
                states: Tensor = getattr(block, name)
                x = states[:, :, :: max(1, states.shape[2] // SAMPLE)].float()
                own = None if vectors is None else vectors[block.place.rows, block.place.heads]
                found = kv_unpack(*kv_pack(x, bits, own, arena.widths.clip), bits, own)
                wrong += float((found - x).square().sum())
                spread += float((x - x.mean(2, keepdim=True)).square().sum().clamp(min=1e-6 * x.square().sum()))
            worst = max(worst, wrong / spread if spread else 0.0)
        return worst


def _taken(states: Tensor, chosen: Tensor) -> Tensor:
    """Equally many tokens of every head, [rows, heads, chosen, head_dim]."""
    return states[chosen].view(*states.shape[:2], -1, states.shape[3])
