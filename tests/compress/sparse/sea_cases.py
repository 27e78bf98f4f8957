"""Queries, keys and values for SEA's tests, and an estimator whose every parameter counts."""

import torch
from torch import Tensor

from compress.sparse.sea import Estimator, Shape

SHAPE = Shape(heads=4, kv_heads=2, head_dim=8, length=320, width=16, divisor=1)


def drawn(tokens: int, seed: int = 0, batch: int = 1, shape: Shape = SHAPE) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries ``[batch, H, tokens, D]``, keys and values ``[batch, Hkv, tokens, D]``."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(batch, heads, tokens, shape.head_dim, generator=generator)
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    return q, k, v


def estimator(shape: Shape = SHAPE, seed: int = 0) -> Estimator:
    """Every parameter is random, gains and biases too."""
    found = Estimator(shape, seed).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed + 100)
    for parameter in found.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return found
