"""Attention to first and newest tokens, with gradients: the branch of a streaming head while gates are optimised.

Row i sees key j if ``j <= i`` and ``j < sink or j > i - recent``, exactly, not in blocks of tokens. Rows are taken in
blocks of ``recent``, each with the keys that any of them sees, so that time and memory grow with the length alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.kernels.flash_prefill import flash_prefill
from compress.tap import Seen

LEAST_ROWS = 64  # of a block, however short the window


def streaming(seen: Seen, sink: int, recent: int) -> Tensor:
    """What every head would give as a streaming head.

    Args:
        seen: queries, keys and values of one layer.
        sink: first tokens that every row sees.
        recent: newest tokens that a row sees, itself among them.

    Returns:
        [batch, T, heads, head_dim].
    """
    if not torch.is_grad_enabled():
        kv_heads = seen.key.shape[1]
        reach = torch.tensor([[sink, recent]] * kv_heads, device=seen.key.device)
        return flash_prefill(seen.query, seen.key, seen.value, seen.scaling, reach=reach)[0].transpose(1, 2)
    length = seen.query.shape[2]
    rows = max(recent, LEAST_ROWS)
    return torch.cat(
        [_rows(seen, start, min(start + rows, length), sink, recent) for start in range(0, length, rows)], 1
    )


def _rows(seen: Seen, start: int, end: int, sink: int, recent: int) -> Tensor:
    """Rows ``start`` to ``end``, ``[batch, rows, heads, head_dim]``."""
    first = max(start - recent + 1, 0)
    group = seen.query.shape[1] // seen.key.shape[1]
    places = torch.cat([torch.arange(min(sink, first)), torch.arange(first, end)]).to(seen.key.device)
    rows = torch.arange(start, end, device=places.device)[:, None]
    mask = (places <= rows) & ((places < sink) | (places > rows - recent))

    def near(x: Tensor) -> Tensor:
        return torch.cat([x[:, :, : min(sink, first)], x[:, :, first:end]], 2).repeat_interleave(group, 1)

    query = seen.query[:, :, start:end]
    found = F.scaled_dot_product_attention(query, near(seen.key), near(seen.value), mask, scale=seen.scaling)
    return found.transpose(1, 2)
