"""How promising chunks of keys are for some query rows: a binary descent in every chunk, all of them side by side."""

import math

import torch
from torch import Tensor


def chunk_scores(q: Tensor, k: Tensor, base: Tensor, starts: Tensor, ends: Tensor, chunk: int) -> Tensor:
    """See :func:`compress.kernels.chunk_scores.chunk_scores`; in float64 where the queries are, else in float32."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    last = ends[:, None].long() - 1
    left, best = starts.long(), torch.full(starts.shape, -math.inf, dtype=dtype, device=q.device)
    size = chunk
    while size > 1:
        half, quarter = size // 2, size // 4
        places = torch.stack([left + quarter, left + half + quarter], -1)
        places = torch.minimum(places, last[..., None]).clamp(min=0)
        keys = k[base[:, None, None].long() + places].to(dtype)  # [N, C, 2, D]
        scores = torch.einsum("npd,ncsd->npcs", q.to(dtype), keys).amax(1)
        left = torch.where(scores[..., 1] >= scores[..., 0], left + half, left)
        best = torch.maximum(best, scores.amax(-1))
        size = half
    return best.masked_fill((starts < 0) | (starts >= ends[:, None]), -math.inf).float()
