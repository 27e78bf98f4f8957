"""Attention over lists of key blocks, a sink and a window: what every dynamic sparse method hands to."""

from compress.kernels import dispatch
from compress.kernels.block_attention import cpu
from compress.kernels.block_attention import reference as _reference
from compress.kernels.block_attention import triton as _triton
from compress.kernels.block_attention.blocks import BlockList
from compress.kernels.flash_prefill import check
from compress.kernels.flash_prefill.triton import supports
from torch import Tensor

__all__ = ["BlockList", "block_attention", "path"]


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockList, scaling: float | None = None, bounds: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Exact softmax attention over the visible set of `BlockList`, and its log-sum-exp.

    The sparse attention of HiP (arXiv 2406.09827, section 3), which SEA's masks and others' are written as too. One
    query row (decoding) and many (a prompt) are the same operation.

    Args:
        q: queries after rotary embedding ``[B, H, R, D]``, R <= T, float16, bfloat16 or float32.
        k: keys after rotary embedding ``[B, Hkv, T, D]``; H is a multiple of Hkv.
        v: values ``[B, Hkv, T, D]``.
        blocks: for these rows, with lists per KV head or per query head.
        scaling: factor of the scores; None for ``1 / sqrt(D)``.
        bounds: integers ``[B, 2]``, first slot and one past the last of every sequence, ``0 <= first <= last <= T``, so
            that a cache may be longer than what is filled; None: all slots of all.

    Returns:
        Output ``[B, H, R, D]`` in the dtype of q, and the natural log-sum-exp of the scores ``[B, H, R]`` float32. A
        row before its sequence's first slot gives zeros and minus infinity.

    Raises:
        ValueError: shapes, bounds or lists that don't fit; a GPU that can't run the kernel.
    """
    check(q, k, v, bounds, None)
    blocks.check((q.shape[0], q.shape[1], q.shape[2]), k.shape[1])
    if path(q) == "triton":
        return _triton.block_attention(q, k, v, blocks, scaling, bounds)
    if q.device.type == "cpu":
        return cpu.block_attention(q, k, v, blocks, scaling, bounds)
    return _reference.block_attention(q, k, v, blocks, scaling, bounds)


def path(q: Tensor) -> dispatch.Path:
    """The path that `block_attention` takes; "reference" is PyTorch, on a CPU with gathered keys."""
    return dispatch.pick(q.device, has_triton=supports(q))
