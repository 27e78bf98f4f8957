"""Packed tokens of one class, salient or not, of one layer: codes, their parameters, and who shares channel vectors.

Slots are filled front to back in the order of the tokens, for every sequence and KV head by itself, and never written
twice. Room is made for exactly what comes: a flush copies the codes once, and nothing is allocated that isn't used.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.kernels.kv_pack import kv_pack, kv_unpack
from compress.kernels.segment_attention import Segment

Change = Callable[[Tensor], Tensor]


@dataclass
class Channels:
    """Vectors [batch, KV heads, 2, head_dim] float16: what keys and values are divided by, and centred on."""

    keys: Tensor | None
    values: Tensor | None


@dataclass
class Epoch:
    """Slots whose tokens share channel vectors.

    Attributes:
        bounds: [batch, KV heads, 2] int32, first slot and one past the last.
        channels: their vectors.
    """

    bounds: Tensor
    channels: Channels


@dataclass(frozen=True)
class Place:
    """Sequences and KV heads that are written together, because they hold equally many tokens."""

    rows: slice
    heads: slice


@dataclass(frozen=True)
class Widths:
    """How a class of tokens is packed: bits of keys and values, a clip search, and keys with parameters a token."""

    key_bits: int
    value_bits: int
    clip: bool
    keys_by_token: bool


class Arena:
    """The store of one class.

    Args:
        widths: how its tokens are packed.
        batch: sequences.
        heads: KV heads.
        device: where it lies.
    """

    def __init__(self, widths: Widths, batch: int, heads: int, device: torch.device) -> None:
        self.widths = widths
        self.counts = torch.zeros(batch, heads, dtype=torch.int32)  # on the CPU, where lengths are decided
        self.device = device
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.key_params: Tensor | None = None
        self.value_params: Tensor | None = None
        self.epochs: list[Epoch] = []

    def begin(self, channels: Channels) -> None:
        """What is appended from now on has these channel vectors."""
        bounds = self.counts.to(self.device)[:, :, None].repeat(1, 1, 2)
        self.epochs.append(Epoch(bounds, channels))

    def reserve(self, capacity: int, width: int) -> None:
        """Make room for as many slots a head, of ``width`` dimensions."""
        held = 0 if self.keys is None else self.keys.shape[2]
        if capacity <= held:
            return
        sizes = {
            "keys": (width * self.widths.key_bits // 8, torch.uint8),
            "values": (width * self.widths.value_bits // 8, torch.uint8),
            "value_params": (2, torch.float16),
        }
        if self.widths.keys_by_token:
            sizes["key_params"] = (2, torch.float16)
        for name, (size, dtype) in sizes.items():
            room = torch.zeros(*self.counts.shape, capacity, size, dtype=dtype, device=self.device)
            former = getattr(self, name)
            if former is not None:
                room[:, :, :held] = former
            setattr(self, name, room)

    def append(self, place: Place, keys: Tensor, values: Tensor) -> None:
        """Pack tokens behind the others of a place; the room is there, and an epoch has begun.

        Args:
            place: whose they are.
            keys: [rows, heads, tokens, head_dim].
            values: alike.
        """
        channels = self.epochs[-1].channels
        count, first = keys.shape[2], int(self.counts[place.rows, place.heads].max())
        slots = slice(first, first + count)
        widths = self.widths
        codes, params = kv_pack(keys, widths.key_bits, _of(channels.keys, place), widths.clip, widths.keys_by_token)
        _write(self.keys, place, slots, codes)
        _write(self.key_params, place, slots, params)
        codes, params = kv_pack(values, widths.value_bits, _of(channels.values, place), widths.clip)
        _write(self.values, place, slots, codes)
        _write(self.value_params, place, slots, params)
        self.counts[place.rows, place.heads] += count
        self.epochs[-1].bounds[place.rows, place.heads, 1] += count

    def segments(self) -> list[Segment]:
        """For :func:`compress.kernels.segment_attention.segment_attention`; one for every epoch."""
        return [
            self._segment(epoch) for epoch in self.epochs if bool((epoch.bounds[..., 1] > epoch.bounds[..., 0]).any())
        ]

    def unpacked(self, row: int, head: int) -> tuple[Tensor, Tensor]:
        """Keys and values [tokens, head_dim] float32 of one head, in the order of the tokens."""
        keys, values = [], []
        for epoch in self.epochs:
            first, end = epoch.bounds[row, head].tolist()
            place, slots = Place(slice(row, row + 1), slice(head, head + 1)), slice(first, end)
            k, v = epoch.channels.keys, epoch.channels.values
            codes, params = _read(self.keys, place, slots), _read(self.key_params, place, slots)
            assert codes is not None
            keys.append(kv_unpack(codes, params, self.widths.key_bits, _of(k, place))[0, 0])
            codes, params = _read(self.values, place, slots), _read(self.value_params, place, slots)
            assert codes is not None
            values.append(kv_unpack(codes, params, self.widths.value_bits, _of(v, place))[0, 0])
        return torch.cat(keys), torch.cat(values)

    def everything(self, width: int) -> tuple[Tensor, Tensor]:
        """Keys and values [batch, KV heads, slots, width] float32; slots behind a head's count mean nothing."""
        slots = 0 if self.keys is None else self.keys.shape[2]
        keys, values = (torch.zeros(*self.counts.shape, slots, width, device=self.device) for _ in range(2))
        for epoch in self.epochs:
            first, end = int(epoch.bounds[..., 0].min()), int(epoch.bounds[..., 1].max())
            there = torch.arange(first, end, device=self.device)
            own = ((there >= epoch.bounds[..., :1]) & (there < epoch.bounds[..., 1:]))[..., None]
            place = Place(slice(None), slice(None))
            for name, held, bits in (("keys", keys, self.widths.key_bits), ("values", values, self.widths.value_bits)):
                params = self.key_params if name == "keys" else self.value_params
                codes, params = (_read(room, place, slice(first, end)) for room in (getattr(self, name), params))
                if codes is not None:
                    found = kv_unpack(codes, params, bits, getattr(epoch.channels, name))
                    held[:, :, first:end] = torch.where(own, found, held[:, :, first:end])
        return keys, values

    def crop(self, counts: Tensor) -> None:
        """Keep the first so many slots, [batch, KV heads] int32; what is behind them is written over later."""
        self.counts = counts
        for epoch in self.epochs:
            epoch.bounds = torch.minimum(epoch.bounds, counts.to(self.device)[:, :, None])

    def change(self, change: Change, once: Change) -> None:
        """Apply a function of the batch's dimension to every tensor; ``once`` is for those that arenas share."""
        for name in ("keys", "values", "key_params", "value_params"):
            if (held := getattr(self, name)) is not None:
                setattr(self, name, change(held))
        self.counts = change(self.counts)
        for epoch in self.epochs:
            epoch.bounds = change(epoch.bounds)
            for name in ("keys", "values"):
                if (vectors := getattr(epoch.channels, name)) is not None:
                    setattr(epoch.channels, name, once(vectors))

    def payload(self, width: int) -> int:
        """Bytes of the codes."""
        return int(self.counts.sum()) * width * (self.widths.key_bits + self.widths.value_bits) // 8

    def overhead(self) -> int:
        """Bytes of the parameters a token."""
        return int(self.counts.sum()) * (8 if self.widths.keys_by_token else 4)

    def _segment(self, epoch: Epoch) -> Segment:
        assert self.keys is not None
        assert self.values is not None
        return Segment(
            self.keys,
            self.values,
            self.widths.key_bits,
            self.widths.value_bits,
            self.key_params,
            self.value_params,
            epoch.channels.keys,
            epoch.channels.values,
            epoch.bounds,
            int((epoch.bounds[..., 1] - epoch.bounds[..., 0]).max()),
        )


def _of(vectors: Tensor | None, place: Place) -> Tensor | None:
    return None if vectors is None else vectors[place.rows, place.heads]


def _write(room: Tensor | None, place: Place, slots: slice, new: Tensor | None) -> None:
    if room is not None and new is not None:
        room[place.rows, place.heads, slots] = new


def _read(room: Tensor | None, place: Place, slots: slice) -> Tensor | None:
    return None if room is None else room[place.rows, place.heads, slots]
