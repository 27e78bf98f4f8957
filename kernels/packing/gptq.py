"""Bridge between rows packed along the input (compressed-tensors) and the words of a GPTQ checkpoint.

GPTQ stores `qweight` [K*b/32, N], packed along the input, which is the transpose of `pack`'s [N, K*b/32], and `qzeros`
[ceil(K/g), N*b/32], packed along the output. It has no truncated tail: K*b and N*b must be multiples of 32.
"""

import torch
from compress.kernels.packing.reference import pack, packed_words, unpack
from torch import Tensor


def to_gptq_words(words: Tensor) -> Tensor:
    """`weight_packed` [N, K*b/32] int32 to `qweight` [K*b/32, N] int32."""
    return words.T.contiguous()


def from_gptq_words(qweight: Tensor) -> Tensor:
    """`qweight` [K*b/32, N] int32 to `weight_packed` [N, K*b/32] int32."""
    return qweight.T.contiguous()


def symmetric_zero_words(bits: int, columns: int, version: int) -> Tensor:
    """One row of `qzeros` for symmetric codes, whose zero is 2^(bits-1).

    Version 1 (`checkpoint_format: gptq`) stores zero - 1 and readers add 1; version 2 (`gptq_v2`) stores it as is.

    Args:
        bits: 2, 3, 4 or 8.
        columns: N, the number of outputs; N * bits must be a multiple of 32.
        version: 1 or 2.

    Returns:
        [N * bits / 32] int32, the same for every group.

    Raises:
        ValueError: unknown width or version, or N doesn't fill whole words.
    """
    if version not in (1, 2):
        raise ValueError(f"version={version}: unknown GPTQ checkpoint version; allowed: 1, 2")
    if 32 * packed_words(columns, bits) != columns * bits:
        raise ValueError(f"GPTQ needs whole words: {columns} outputs of {bits} bits aren't a multiple of 32 bits")
    stored = (1 << (bits - 1)) - (1 if version == 1 else 0)
    return pack(torch.full((1, columns), stored, dtype=torch.uint8), bits)[0]


def to_gptq_zeros(zeros: Tensor, bits: int, rows: int, version: int) -> Tensor:
    """`weight_zero_point` [N*b/32, G] int32, packed along the outputs, to `qzeros` [G, N*b/32] int32.

    Args:
        zeros: zero points as `pack_columns` packs them.
        bits: 2, 3, 4 or 8.
        rows: N, the number of outputs; N * bits must be a multiple of 32.
        version: 1 or 2, see :func:`symmetric_zero_words`.

    Raises:
        ValueError: N doesn't fill whole words, or version 1 is asked to store a zero point 0, which it can't.
    """
    if 32 * packed_words(rows, bits) != rows * bits:
        raise ValueError(f"GPTQ needs whole words: {rows} outputs of {bits} bits aren't a multiple of 32 bits")
    words = zeros.T.contiguous()
    if version == 2:
        return words
    points = unpack(words, bits, rows)
    if not points.all():
        raise ValueError("a zero point is 0, which a GPTQ checkpoint of version 1 can't store")
    return pack(points - 1, bits)
