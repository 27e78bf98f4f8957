"""Partial attention results over disjoint keys become one, by their log-sum-exp."""

from collections.abc import Sequence

import torch
from torch import Tensor


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The attention over all keys together: ``out = sum_i exp(lse_i - lse) out_i``, ``lse = log sum_i exp(lse_i)``.

    Args:
        parts: at least one pair of outputs ``[B, H, R, D]`` and natural log-sum-exps ``[B, H, R]``.

    Returns:
        The merged pair, in the dtypes of the first; zeros and minus infinity for a row that saw nothing anywhere.

    Raises:
        ValueError: no parts, or parts of different shapes.
    """
    if not parts:
        raise ValueError("there are no partial results to merge")
    out, lse = parts[0]
    if any(o.shape != out.shape or own.shape != out.shape[:3] for o, own in parts):
        shapes = ", ".join(f"{list(o.shape)} with {list(own.shape)}" for o, own in parts)
        raise ValueError(f"partial results must be [B, H, R, D] with [B, H, R], all of one shape, got {shapes}")
    if len(parts) == 1:
        return out, lse
    exponents = torch.stack([own for _, own in parts])
    total = exponents.logsumexp(0)
    weights = (exponents - total.masked_fill(total == -torch.inf, 0.0)).exp().unsqueeze(-1)
    wide = torch.promote_types(out.dtype, torch.float32)
    merged = torch.zeros_like(out, dtype=wide)
    for weight, (part, _) in zip(weights, parts, strict=True):
        merged += weight.to(wide) * part.to(wide)
    return merged.to(out.dtype), total.to(lse.dtype)
