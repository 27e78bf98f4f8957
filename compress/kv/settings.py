"""What the recipe's section ``kv`` says, in the terms of the attention plan."""

from collections.abc import Sequence
from dataclasses import fields

from compress.plan import KVBits, Packing
from compress.schema import KV


def packing_of(settings: KV, seed: int) -> Packing:
    """What holds for the whole cache; ``seed`` is of the probes."""
    own = {field.name: getattr(settings, field.name) for field in fields(Packing) if field.name != "seed"}
    return Packing(**own, seed=seed)


def copying_bits(settings: KV) -> KVBits:
    """The bits of a KV head that copies."""
    return KVBits(high=settings.high_bits, low=settings.high_bits, ratio=1.0)


def bits_of(settings: KV, layers: Sequence[int]) -> dict[int, KVBits]:
    """The bits of the layers that are packed, where no budget chooses them."""
    bits = dict.fromkeys(layers, KVBits(high=settings.high_bits, low=settings.low_bits, ratio=settings.ratio))
    if settings.boundary_bits is not None and layers:
        edge = KVBits(high=settings.boundary_bits, low=settings.boundary_bits, ratio=1.0)
        bits |= {layers[0]: edge, layers[-1]: edge}
    return bits
