"""Attention of the newest tokens on a CPU: the query heads of a KV head share one product, so keys are read once."""

import math

import torch
from compress.kernels.flash_prefill.cpu import Part, chosen_keys, parts, slots
from torch import Tensor


def flash_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float | None = None,
    bounds: Tensor | None = None,
    reach: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`compress.kernels.flash_decode.flash_decode`."""
    batch, heads, count, width = q.shape
    kv_heads, length = k.shape[1:3]
    scale = width**-0.5 if scaling is None else scaling
    queries = q.reshape(batch * kv_heads, heads // kv_heads, count, width)
    keys, values = (x.reshape(batch * kv_heads, 1, length, -1) for x in (k, v))
    out = torch.zeros_like(queries, memory_format=torch.contiguous_format)
    lse = torch.full(queries.shape[:3], -math.inf, device=q.device)
    for part in parts(batch, kv_heads, length, bounds, reach) if q.numel() else ():
        first_row = max(0, part.first - (part.end - count))
        if part.end <= part.first or first_row >= count:
            continue
        chosen, penalty = _visible(part, part.end - count + first_row, queries.shape[1], q.dtype)
        rows = queries[part.heads, :, first_row:]
        found, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            rows.reshape(len(rows), 1, -1, width),
            chosen_keys(keys[part.heads], chosen),
            chosen_keys(values[part.heads], chosen),
            0.0,
            False,
            attn_mask=penalty,
            scale=scale,
        )
        out[part.heads, :, first_row:] = found.reshape(rows.shape)
        lse[part.heads, :, first_row:] = total.reshape(rows.shape[:3])
    return out.reshape(q.shape), lse.reshape(batch, heads, count)


def _visible(part: Part, start: int, group: int, dtype: torch.dtype) -> tuple[tuple[slice, slice], Tensor | None]:
    """The slots in reach of the rows at ``start`` and later, and the mask of all heads' rows; one row needs none."""
    chosen, penalty = slots(part, start, part.end)
    return chosen, None if part.end - start == 1 else penalty.to(dtype).repeat(1, 1, group, 1)
