"""Attention of a few rows over segments of a cache that are stored in different formats, packed or not."""

from collections.abc import Callable, Sequence

import torch
from compress.kernels import dispatch, native
from compress.kernels.flash_prefill.triton import supports
from compress.kernels.segment_attention import cpu
from compress.kernels.segment_attention import reference as _reference
from compress.kernels.segment_attention import triton as _triton
from compress.kernels.segment_attention.merge import merge
from compress.kernels.segment_attention.segment import Segment
from torch import Tensor

__all__ = ["Segment", "merge", "path", "prepared", "segment_attention"]


def segment_attention(q: Tensor, segments: Sequence[Segment], scaling: float) -> tuple[Tensor, Tensor]:
    """``softmax(scaling q K^T) V`` over the slots of all segments together, and its log-sum-exp.

    Every row sees every slot within bounds: it is for rows that come after all that the segments hold, the newest token
    or a chunk of a prompt, whose own causal part is :func:`compress.kernels.flash_prefill.flash_prefill`'s and joins
    by `merge`. Packed codes are never expanded in memory, because their formula folds into both products:

        q . k_t  = s_t ((q * c_k) . code_t) + z_t sum(q * c_k) + q . mu_k
        sum p v  = c_v * (sum_t (p_t s_t) code_t + sum_t p_t z_t) + mu_v sum_t p_t

    Args:
        q: queries after rotary embedding ``[B, H, R, D]``, float16, bfloat16 or float32 (float64 on a CPU).
        segments: of ``Hkv`` KV heads each, H a multiple of Hkv; without any, or with empty ones alone, nothing is seen.
        scaling: factor of the scores.

    Returns:
        Output ``[B, H, R, D]`` in the dtype of q, and the natural log-sum-exp of the scores ``[B, H, R]`` float32.
        Where a KV head of a sequence has no slot at all: zeros and minus infinity.

    Raises:
        ValueError: shapes that don't fit; a GPU that can't run the kernel.
    """
    _check(q, segments)
    if path(q) == "triton":
        return _triton.segment_attention(q, segments, scaling)
    build = native.library() if path(q) != "reference" else None
    if build is not None:
        return cpu.segment_attention(q, segments, scaling, build)
    return _reference.segment_attention(q, segments, scaling)


def prepared(segments: Sequence[Segment]) -> Callable[[Tensor, float], tuple[Tensor, Tensor]]:
    """`segment_attention` of (q, scaling) over segments that stay where they are, looked at once for many calls.

    Their ``bounds`` are read at every call, so that what is appended within a segment's room is seen. On a CPU
    queries are computed in float32.
    """
    build = native.library() if segments and segments[0].keys.device.type == "cpu" else None
    if build is not None:
        return cpu.Prepared(segments, build)
    return lambda q, scaling: segment_attention(q, segments, scaling)


def path(q: Tensor) -> dispatch.Path:
    """The path that `segment_attention` takes."""
    known = q.dtype in (torch.float16, torch.bfloat16, torch.float32)
    return dispatch.pick(q.device, has_triton=supports(q), has_native=known)


def _check(q: Tensor, segments: Sequence[Segment]) -> None:
    if q.dim() != 4 or not q.is_floating_point():
        raise ValueError(f"queries must be floats [B, H, R, D], got {q.dtype} of shape {list(q.shape)}")
    for number, segment in enumerate(segments):
        batch, kv_heads = segment.keys.shape[:2]
        if batch != q.shape[0] or segment.width != q.shape[3] or kv_heads == 0 or q.shape[1] % kv_heads:
            raise ValueError(
                f"queries [B, H, R, D] = {list(q.shape)} don't fit segment {number} "
                f"with [B, Hkv, C, D] = {[*segment.keys.shape[:3], segment.width]}"
            )
        if kv_heads != segments[0].keys.shape[1]:
            raise ValueError(f"segment {number} has {kv_heads} KV heads, segment 0 has {segments[0].keys.shape[1]}")
