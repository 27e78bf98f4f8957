"""Packing of 2, 3, 4 and 8-bit codes: int32 words of compressed-tensors and GPTQ checkpoints, blocks of GGUF."""

from compress.kernels.packing.gguf import to_q4_0, to_q8_0
from compress.kernels.packing.gptq import from_gptq_words, symmetric_zero_words, to_gptq_words, to_gptq_zeros
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
    "to_gptq_zeros",
    "to_q4_0",
    "to_q8_0",
    "unpack",
    "unpack_columns",
]
