"""Packing of 2, 3, 4 and 8-bit codes into int32 words, as compressed-tensors and GPTQ checkpoints store them."""

from compress.kernels.packing.gptq import from_gptq_words, symmetric_zero_words, to_gptq_words
from compress.kernels.packing.reference import (
    BIT_WIDTHS,
    pack,
    pack_columns,
    packed_words,
    unpack,
    unpack_columns,
)

__all__ = [
    "BIT_WIDTHS",
    "from_gptq_words",
    "pack",
    "pack_columns",
    "packed_words",
    "symmetric_zero_words",
    "to_gptq_words",
    "unpack",
    "unpack_columns",
]
