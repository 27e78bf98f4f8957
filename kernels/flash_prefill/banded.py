"""Attention to sinks and a window on a CPU, for rows whose window begins behind the sinks.

Blocks of rows are one batch: the keys of their windows are overlapping views of the same memory, and all blocks share
one mask. Sinks, which all of these rows see, are a second call without a mask, merged by log-sum-exp. On one thread
(AVX-512) 8192 rows of three query heads of 64 take 52 ms at a sink of 64 and a window of 256, by 256 rows at a time,
each with its own mask and keys copied for every query head, 103 ms.
"""

import math

import torch
from torch import Tensor

NARROW, WIDE = 64, 256  # rows of a block; more waste more of a short window, fewer make small products


def block_rows(window: int) -> int:
    """Rows of a block at a window: a power of two, about a fourth of it."""
    return max(NARROW, min(WIDE, 2 ** int(math.log2(max(window, 4) / 4))))


def banded(q: Tensor, k: Tensor, v: Tensor, reach: tuple[int, int], scale: float) -> tuple[Tensor, Tensor]:
    """Rows at the last R of T slots, over the first ``sink`` slots and the ``window`` newest, their own among them.

    Args:
        q: rows of the query heads of one KV head, ``[G, R, D]``, R a multiple of :func:`block_rows`.
        k: keys ``[T, D]``, with ``sink + window <= T - R``.
        v: values alike.
        reach: sink and window.
        scale: factor of the scores.

    Returns:
        Output ``[blocks, G, rows, D]`` and log-sum-exp ``[blocks, G, rows]``, block by block.
    """
    sink, window = reach
    rows = block_rows(window)
    group, count, _ = q.shape
    near = slice(len(k) - count - window, None)
    queries = _blocks(q, rows)
    keys, values = (_windows(x[near], rows + window, rows).expand(-1, group, -1, -1) for x in (k, v))
    row, there = torch.arange(rows)[:, None], torch.arange(rows + window)  # there is `window` slots before row 0
    seen = (there > row) & (there <= row + window)
    penalty = torch.zeros(1, 1, rows, rows + window, dtype=q.dtype).masked_fill_(~seen, -math.inf)
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = attend(queries, keys, values, 0.0, False, attn_mask=penalty, scale=scale)
    if sink == 0:
        return out, lse
    first, total = attend(
        q[None],
        *(x[None, None, :sink].expand(-1, group, -1, -1) for x in (k, v)),
        0.0,
        False,
        attn_mask=None,
        scale=scale,
    )
    first, total = _blocks(first[0], rows), total[0].unflatten(1, (-1, rows)).transpose(0, 1)
    share = torch.sigmoid(total - lse)[..., None].to(torch.promote_types(out.dtype, torch.float32))
    return torch.lerp(out.to(share.dtype), first.to(share.dtype), share), torch.logaddexp(lse, total)


def _blocks(rows: Tensor, size: int) -> Tensor:
    """``[G, R, D]`` as ``[R / size, G, size, D]``."""
    return rows.unflatten(1, (-1, size)).transpose(0, 1)


def _windows(states: Tensor, size: int, step: int) -> Tensor:
    """Views of ``[T, D]`` that overlap, ``[n, 1, size, D]``."""
    return states.unfold(0, size, step).transpose(1, 2)[:, None]
