"""What the proofs need of `packing`: words, zero points and blocks, and every way back, without a bit's difference.

Packing happens when a file is read or written, so there is no kernel: PyTorch does it on any device.
"""

from typing import Any

import torch
from compress.kernels import packing as op
from compress.kernels.packing import gguf, gptq, reference
from compress.kernels.proofs import Case, OpSpec
from torch import Tensor

_BLOCK = 32  # weights of a GGUF block, and codes after which a word of any width is full


def _public(codes: Tensor, bits: int, scale: Tensor | None) -> tuple[Tensor, ...]:
    return _all(op, codes, bits, scale)


def _reference(codes: Tensor, bits: int, scale: Tensor | None) -> tuple[Tensor, ...]:
    return _all(reference, codes, bits, scale)


def _all(module: Any, codes: Tensor, bits: int, scale: Tensor | None) -> tuple[Tensor, ...]:
    """Words of compressed-tensors and GPTQ with the codes read back, and what only whole words and blocks have."""
    rows, columns = codes.shape
    words, points = module.pack(codes, bits), module.pack_columns(codes, bits)
    qweight = gptq.to_gptq_words(words)
    back = module.unpack(gptq.from_gptq_words(qweight), bits, columns)
    found = [words, points, qweight, module.unpack(words, bits, columns)]
    found += [module.unpack_columns(points, bits, rows), back]
    if rows % _BLOCK == 0 and rows:
        found += [gptq.symmetric_zero_words(bits, rows, version) for version in (1, 2)]
        found.append(gptq.to_gptq_zeros(points, bits, rows, 2))
        found.append(gptq.to_gptq_zeros(module.pack_columns(codes.clamp(min=1), bits), bits, rows, 1))
    if scale is not None:
        found.append((gguf.to_q4_0 if bits == 4 else gguf.to_q8_0)(codes, scale))
    return tuple(found)


def _exact(codes: Tensor, bits: int, scale: Tensor | None) -> tuple[Tensor, ...]:
    """From the definition, on Python's integers."""
    rows = codes.shape[0]
    words, points = _words(codes, bits), _words(codes.T, bits).T
    found = [words, points, words.T, codes, codes, codes]
    if rows % _BLOCK == 0 and rows:
        middle = torch.full((1, rows), 1 << (bits - 1))
        found += [_words(middle - less, bits)[0] for less in (1, 0)]
        found += [points.T, _words(codes.T.clamp(min=1) - 1, bits)]
    if scale is not None:
        found.append(_blocks(codes, bits, scale))
    return tuple(found)


def _words(codes: Tensor, bits: int) -> Tensor:
    """Every row as one number, code i from bit ``i * bits`` on, cut into words of 32 bits, lowest first."""
    count = -(-codes.shape[1] * bits // 32)
    streams = (sum(code << (bits * i) for i, code in enumerate(row)) for row in codes.tolist())
    made = [[(stream >> (32 * w)) & 0xFFFFFFFF for w in range(count)] for stream in streams]
    return torch.tensor(made, dtype=torch.int64).reshape(len(made), count).to(torch.int32)


def _blocks(codes: Tensor, bits: int, scale: Tensor) -> Tensor:
    """Blocks of GGUF byte by byte: the scale's two, then codes i and i + 16 in a byte, or signed bytes."""
    made = []
    for row, scales in zip(codes.tolist(), scale.view(torch.int16).tolist(), strict=True):
        octets: list[int] = []
        for b, stored in enumerate(scales):
            block = row[_BLOCK * b : _BLOCK * (b + 1)]
            octets += [stored & 255, stored >> 8 & 255]
            octets += (
                [low + 16 * high for low, high in zip(block[:16], block[16:], strict=True)]
                if bits == 4
                else [(code - 128) % 256 for code in block]
            )
        made.append(octets)
    return torch.tensor(made, dtype=torch.uint8)


def _case(name: str, bits: int, rows: int, columns: int) -> Case:
    """Random codes with both ends of their range; scales of either sign where GGUF has blocks for them."""

    def make(generator: torch.Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        codes = torch.randint(0, 1 << bits, (rows, columns), dtype=dtype, generator=generator)
        codes.view(-1)[:2] = torch.tensor([(1 << bits) - 1, 0], dtype=dtype)[: codes.numel()]
        blocks = bits in (4, 8) and rows and columns % _BLOCK == 0
        scale = torch.randn(rows, columns // _BLOCK, generator=generator).half() if blocks else None
        return codes, bits, scale

    return Case(f"w{bits}-{name}", make, (torch.uint8,))


SPEC = OpSpec(
    name="packing",
    public=_public,
    reference=_reference,
    exact=_exact,
    triton=None,
    cases=tuple(
        _case(name, bits, rows, columns)
        for bits in op.BIT_WIDTHS
        for name, rows, columns in (
            ("whole-words", 32, 96),
            ("tail", 5, 43),  # at 3 bits, codes 10, 21 and 42 straddle two words
            ("one-row", 1, 11),
            ("one-column", 7, 1),
            ("no-row", 0, 8),
        )
    ),
    tolerances={torch.uint8: 0.0},
)
