"""Dense causal attention: the definition, every probability held at once."""

import math

import torch
from torch import Tensor


def flash_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float | None = None,
    bounds: Tensor | None = None,
    reach: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`compress.kernels.flash_prefill.flash_prefill`; in float64 where the queries are, else in float32."""
    rows = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device)
    return attend(q, k, v, scaling, visible(rows.expand(q.shape[0], -1), k, bounds, reach))


def visible(rows: Tensor, k: Tensor, bounds: Tensor | None, reach: Tensor | None) -> Tensor:
    """Which keys every row attends to: ``[B or 1, Hkv or 1, R, T]`` bool.

    Args:
        rows: slot of every query row ``[B, R]``.
        k: keys ``[B, Hkv, T, D]``.
        bounds: ``[B, 2]``, slot of the first key and one past the last key of every sequence.
        reach: ``[Hkv, 2]``, sink and window of every KV head.
    """
    slots, place = torch.arange(k.shape[2], device=k.device), rows[:, None, :, None]
    seen = slots <= place
    first: Tensor | int = 0
    if bounds is not None:
        first, end = bounds[:, 0, None, None, None], bounds[:, 1, None, None, None]
        seen = seen & (slots >= first) & (slots < end) & (place >= first) & (place < end)
    if reach is not None:
        sink, window = reach[:, 0, None, None], reach[:, 1, None, None]
        seen = seen & ((slots - first < sink) | (slots > place - window))
    return seen


def attend(q: Tensor, k: Tensor, v: Tensor, scaling: float | None, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention over the keys that are seen: output in the dtype of q, and the rows' log-sum-exp."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, count, width = q.shape
    kv_heads = k.shape[1]
    grouped = q.to(dtype).reshape(batch, kv_heads, heads // kv_heads, count, width)
    scores = grouped @ k.to(dtype)[:, :, None].transpose(-1, -2) * (width**-0.5 if scaling is None else scaling)
    scores = scores.masked_fill(~seen[:, :, None], -math.inf)
    lse = scores.logsumexp(-1)
    base = lse.masked_fill(lse == -math.inf, 0.0)  # a row that sees nothing
    weights = (scores - base[..., None]).exp()
    out = weights @ v.to(dtype)[:, :, None]
    return out.reshape(q.shape).to(q.dtype), lse.reshape(batch, heads, count)
