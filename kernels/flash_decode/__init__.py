"""Dense attention of the newest token of every sequence over its cache, split over the keys."""

from compress.kernels import dispatch
from compress.kernels.flash_decode import cpu
from compress.kernels.flash_decode import reference as _reference
from compress.kernels.flash_decode import triton as _triton
from compress.kernels.flash_prefill import check
from compress.kernels.flash_prefill.triton import supports
from torch import Tensor

__all__ = ["flash_decode", "path"]


def flash_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float | None = None,
    bounds: Tensor | None = None,
    reach: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``softmax(scaling q k^T) v`` for the newest tokens, and its log-sum-exp.

    The rows of q are the last R tokens of every sequence: row r is at slot ``bounds[b, 1] - R + r``, so that a cache
    may be longer than what is filled, or T - R + r without ``bounds``. What a row attends is as in
    :func:`compress.kernels.flash_prefill.flash_prefill`. On a GPU the keys are split over programs and merged by their
    log-sum-exp (Flash-Decoding), without atomics.

    Args:
        q: queries after rotary embedding ``[B, H, R, D]``, float16, bfloat16 or float32; on a GPU at most 64 rows
            ``R * H / Hkv`` a KV head.
        k: keys after rotary embedding ``[B, Hkv, T, D]``; H is a multiple of Hkv.
        v: values ``[B, Hkv, T, D]``.
        scaling: factor of the scores; None for ``1 / sqrt(D)``.
        bounds: integers ``[B, 2]``, first slot and one past the last, ``0 <= first <= last <= T``; None: all slots of
            all sequences. A GPU cuts them to what is allowed.
        reach: integers ``[Hkv, 2]``, sink >= 0 and window >= 1 in tokens; None: full heads.

    Returns:
        Output ``[B, H, R, D]`` in the dtype of q, and the natural log-sum-exp of the scores ``[B, H, R]`` float32. A
        row before its sequence's first slot gives zeros and minus infinity.

    Raises:
        ValueError: shapes, bounds or reach that don't fit; a GPU that can't run the kernel.
    """
    check(q, k, v, bounds, reach)
    if path(q) == "triton":
        return _triton.flash_decode(q, k, v, scaling, bounds, reach)
    if q.device.type == "cpu":
        return cpu.flash_decode(q, k, v, scaling, bounds, reach)
    return _reference.flash_decode(q, k, v, scaling, bounds, reach)


def path(q: Tensor) -> dispatch.Path:
    """The path that `flash_decode` takes; "reference" is PyTorch, on a CPU its blockwise attention."""
    return dispatch.pick(q.device, has_triton=supports(q))
