"""Layout "rows": the bytes in the order in which the C++ kernels read them (``kernels/native/quant_linear.h``).

16 output rows make a block; a group of G inputs is filled up to whole chunks of 32 inputs. A chunk of a block is `bits`
vectors of 64 bytes, 4 bytes a row. Input k = 4 j + b of the chunk stands in byte b of its row: of vector j at 8 bits,
of vector j // 2 at 4 bits (nibble j % 2), of vector j // 4 at 2 bits (bits 2 (j % 4) on). At 3 bits the two low bits
stand as with 2 bits, and bit j of the third vector is the high one. So the codes are uint8 [N / 16, chunks, bits, 16,
4], and scales and zero points [N / 16, K / G, 16].
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 16  # output rows
CHUNK = 32  # inputs

# Blocks of rows repacked at once. Scratch is some 15 bytes a code where nothing that was freed fits again, hence 4 MB.
_CODES_AT_ONCE = 1 << 18


def pack(codes: Tensor, bits: int, group_size: int) -> Tensor:
    """Codes [N, K] uint8, each below 2^bits, to uint8 [ceil(N / 16), chunks, bits, 16, 4]; bits is 2, 3, 4 or 8."""
    return pack_slices(lambda start, end: codes[start:end], (codes.shape[0], codes.shape[1]), bits, group_size)


def pack_slices(codes: Callable[[int, int], Tensor], shape: tuple[int, int], bits: int, group_size: int) -> Tensor:
    """As :func:`pack`, of codes that are never all in memory: `codes(start, end)` gives the rows from start to end."""
    rows, columns = shape
    blocks = -(-rows // BLOCK)
    packed = torch.empty(blocks, chunks_of(columns, group_size), bits, BLOCK, 4, dtype=torch.uint8)
    step = _blocks_at_once(columns)
    for start in range(0, blocks, step):
        part = codes(start * BLOCK, min((start + step) * BLOCK, rows))
        packed[start : start + step] = _pack_blocks(part, bits, group_size)
    return packed


def unpack(packed: Tensor, bits: int, group_size: int, shape: tuple[int, int]) -> Tensor:
    """The codes [N, K] uint8 that :func:`pack` was given; shape is (N, K)."""
    rows, columns = shape
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    step = _blocks_at_once(columns)
    for start in range(0, packed.shape[0], step):
        part = codes[start * BLOCK : (start + step) * BLOCK]
        part.copy_(_unpack_blocks(packed[start : start + step], bits, group_size, columns)[: part.shape[0]])
    return codes


def pack_by_group(values: Tensor) -> Tensor:
    """Scales or zero points [N, K / G] to [ceil(N / 16), K / G, 16], same dtype; rows that don't exist hold 0."""
    rows, groups = values.shape
    blocks = -(-rows // BLOCK)
    return F.pad(values, (0, 0, 0, blocks * BLOCK - rows)).view(blocks, BLOCK, groups).transpose(1, 2).contiguous()


def unpack_by_group(packed: Tensor, rows: int) -> Tensor:
    """The values [N, K / G] that :func:`pack_by_group` was given."""
    blocks, groups, _ = packed.shape
    return packed.transpose(1, 2).reshape(blocks * BLOCK, groups)[:rows].contiguous()


def chunks_of(columns: int, group_size: int) -> int:
    """Chunks of 32 inputs that a row of K = columns codes takes."""
    return columns // group_size * -(-group_size // CHUNK)


def _pack_blocks(codes: Tensor, bits: int, group_size: int) -> Tensor:
    rows, columns = codes.shape
    blocks = -(-rows // BLOCK)
    padding = -group_size % CHUNK
    groups = F.pad(codes.view(rows, columns // group_size, group_size), (0, padding, 0, 0, 0, blocks * BLOCK - rows))
    # [block, chunk, j, row, b]
    bytes_ = groups.reshape(blocks, BLOCK, -1, 8, 4).permute(0, 2, 3, 1, 4)
    if bits == 8:
        return bytes_
    if bits == 3:
        return torch.cat([_merge(bytes_ & 3, 2), _merge(bytes_ >> 2, 1)], dim=2)
    return _merge(bytes_, bits)


def _merge(codes: Tensor, bits: int) -> Tensor:
    """[block, chunk, 8, 16, 4] to [block, chunk, bits, 16, 4]: neighbours along dimension 2 share a byte."""
    blocks, chunks = codes.shape[:2]
    shared = codes.reshape(blocks, chunks, bits, 8 // bits, BLOCK, 4)
    merged = shared[:, :, :, 0].clone()
    for i in range(1, 8 // bits):
        merged |= shared[:, :, :, i] << (bits * i)
    return merged


def _unpack_blocks(packed: Tensor, bits: int, group_size: int, columns: int) -> Tensor:
    blocks, chunks = packed.shape[:2]
    if bits == 8:
        bytes_ = packed
    elif bits == 3:
        bytes_ = _split(packed[:, :, :2], 2) | (_split(packed[:, :, 2:], 1) << 2)
    else:
        bytes_ = _split(packed, bits)
    groups = columns // group_size
    rows = bytes_.permute(0, 3, 1, 2, 4).reshape(blocks * BLOCK, groups, chunks // groups * CHUNK)
    return rows[:, :, :group_size].reshape(blocks * BLOCK, columns)


def _split(merged: Tensor, bits: int) -> Tensor:
    blocks, chunks = merged.shape[:2]
    parts = [(merged >> (bits * i)) & ((1 << bits) - 1) for i in range(8 // bits)]
    return torch.stack(parts, dim=3).view(blocks, chunks, 8, BLOCK, 4)


def _blocks_at_once(columns: int) -> int:
    return max(1, _CODES_AT_ONCE // (BLOCK * max(1, columns)))
