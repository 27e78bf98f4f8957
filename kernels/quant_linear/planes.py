"""Layout "planes": codes in the order in which the Triton kernels multiply them, without a shuffle.

Inputs are cut into units of S = `unit(G)` rows, which never cross a group. A unit of b-bit codes takes S b / 8 rows of
bytes, N contiguous, so that neighbouring threads read neighbouring outputs. At 2, 4 and 8 bits it is cut into P = 8 / b
planes of S / P inputs: byte row r holds input j S / P + r of the unit in bits [j b, j b + b), for every plane j. So
``(bytes >> j b) & (2^b - 1)`` is a ready [S / P, N] operand for the S / P activations of plane j. At 3 bits the two low
bits are stored as at 2 bits (S / 4 byte rows), and behind them the high bits as planes of 1 bit (S / 8 byte rows).

Tensor cores want at least 16 inputs, more than a plane of a small unit has (8 at 2 bits and S = 32; 8 high bits at
3 bits and S = 64, which is SmolLM2 with its 9 groups of 64). No padding is needed for that: planes stand in the order
of the inputs, so T >= 16 successive inputs j T + t are T / R neighbouring planes of R rows, and a kernel reads byte row
t % R and shifts it by b (j T / R + t // R). A byte is then read T / R times by one instruction, from one cache line.
"""

import torch
from torch import Tensor

LARGEST_UNIT = 128
SMALLEST_UNIT = 8  # the inputs of one byte of high bits


def unit(group_size: int) -> int:
    """S, the largest power of two up to 128 that divides the group size.

    Raises:
        ValueError: the group size isn't a multiple of 8.
    """
    size = min(LARGEST_UNIT, group_size & -group_size)
    if size < SMALLEST_UNIT:
        raise ValueError(f"group_size={group_size}: layout planes needs a multiple of {SMALLEST_UNIT}")
    return size


def pack(codes: Tensor, bits: int, group_size: int) -> Tensor:
    """Codes [N, K] uint8, each below 2^bits, to bytes [K * bits / 8, N] uint8; bits is 2, 3, 4 or 8.

    Raises:
        ValueError: the group size isn't a multiple of 8.
    """
    rows, columns = codes.shape
    size = unit(group_size)
    units = codes.T.contiguous().view(columns // size, size, rows)
    units = torch.cat([_merge(units & 3, 2), _merge(units >> 2, 1)], dim=1) if bits == 3 else _merge(units, bits)
    return units.view(columns * bits // 8, rows)


def unpack(packed: Tensor, bits: int, group_size: int, shape: tuple[int, int]) -> Tensor:
    """The codes [N, K] uint8 that :func:`pack` was given; shape is (N, K)."""
    rows, columns = shape
    size = unit(group_size)
    units = packed.view(columns // size, size * bits // 8, rows)
    low = size // 4
    codes = _split(units[:, :low], 2) | (_split(units[:, low:], 1) << 2) if bits == 3 else _split(units, bits)
    return codes.reshape(columns, rows).T.contiguous()


def _merge(units: Tensor, bits: int) -> Tensor:
    """[units, S, N] codes to [units, S * bits / 8, N] bytes; plane j goes to bits [j bits, j bits + bits)."""
    count, size, rows = units.shape
    planes = units.reshape(count, 8 // bits, size * bits // 8, rows)
    merged = planes[:, 0].clone()
    for j in range(1, 8 // bits):
        merged |= planes[:, j] << (bits * j)
    return merged


def _split(units: Tensor, bits: int) -> Tensor:
    """The inverse of `_merge`."""
    mask = (1 << bits) - 1
    planes = [(units >> (bits * j)) & mask for j in range(8 // bits)]
    return torch.cat(planes, dim=1)
