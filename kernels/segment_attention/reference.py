"""Attention of a few rows over segments: the definition, every key and value expanded to floats."""

from collections.abc import Sequence

import torch
from compress.kernels.flash_prefill.reference import attend
from compress.kernels.kv_pack.reference import kv_unpack
from compress.kernels.segment_attention.segment import Segment
from torch import Tensor


def segment_attention(q: Tensor, segments: Sequence[Segment], scaling: float) -> tuple[Tensor, Tensor]:
    """See :func:`compress.kernels.segment_attention.segment_attention`; in float64 where q is, else in float32."""
    used = [segment for segment in segments if segment.longest]
    if not used:
        return torch.zeros_like(q), torch.full(q.shape[:3], float("-inf"), device=q.device)
    seen = [existing(segment) for segment in used]
    keys, values = zip(*map(expanded, used), strict=True)
    out, lse = attend(q, torch.cat(keys, dim=2), torch.cat(values, dim=2), scaling, torch.cat(seen, dim=2)[:, :, None])
    return out, lse.float()


def expanded(segment: Segment) -> tuple[Tensor, Tensor]:
    """Keys and values ``[B, Hkv, C, D]`` float32; zeros in slots that don't exist, whatever their memory holds."""
    missing = ~existing(segment)[..., None]
    return (
        _floats(segment.keys, segment.key_bits, segment.key_params, segment.key_channels).masked_fill(missing, 0.0),
        _floats(segment.values, segment.value_bits, segment.value_params, segment.value_channels).masked_fill(
            missing, 0.0
        ),
    )


def existing(segment: Segment) -> Tensor:
    """Which slots are within bounds ``[B, Hkv, C]`` bool."""
    slots = torch.arange(segment.keys.shape[2], device=segment.keys.device)
    return (slots >= segment.bounds[..., :1]) & (slots < segment.bounds[..., 1:])


def _floats(codes: Tensor, bits: int, params: Tensor | None, channels: Tensor | None) -> Tensor:
    if bits != 16:
        return kv_unpack(codes, params, bits, channels)
    if channels is None:
        return codes.float()
    scale, mean = channels.float().split(1, dim=2)
    return scale * codes.float() + mean
