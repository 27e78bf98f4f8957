"""Dense causal attention of many query rows, with grouped heads, ragged batches, and a sink and window a KV head."""

from compress.kernels import dispatch
from compress.kernels.flash_prefill import cpu
from compress.kernels.flash_prefill import reference as _reference
from compress.kernels.flash_prefill import triton as _triton
from torch import Tensor

__all__ = ["check", "flash_prefill", "path"]


def flash_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float | None = None,
    bounds: Tensor | None = None,
    reach: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``softmax(scaling q k^T) v`` with online softmax (FlashAttention, arXiv 2205.14135), and its log-sum-exp.

    Keys lie in T slots. The rows of q are the last R slots, so that row r is at slot T - R + r, and a row attends the
    slots up to its own. Batches are ragged by ``bounds``: sequence b is in slots ``bounds[b, 0] : bounds[b, 1]``, with
    padding to the left, to the right, or both. ``reach`` narrows a KV head to a sink and a window: the row at slot i
    attends slot j <= i if ``j - bounds[b, 0] < sink`` or ``j > i - window``. Two results over disjoint keys merge by
    their log-sum-exp: ``out = sum_s exp(lse_s - lse) out_s``.

    Args:
        q: queries after rotary embedding ``[B, H, R, D]``, R <= T, float16, bfloat16 or float32.
        k: keys after rotary embedding ``[B, Hkv, T, D]``; H is a multiple of Hkv.
        v: values ``[B, Hkv, T, D]``.
        scaling: factor of the scores; None for ``1 / sqrt(D)``.
        bounds: integers ``[B, 2]``, first slot and one past the last, ``0 <= first <= last <= T``; None: all slots of
            all sequences. Only a GPU doesn't look at the numbers first, which would make it wait: there they are cut
            to what is allowed.
        reach: integers ``[Hkv, 2]``, sink >= 0 and window >= 1 in tokens; a window of T or more means a full head.
            None: full heads.

    Returns:
        Output ``[B, H, R, D]`` in the dtype of q, and the natural log-sum-exp of the scores ``[B, H, R]`` float32. A
        row outside its sequence's bounds gives zeros and minus infinity.

    Raises:
        ValueError: shapes, bounds or reach that don't fit; a GPU that can't run the kernel.
    """
    check(q, k, v, bounds, reach)
    if path(q) == "triton":
        return _triton.flash_prefill(q, k, v, scaling, bounds, reach)
    if q.device.type == "cpu":
        return cpu.flash_prefill(q, k, v, scaling, bounds, reach)
    return _reference.flash_prefill(q, k, v, scaling, bounds, reach)


def path(q: Tensor) -> dispatch.Path:
    """The path that `flash_prefill` takes; "reference" is PyTorch, on a CPU its blockwise attention."""
    return dispatch.pick(q.device, has_triton=_triton.supports(q))


def check(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, reach: Tensor | None) -> None:
    """The shapes of `flash_prefill` and `flash_decode`, and on a CPU the numbers of bounds and reach.

    Raises:
        ValueError: they don't fit each other.
    """
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, v))
        raise ValueError(f"queries [B, H, R, D] don't fit keys and values [B, Hkv, T, D]: {shapes}")
    if q.dtype != k.dtype or q.dtype != v.dtype:
        raise ValueError(f"queries, keys and values must have one dtype: {q.dtype}, {k.dtype}, {v.dtype}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads aren't a multiple of {k.shape[1]} KV heads")
    if q.shape[2] > k.shape[2]:
        raise ValueError(f"{q.shape[2]} query rows don't fit {k.shape[2]} keys")
    for name, pairs, rows in (("bounds", bounds, k.shape[0]), ("reach", reach, k.shape[1])):
        if pairs is None:
            continue
        if pairs.shape != (rows, 2) or pairs.is_floating_point():
            raise ValueError(f"{name} must be integers [{rows}, 2], got {pairs.dtype} of shape {list(pairs.shape)}")
        if pairs.device != q.device:
            raise ValueError(f"{name} must be on {q.device} like the queries, got {pairs.device}")
    if q.device.type == "cpu":
        _check_numbers(k.shape[2], bounds, reach)


def _check_numbers(length: int, bounds: Tensor | None, reach: Tensor | None) -> None:
    for b, (first, end) in enumerate(() if bounds is None else bounds.tolist()):
        if not 0 <= first <= end <= length:
            raise ValueError(f"bounds of sequence {b} are {first}:{end}, which isn't a range within {length} slots")
    for head, (sink, window) in enumerate(() if reach is None else reach.tolist()):
        if sink < 0 or window < 1:
            raise ValueError(f"reach of KV head {head} is a sink of {sink} and a window of {window}, at least 0 and 1")
