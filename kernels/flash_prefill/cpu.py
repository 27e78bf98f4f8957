"""Dense causal attention on a CPU: PyTorch's blockwise kernel, which also gives the log-sum-exp, on keys in reach.

Rows whose window begins behind their sinks are treated together (``banded.py``), those before them as plain causal
attention where the sequence begins with them, and what is left in blocks with a mask of their own.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import torch
from compress.kernels.flash_prefill.banded import banded, block_rows
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
    offset = length - count  # the slot of row 0
    for part in parts(batch, kv_heads, length, bounds, reach) if q.numel() else ():
        own = queries[part.heads], keys[part.heads], values[part.heads]
        for start, stop, kind in portions(part, offset):
            rows = slice(start - offset, stop - offset)
            places = out[part.heads, :, rows], lse[part.heads, :, rows]
            _fill(places, (own[0][:, :, rows], *own[1:]), (part, start, stop, kind), scale)
    return out.reshape(q.shape), lse.reshape(batch, heads, count)


Kind = Literal["causal", "banded", "masked"]


def portions(part: Part, offset: int) -> Iterator[tuple[int, int, Kind]]:
    """Slots of rows that are treated at once, first and one past the last, and how.

    Args:
        part: whose rows these are.
        offset: slot of the first row that there is.
    """
    start = min(max(part.first, offset), part.end)
    behind = min(max(part.first + part.sink + part.window, start), part.end)  # windows there begin behind the sinks
    size = block_rows(part.window)
    apart = behind + (part.end - behind) // size * size
    if start == part.first and start < behind:
        yield start, behind, "causal"
        start = behind
    for first, end in ((start, behind), (apart, part.end)):
        for row in range(first, end, QUERY_BLOCK):
            yield row, min(row + QUERY_BLOCK, end), "masked"
    if apart > behind:
        yield behind, apart, "banded"


def _fill(
    places: tuple[Tensor, Tensor],
    states: tuple[Tensor, Tensor, Tensor],
    portion: tuple[Part, int, int, Kind],
    scale: float,
) -> None:
    """Write output and log-sum-exp of a portion's rows."""
    (out, lse), (queries, keys, values), (part, start, stop, kind) = places, states, portion
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if kind == "banded":
        reach, own = (part.sink, part.window), slice(part.first, stop)
        for head in range(len(queries)):
            found, total = banded(queries[head], keys[head, 0, own], values[head, 0, own], reach, scale)
            for place, rows in ((out, found), (lse, total)):
                place[head].unflatten(1, (-1, found.shape[2])).copy_(rows.transpose(0, 1))
        return
    if kind == "causal":
        near = keys[:, :, part.first : stop], values[:, :, part.first : stop]
        penalty = None
    else:
        chosen, seen = slots(part, start, stop)
        near = chosen_keys(keys, chosen), chosen_keys(values, chosen)
        penalty = seen.to(queries.dtype)
    found, total = attend(queries, *near, 0.0, kind == "causal", attn_mask=penalty, scale=scale)
    out.copy_(found)
    lse.copy_(total)


def parts(batch: int, kv_heads: int, length: int, bounds: Tensor | None, reach: Tensor | None) -> list[Part]:
    """What is treated together: everything, or neighbouring KV heads of a sequence that reach equally far."""
    if bounds is None and reach is None:
        return [Part(slice(None), 0, length, 0, length)]
    spans = [[0, length]] * batch if bounds is None else bounds.tolist()
    windows = [[0, length]] * kv_heads if reach is None else reach.tolist()
    runs = [list(own) for _, own in groupby(range(kv_heads), key=windows.__getitem__)]
    return [
        Part(slice(b * kv_heads + own[0], b * kv_heads + own[-1] + 1), *spans[b], *windows[own[0]])
        for b in range(batch)
        for own in runs
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
