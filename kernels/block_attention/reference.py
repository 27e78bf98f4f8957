"""Block-sparse attention: the definition, every probability held at once."""

from compress.kernels.block_attention.blocks import BlockList
from compress.kernels.flash_prefill.reference import attend
from torch import Tensor


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockList, scaling: float | None = None, bounds: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`compress.kernels.block_attention.block_attention`; in float64 where q is, else in float32."""
    seen = blocks.visible(q.shape[2], k.shape[2], bounds)
    if seen.shape[1] == k.shape[1]:
        return attend(q, k, v, scaling, seen)
    group = q.shape[1] // k.shape[1]  # a list of its own for every query head
    keys, values = (x.repeat_interleave(group, 1) for x in (k, v))
    return attend(q, keys, values, scaling, seen)
