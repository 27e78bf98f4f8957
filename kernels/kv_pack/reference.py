"""Quantize and pack keys or values token by token: the definition, step by step in PyTorch."""

import torch
from torch import Tensor

BITS = (2, 4, 8)
CLIP_RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
SMALLEST_SCALE = 2.0**-24  # of float16; a constant token has no range of its own


def kv_pack(
    x: Tensor, bits: int, channels: Tensor | None = None, clip: bool = False, per_token: bool = True
) -> tuple[Tensor, Tensor | None]:
    """See :func:`compress.kernels.kv_pack.kv_pack`; in float64 where x is, else in float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if bits == 8:
        return _symmetric(x)
    scale, mean = (1.0, 0.0) if channels is None else channels.to(x.dtype).split(1, dim=2)
    y = (x - mean) / scale
    if not per_token:
        return pack(y.round().clamp(0, 2**bits - 1), bits), None
    low, high = y.aminmax(dim=-1, keepdim=True) if y.numel() else (y[..., :1], y[..., :1])
    best = _rounded(y, low, high, bits)
    error = _squared_error(y, best, scale)
    for ratio in CLIP_RATIOS[1:] if clip else ():
        middle, reach = (low + high) * 0.5, (high - low) * (0.5 * ratio)
        found = _rounded(y, middle - reach, middle + reach, bits)
        found_error = _squared_error(y, found, scale)
        better = found_error < error
        best = (
            torch.where(better, found[0], best[0]),
            torch.where(better, found[1], best[1]),
            torch.where(better, found[2], best[2]),
        )
        error = torch.where(better, found_error, error)
    codes, step, zero = best
    return pack(codes, bits), torch.cat((step, zero), dim=-1).half()


def kv_unpack(codes: Tensor, params: Tensor | None, bits: int, channels: Tensor | None = None) -> Tensor:
    """See :func:`compress.kernels.kv_pack.kv_unpack`."""
    x = codes.float() if bits == 8 else unpack(codes, bits).float()
    if params is not None:
        x = x * params[..., :1].float()
        if bits != 8:
            x = x + params[..., 1:].float()
    if channels is not None:
        scale, mean = channels.float().split(1, dim=2)
        x = scale * x + mean
    return x


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes ``[..., D]`` as bytes ``[..., D * bits / 8]`` uint8: the first of 8 / bits parts is in the lowest bits."""
    parts = codes.to(torch.uint8).chunk(8 // bits, dim=-1)
    packed = torch.zeros_like(parts[0])
    for place, part in enumerate(parts):
        packed |= part << (bits * place)
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`: codes ``[..., D]`` uint8."""
    return torch.cat([(packed >> (bits * place)) & (2**bits - 1) for place in range(8 // bits)], dim=-1)


def _rounded(y: Tensor, low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and zero point for a range; scale and zero point are rounded first, as they are stored."""
    largest = 2**bits - 1
    step = ((high - low) / largest).clamp(min=SMALLEST_SCALE).half().to(y.dtype)
    zero = low.half().to(y.dtype)
    return ((y - zero) / step).round().clamp(0, largest), step, zero


def _squared_error(y: Tensor, rounded: tuple[Tensor, Tensor, Tensor], scale: Tensor | float) -> Tensor:
    codes, step, zero = rounded
    return (scale * (codes * step + zero - y)).square().sum(dim=-1, keepdim=True)


def _symmetric(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of 8 bits by the token's largest magnitude; a token of zeros has scale 0 and codes 0."""
    largest = x.abs().amax(dim=-1, keepdim=True) if x.numel() else x[..., :1]
    scale = (largest / 127).half()
    step = torch.where(scale == 0, 1.0, scale.to(x.dtype))
    codes = (x / step).round().clamp(-127, 127)
    return torch.where(scale == 0, 0.0, codes).to(torch.int8), scale
