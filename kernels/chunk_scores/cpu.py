"""Scores of chunks on a CPU: some rows' representative keys are gathered at once, BLAS does the products."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Read = Callable[[Tensor], Tensor]

GATHERED = 1 << 21  # bytes of keys that are gathered at once: they are to stay in a cache


def chunk_scores(q: Tensor, k: Tensor, base: Tensor, starts: Tensor, ends: Tensor, chunk: int) -> Tensor:
    """See :func:`compress.kernels.chunk_scores.chunk_scores`."""
    return descend(q, lambda places: k.index_select(0, places).float(), base, starts, ends, chunk)


def descend(q: Tensor, read: Read, base: Tensor, starts: Tensor, ends: Tensor, chunk: int) -> Tensor:
    """See :func:`compress.kernels.chunk_scores.descend`."""
    out = torch.empty(starts.shape, device=q.device)
    size = max(1, GATHERED // (8 * q.shape[2] * max(1, starts.shape[1])))
    for first in range(0, len(q), size):
        some = slice(first, first + size)
        _descend(q[some].float(), read, base[some], starts[some], ends[some], chunk, out[some])
    return out


def _descend(q: Tensor, read: Read, base: Tensor, starts: Tensor, ends: Tensor, chunk: int, out: Tensor) -> None:
    """Every chunk of some rows ``[n, C]``; slots are counted over all keys from here on."""
    origin = base.int()[:, None]
    last = (origin + ends.int()[:, None] - 1).clamp(min=0)[..., None]
    left = starts + origin
    out.fill_(-math.inf)
    size = chunk
    while size > 1:
        half, quarter = size // 2, size // 4
        places = torch.stack([left + quarter, left + (half + quarter)], -1)
        places = torch.minimum(places, last).clamp_(min=0)
        keys = read(places.flatten()).view(len(q), -1, q.shape[2])
        scores = torch.bmm(q, keys.transpose(1, 2)).amax(1).view(places.shape)
        left = left + (scores[..., 1] >= scores[..., 0]) * half
        torch.maximum(out, scores.amax(-1), out=out)
        size = half
    out.masked_fill_((starts < 0) | (starts >= ends[:, None]), -math.inf)
