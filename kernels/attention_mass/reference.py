"""Column sums of causal attention probabilities: the definition, every probability held at once."""

import math

import torch
from torch import Tensor


def attention_mass(
    q: Tensor,
    k: Tensor,
    rows: Tensor | None,
    scaling: float,
    window: int | None = None,
    sum_heads: bool = False,
) -> Tensor:
    """See :func:`compress.kernels.attention_mass.attention_mass`; in float64 where the queries are, else in float32."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys = k.to(dtype).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q.to(dtype) @ keys.transpose(-1, -2) * scaling
    visible = visible_keys(positions(q, k, rows), k.shape[2], window)
    scores = scores.masked_fill(~visible, -math.inf)
    mass = scores.softmax(-1).masked_fill(~visible, 0.0).sum(2)  # a row that sees nothing is NaN after the softmax
    return mass.sum(1) if sum_heads else mass


def positions(q: Tensor, k: Tensor, rows: Tensor | None) -> Tensor:
    """Where the query rows stand among the keys, ``[R]``: as given, or the last R positions."""
    if rows is not None:
        return rows
    return torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device)


def visible_keys(rows: Tensor, length: int, window: int | None) -> Tensor:
    """Which keys every row attends to: ``[R, T]`` bool."""
    distance = rows[:, None] - torch.arange(length, device=rows.device)
    visible = distance >= 0
    return visible if window is None else visible & (distance < window)
