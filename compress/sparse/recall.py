"""How much of the true attention lists of blocks see."""

import torch
from torch import Tensor

from compress.kernels.block_attention import BlockList, block_attention
from compress.kernels.flash_prefill import flash_prefill


def recall(
    q: Tensor, k: Tensor, blocks: BlockList, scaling: float | None = None, bounds: Tensor | None = None
) -> Tensor:
    """Share of every row's attention mass that is in its visible set, ``exp(lse_seen - lse_all)``.

    Both log-sum-exps come out of attention kernels, so that no probability is held.

    Args:
        q: queries ``[B, H, R, D]``.
        k: keys ``[B, Hkv, T, D]``.
        blocks: for these rows.
        scaling: factor of the scores; None for ``1 / sqrt(D)``.
        bounds: ``[B, 2]``, first slot and one past the last of every sequence; None: all slots.

    Returns:
        ``[B, H, R]`` float32 from 0 to 1; NaN for rows of padding.
    """
    _, seen = block_attention(q, k, k, blocks, scaling, bounds)
    _, everything = flash_prefill(q, k, k, scaling, bounds)
    return torch.exp(seen - everything).clamp(max=1.0)
