"""Caches filled with random keys and values, to count what they occupy without running a model.

Layers that are kept alike occupy the same, so one of each kind is filled. Keys and values go in as a prompt does, and
in chunks behind it as an answer does; only the attention, which changes no byte, isn't computed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig

from compress.evalsuite.efficiency import allocated
from compress.fingerprint import kv_shape
from compress.kv.bytes import KVBytes
from compress.kv.layer import PlanLayer
from compress.kv.packed import PackedPart
from compress.kv.part import Part
from compress.kv.schemes import Scheme

CLOSE = 0.01
"""Allocated bytes that differ by no more than this share are equal."""


@dataclass(frozen=True)
class Shape:
    """Keys and values of a model, 16 bits each.

    Attributes:
        heads: KV heads.
        width: head_dim.
    """

    heads: int
    width: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "Shape":
        """From a model's config."""
        return cls(*kv_shape(config))

    def states(self, tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random keys and values [1, KV heads, tokens, head_dim] float16."""
        shape = (1, self.heads, tokens, self.width)
        keys, values = (torch.randn(shape, generator=generator).half() for _ in range(2))
        return keys, values


def filled_bytes(cache: Cache, shape: Shape, sizes: Sequence[int], seed: int = 0) -> KVBytes:
    """Bytes of a cache of one sequence that was given tokens in calls of these sizes.

    Args:
        cache: empty; some of its layers are filled.
        shape: of keys and values.
        sizes: tokens of each call.
        seed: of the data.

    Returns:
        Payload and stored bytes as the layers say, allocated bytes by what their tensors occupy.

    Raises:
        RuntimeError: a layer says that it allocates something else than it does.
    """
    kinds: dict[Any, list[int]] = {}
    for index, layer in enumerate(cache.layers):
        kinds.setdefault(_kind(layer), []).append(index)
    shared = allocated(cache).nbytes
    total = KVBytes(0, shared, shared)
    for members in kinds.values():
        layer = cache.layers[members[0]]
        others = [other for other in cache.layers if other is not layer]
        _fill(
            layer,
            shape,
            _apart(sizes) if getattr(layer, "is_sliding", False) else sizes,
            torch.Generator().manual_seed(seed),
        )
        occupied = allocated(layer, besides=[others, getattr(cache, "rotation", None)]).nbytes
        told = _told(layer, occupied, shape.heads * shape.width)
        if told.allocated != occupied:
            raise RuntimeError(f"{type(layer).__name__} says {told.allocated} bytes and occupies {occupied}")
        total += KVBytes(*(len(members) * figure for figure in (told.payload, told.stored, occupied)))
    return total


@dataclass(frozen=True)
class Match:
    """A scheme brought to the bytes of another one.

    Attributes:
        more: recent tokens that it keeps in 16 bits beside its own.
        nbytes: what it occupies with them.
        equal: whether that is within ``CLOSE`` of what was asked for.
    """

    more: int
    nbytes: KVBytes
    equal: bool


def match(scheme: Scheme, shape: Shape, sizes: Sequence[int], wanted: int) -> Match:
    """Spend a scheme's surplus on more recent tokens in 16 bits, until it occupies as much as another one.

    A scheme that is above already, and one that can't keep more tokens, stay as they are.

    Args:
        scheme: one that can be made.
        shape: of keys and values.
        sizes: tokens of each call, as for :func:`filled_bytes`.
        wanted: allocated bytes of the other one.
    """
    make = scheme.make
    assert make is not None
    tried: dict[int, KVBytes] = {}

    def size(more: int) -> int:
        if more not in tried:
            tried[more] = filled_bytes(make(more), shape, sizes)
        return tried[more].allocated

    least = 0 if size(0) <= wanted or size(1) >= size(0) else 1
    if scheme.grows and size(least) < wanted * (1 - CLOSE):
        _search(size, least, sum(sizes), wanted)
    best = min(tried, key=lambda more: abs(tried[more].allocated - wanted)) if scheme.grows else 0
    return Match(best, tried[best], abs(tried[best].allocated / wanted - 1) <= CLOSE)


def _search(size: Callable[[int], int], low: int, high: int, wanted: int) -> None:
    """Halve the span between too few and too many; room comes in steps, so that any step may be the nearest."""
    while high - low > 1:
        middle = (low + high) // 2
        found = size(middle)
        if abs(found / wanted - 1) <= CLOSE / 4:
            return
        low, high = (middle, high) if found < wanted else (low, middle)


def _apart(sizes: Sequence[int]) -> list[int]:
    """The last token by itself: only then has a sliding layer let go of what it no longer needs."""
    return [*sizes[:-1], sizes[-1] - 1, 1]


def _fill(layer: Any, shape: Shape, sizes: Sequence[int], generator: torch.Generator) -> None:
    for tokens in sizes:
        if not tokens:
            continue
        keys, values = shape.states(tokens, generator)
        layer.update(keys, values)
        if isinstance(layer, PlanLayer):
            layer.keep(torch.rand(keys.shape[:3], generator=generator))


def _told(layer: Any, occupied: int, numbers: int) -> KVBytes:
    """What a layer says of itself; transformers' own, with so many numbers a key, say nothing."""
    if hasattr(layer, "nbytes"):
        found: KVBytes = layer.nbytes()
        return found
    held = sum(x.nbytes for x in (layer.keys, layer.values) if isinstance(x, Tensor))
    if not hasattr(layer, "nbits"):
        return KVBytes(held, held, occupied)
    packed = layer.get_seq_length() - (layer.keys.shape[2] if layer.keys.dim() == 4 else 0)
    codes = 2 * packed * numbers * layer.nbits // 8
    return KVBytes(held + codes, occupied, occupied)


def _kind(layer: Any) -> Any:
    """What two layers have in common that are kept alike."""
    if isinstance(layer, PlanLayer):
        return tuple((cluster.heads, _how(cluster.part)) for cluster in layer.clusters)
    return type(layer), getattr(layer, "sliding_window", None)


def _how(part: Part) -> Any:
    return part.format.bits if isinstance(part, PackedPart) else getattr(part, "reach", part)
