"""Blocks of 32 weights as GGUF stores them, from group-quantized codes with one scale a block.

    Q4_0   float16 d; 16 bytes, byte i: code i in the low and code i + 16 in the high nibble     w = d (code - 8)
    Q8_0   float16 d; 32 signed bytes                                                            w = d code

Both are symmetric with a signed scale and codes from -2^(b-1) to 2^(b-1)-1, so codes and scales go over unchanged.
"""

import torch
from torch import Tensor

BLOCK = 32
_SCALE_BYTES = 2


def to_q4_0(codes: Tensor, scale: Tensor) -> Tensor:
    """4-bit codes as Q4_0.

    Args:
        codes: ``[N, K]`` unsigned, the signed code + 8, values in [0, 16); K a multiple of 32.
        scale: ``[N, K/32]`` float16.

    Returns:
        ``[N, K/32 * 18]`` uint8, rows of blocks.

    Raises:
        ValueError: shapes or types that don't fit.
    """
    blocks = _blocks(codes, scale)
    low, high = blocks[..., : BLOCK // 2], blocks[..., BLOCK // 2 :]
    return _joined(scale, low | (high << 4))


def to_q8_0(codes: Tensor, scale: Tensor) -> Tensor:
    """8-bit codes as Q8_0.

    Args:
        codes: ``[N, K]`` unsigned, the signed code + 128; K a multiple of 32.
        scale: ``[N, K/32]`` float16.

    Returns:
        ``[N, K/32 * 34]`` uint8, rows of blocks.

    Raises:
        ValueError: shapes or types that don't fit.
    """
    return _joined(scale, _blocks(codes, scale) ^ 0x80)  # the sign bit turns code + 128 into two's complement


def _blocks(codes: Tensor, scale: Tensor) -> Tensor:
    rows, columns = codes.shape
    if codes.dtype != torch.uint8 or scale.dtype != torch.float16 or scale.shape != (rows, columns // BLOCK):
        raise ValueError(
            f"GGUF needs uint8 codes and float16 scales, one for {BLOCK} columns, "
            f"got {codes.dtype} {list(codes.shape)} and {scale.dtype} {list(scale.shape)}"
        )
    if columns % BLOCK:
        raise ValueError(f"GGUF needs whole blocks: {columns} columns aren't a multiple of {BLOCK}")
    return codes.reshape(rows, columns // BLOCK, BLOCK)


def _joined(scale: Tensor, data: Tensor) -> Tensor:
    """Scale and data of every block behind each other; as everywhere in this package, on a little-endian machine."""
    d = scale.contiguous().view(torch.uint8).view(*scale.shape, _SCALE_BYTES)
    return torch.cat([d, data], dim=-1).reshape(len(scale), -1)
