"""Dense little-endian packing of b-bit codes into int32 words.

A row of codes is one bitstream: code i fills bits i*b .. i*b+b-1, bit 0 is the lowest bit of word 0. 32 codes fill b
words exactly; at 3 bits, codes 10 and 21 straddle two words. This is the layout of compressed-tensors `pack-quantized`
and, transposed, of GPTQ's `qweight`. (compressed-tensors before June 2026 padded 3-bit words and can't read this.)

Since 8 codes always fill b whole bytes, the work is done on groups of 8 codes held in one int64, whose low b bytes are
the stream. Reading those bytes in place relies on a little-endian machine.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BIT_WIDTHS = (2, 3, 4, 8)

# Codes handled at once; the scratch memory is about three bytes a code.
_CHUNK = 1 << 22


def packed_words(columns: int, bits: int) -> int:
    """Number of int32 words that `columns` codes of `bits` bits take: ceil(columns * bits / 32).

    Raises:
        ValueError: bits isn't one of 2, 3, 4, 8.
    """
    _check_bits(bits)
    return -(-columns * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack each row of unsigned codes.

    Args:
        codes: [N, K], any integer dtype, values in [0, 2^bits).
        bits: 2, 3, 4 or 8.

    Returns:
        [N, ceil(K * bits / 32)] int32 on the same device; the unused high bits of a row's last word are 0.

    Raises:
        ValueError: unknown width, not a matrix of integers, or a code out of range.
    """
    _check_codes(codes, bits)
    rows, columns = codes.shape
    words = torch.empty(rows, packed_words(columns, bits), dtype=torch.int32, device=codes.device)
    if words.numel() == 0:
        return words
    step = _rows_at_once(columns)
    for start in range(0, rows, step):
        words[start : start + step] = _pack_chunk(codes[start : start + step], bits)
    return words


def unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """The codes that `pack` was given.

    Args:
        words: [N, ceil(columns * bits / 32)] int32.
        bits: 2, 3, 4 or 8.
        columns: K, the number of codes in a row.

    Returns:
        [N, columns] uint8 on the same device.

    Raises:
        ValueError: unknown width, wrong dtype, or a number of words that doesn't fit `columns`.
    """
    expected = packed_words(columns, bits)
    if words.dtype != torch.int32 or words.dim() != 2 or words.shape[1] != expected:
        raise ValueError(
            f"{columns} codes of {bits} bits need int32 words of shape [rows, {expected}], "
            f"got {words.dtype} of shape {list(words.shape)}"
        )
    rows = words.shape[0]
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=words.device)
    if codes.numel() == 0:
        return codes
    step = _rows_at_once(columns)
    for start in range(0, rows, step):
        codes[start : start + step] = _unpack_chunk(words[start : start + step], bits, columns)
    return codes


def pack_columns(codes: Tensor, bits: int) -> Tensor:
    """Pack along dimension 0, as zero points are stored: codes [N, G] to int32 [ceil(N * bits / 32), G]."""
    return pack(codes.T, bits).T.contiguous()


def unpack_columns(words: Tensor, bits: int, rows: int) -> Tensor:
    """The inverse of `pack_columns`: int32 [ceil(rows * bits / 32), G] to uint8 codes [rows, G]."""
    return unpack(words.T, bits, rows).T.contiguous()


def _pack_chunk(codes: Tensor, bits: int) -> Tensor:
    rows, columns = codes.shape
    count = -(-columns // 8)
    groups = F.pad(codes, (0, 8 * count - columns)).reshape(rows, count, 8)
    stream = torch.zeros(rows, count, dtype=torch.int64, device=codes.device)
    for i in range(8):
        stream |= groups[..., i].to(torch.int64) << (bits * i)
    octets = stream.view(torch.uint8).view(rows, count, 8)[..., :bits].reshape(rows, count * bits)
    return _copy_rows(octets, 4 * packed_words(columns, bits)).view(torch.int32)


def _unpack_chunk(words: Tensor, bits: int, columns: int) -> Tensor:
    rows, count = words.shape[0], -(-columns // 8)
    octets = _copy_rows(_copy_rows(words, words.shape[1]).view(torch.uint8), count * bits)
    stream = F.pad(octets.view(rows, count, bits), (0, 8 - bits)).view(torch.int64)
    codes = torch.empty(rows, count, 8, dtype=torch.uint8, device=words.device)
    for i in range(8):
        codes[..., i : i + 1] = (stream >> (bits * i)) & ((1 << bits) - 1)
    return codes.view(rows, 8 * count)[:, :columns]


def _copy_rows(rows: Tensor, width: int) -> Tensor:
    """A copy of `rows`, cut or filled with zeros to `width` columns; what is cut off holds no code.

    A fresh tensor, because `contiguous` keeps odd strides in dimensions of size 1 and `view(dtype)` refuses those.
    """
    copy = torch.zeros(rows.shape[0], width, dtype=rows.dtype, device=rows.device)
    kept = min(width, rows.shape[1])
    copy[:, :kept] = rows[:, :kept]
    return copy


def _rows_at_once(columns: int) -> int:
    return max(1, _CHUNK // max(1, columns))


def _check_bits(bits: int) -> None:
    if bits not in BIT_WIDTHS:
        raise ValueError(f"bits={bits}: unknown width; allowed: {', '.join(map(str, BIT_WIDTHS))}")


def _check_codes(codes: Tensor, bits: int) -> None:
    _check_bits(bits)
    if codes.dim() != 2 or codes.is_floating_point() or codes.is_complex():
        raise ValueError(f"codes must be a matrix of integers, got {codes.dtype} of shape {list(codes.shape)}")
    if codes.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(codes))
    if low < 0 or high >= 1 << bits:
        raise ValueError(f"codes of {bits} bits must be within [0, {(1 << bits) - 1}], got [{low}, {high}]")
