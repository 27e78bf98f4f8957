"""Attention of the newest tokens over a cache: the definition, every probability held at once."""

import torch
from compress.kernels.flash_prefill.reference import attend, visible
from torch import Tensor


def flash_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float | None = None,
    bounds: Tensor | None = None,
    reach: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`compress.kernels.flash_decode.flash_decode`; in float64 where the queries are, else in float32."""
    count, length = q.shape[2], k.shape[2]
    end = torch.full((len(q), 1), length, device=q.device) if bounds is None else bounds[:, 1:]
    rows = end - count + torch.arange(count, device=q.device)
    return attend(q, k, v, scaling, visible(rows, k, bounds, reach))
