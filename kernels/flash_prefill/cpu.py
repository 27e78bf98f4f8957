"""Dense causal attention on a CPU: PyTorch's blockwise kernel, which also gives the log-sum-exp, on keys in reach."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

QUERY_BLOCK = 256  # query rows that share one mask


@dataclass(frozen=True)
class Part:
    """Which sequences and KV heads are treated together, and what holds for them.

    Attributes:
        heads: of the ``B * Hkv`` pairs of sequence and KV head.
        first: slot of the first key.
        end: one past the slot of the last key.
        sink: how many first keys every row sees.
        window: how many last keys every row sees.
    """

    heads: slice
    first: int
    end: int
    sink: int
    window: int


def flash_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float | None = None,
    bounds: Tensor | None = None,
    reach: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`compress.kernels.flash_prefill.flash_prefill`."""
    batch, heads, count, width = q.shape
    kv_heads, length = k.shape[1:3]
    group, scale = heads // kv_heads, width**-0.5 if scaling is None else scaling
    queries = q.reshape(batch * kv_heads, group, count, width)
    keys, values = (x.reshape(batch * kv_heads, 1, length, -1).expand(-1, group, -1, -1) for x in (k, v))
    if bounds is None and reach is None and count == length and q.numel():
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries, keys, values, 0.0, True, scale=scale
        )
        return out.reshape(q.shape), lse.reshape(batch, heads, count)
    out = torch.zeros_like(queries, memory_format=torch.contiguous_format)
    lse = torch.full(queries.shape[:3], -math.inf, device=q.device)
    for part in parts(batch, kv_heads, length, bounds, reach):
        offset = length - count  # the slot of row 0
        for start in range(max(0, part.first - offset), max(0, part.end - offset), QUERY_BLOCK):
            rows = slice(start, min(start + QUERY_BLOCK, part.end - offset))
            chosen, penalty = slots(part, rows.start + offset, rows.stop + offset)
            if group == 0 or queries[part.heads].numel() == 0:
                continue
            out[part.heads, :, rows], lse[part.heads, :, rows] = (
                torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    queries[part.heads, :, rows],
                    chosen_keys(keys[part.heads], chosen),
                    chosen_keys(values[part.heads], chosen),
                    0.0,
                    False,
                    attn_mask=penalty.to(q.dtype),
                    scale=scale,
                )
            )
    return out.reshape(q.shape), lse.reshape(batch, heads, count)


def parts(batch: int, kv_heads: int, length: int, bounds: Tensor | None, reach: Tensor | None) -> list[Part]:
    """What is treated together: everything, or every KV head of every sequence by itself."""
    if bounds is None and reach is None:
        return [Part(slice(None), 0, length, 0, length)]
    spans = [[0, length]] * batch if bounds is None else bounds.tolist()
    windows = [[0, length]] * kv_heads if reach is None else reach.tolist()
    return [
        Part(slice(b * kv_heads + h, b * kv_heads + h + 1), *spans[b], *windows[h])
        for b in range(batch)
        for h in range(kv_heads)
    ]


def slots(part: Part, start: int, stop: int) -> tuple[tuple[slice, slice], Tensor]:
    """The keys in reach of the rows at slots ``start:stop`` (sink, window), and the mask to add ``[1, 1, n, keys]``."""
    sink = slice(part.first, min(part.first + part.sink, stop))
    window = slice(max(sink.stop, start - part.window + 1), stop)
    place = torch.arange(start, stop)[:, None]
    slots = torch.cat([torch.arange(sink.start, sink.stop), torch.arange(window.start, window.stop)])
    seen = (slots <= place) & ((slots < sink.stop) | (slots > place - part.window))
    return (sink, window), torch.zeros(1, 1, *seen.shape).masked_fill_(~seen, -math.inf)


def chosen_keys(x: Tensor, slots: tuple[slice, slice]) -> Tensor:
    """The keys or values ``[n, group, T, D]`` in the slots of the sink and the window."""
    sink, window = slots
    return x[:, :, window] if sink.start >= sink.stop else torch.cat([x[:, :, sink], x[:, :, window]], 2)
