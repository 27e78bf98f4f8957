"""Dense causal attention on a GPU: one block of query rows of one head a program, online softmax over blocks of keys.

The keys of a block of rows are up to four ranges, each with its own loop: the sink, the ragged left edge of the window,
the keys that every row sees, which need no mask, and the diagonal. Whoever brings keys in another form (lists of
blocks, packed codes) changes where a range's keys come from; `online_softmax` stays.
"""

import math

import torch
from compress.kernels.triton_support import Launch, compute_type, jit, tl
from torch import Tensor

UNLIMITED = 1 << 30  # a window that hides nothing
WIDEST = 256  # channels of a head: of more, no tile fits the shared memory of every target


@jit
def online_softmax(m, total, acc, s, v):  # type: ignore[no-untyped-def]
    """Take one block into the running softmax: scores s ``[rows, keys]`` in powers of two, values v ``[keys, D]``."""
    higher = tl.maximum(m, tl.max(s, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing yet
    p = tl.exp2(s - base[:, None])
    keep = tl.exp2(m - base)
    total = total * keep + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision="ieee")
    return higher, total, acc


@jit
def load_rows(  # type: ignore[no-untyped-def]
    ptr, rows, stride, d, end, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr, TYPE: tl.constexpr
):  # fmt: skip
    """Rows of a head ``[rows, BLOCK_D]``; zeros beyond ``end`` if MASKED, and beyond the width of the head."""
    places = ptr + rows[:, None].to(tl.int64) * stride + d[None, :]
    if MASKED:
        found = tl.load(places, mask=(rows[:, None] < end) & (d[None, :] < D), other=0.0)
    elif D != BLOCK_D:
        found = tl.load(places, mask=d[None, :] < D, other=0.0)
    else:
        found = tl.load(places)
    return found.to(TYPE)


@jit
def sequence_bounds(bounds_ptr, batch, length):  # type: ignore[no-untyped-def]
    """First slot of a sequence and one past its last, cut to the keys that there are: nobody checked them before."""
    first = tl.minimum(tl.maximum(tl.load(bounds_ptr + batch * 2), 0), length)
    return first, tl.minimum(tl.maximum(tl.load(bounds_ptr + batch * 2 + 1), first), length)


@jit
def attend_range(  # type: ignore[no-untyped-def]
    m, total, acc, q, k_ptr, v_ptr, k_row, v_row, d, places, low, high, window, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Take the keys ``low:high`` into the running softmax; unmasked ranges are whole blocks that every row sees."""
    for start in range(low, high, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        k = load_rows(k_ptr, keys, k_row, d, high, D, BLOCK_D, MASKED, TYPE)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if MASKED:
            distance = places[:, None] - keys[None, :]
            s = tl.where((distance >= 0) & (distance < window) & (keys[None, :] < high), s, float("-inf"))
        v = load_rows(v_ptr, keys, v_row, d, high, D, BLOCK_D, MASKED, TYPE)
        m, total, acc = online_softmax(m, total, acc, s, v)
    return m, total, acc


@jit(do_not_specialize=["count", "length"])
def prefill(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, bounds_ptr, reach_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, count, length, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr, BOUNDS: tl.constexpr, REACH: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Grid [H, B, blocks of rows]; the last block of rows, which has most to do, comes first."""
    head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    block = tl.num_programs(2) - 1 - tl.program_id(2)
    rows, d = block * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    kv_head = head // GROUP
    offset = length - count
    places = offset + rows
    first, end = 0, length
    if BOUNDS:
        first, end = sequence_bounds(bounds_ptr, batch, length)
    nearest, farthest = offset + block * BLOCK_R, offset + block * BLOCK_R + BLOCK_R - 1
    stop = tl.where(nearest < end, tl.minimum(farthest + 1, end), first)

    q = load_rows(q_ptr + batch * q_batch + head * q_head, rows, q_row, d, count, D, BLOCK_D, True, TYPE)
    k_ptr += batch * k_batch + kv_head * k_head
    v_ptr += batch * v_batch + kv_head * v_head
    m = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    whole, window = first, 1 << 30
    if REACH:
        window = tl.load(reach_ptr + kv_head * 2 + 1)
        sink = tl.minimum(first + tl.maximum(tl.load(reach_ptr + kv_head * 2), 0), stop)
        m, total, acc = attend_range(m, total, acc, q, k_ptr, v_ptr, k_row, v_row, d, places, first, sink, 1 << 30,
                                     scale, D, BLOCK_D, BLOCK_K, True, TYPE)  # fmt: skip
        left = tl.maximum(sink, nearest - window + 1)
        edge = tl.maximum(farthest - window + 1 - left, 0)
        whole = left + (edge + BLOCK_K - 1) // BLOCK_K * BLOCK_K
        m, total, acc = attend_range(m, total, acc, q, k_ptr, v_ptr, k_row, v_row, d, places, left,
                                     tl.minimum(whole, stop), window, scale, D, BLOCK_D, BLOCK_K, True,
                                     TYPE)  # fmt: skip
    diagonal = whole + tl.maximum(tl.minimum(nearest + 1, stop) - whole, 0) // BLOCK_K * BLOCK_K
    m, total, acc = attend_range(m, total, acc, q, k_ptr, v_ptr, k_row, v_row, d, places, whole, diagonal, window,
                                 scale, D, BLOCK_D, BLOCK_K, False, TYPE)  # fmt: skip
    m, total, acc = attend_range(m, total, acc, q, k_ptr, v_ptr, k_row, v_row, d, places, diagonal, stop, window,
                                 scale, D, BLOCK_D, BLOCK_K, True, TYPE)  # fmt: skip

    seeing = (places >= first) & (places < end) & (total > 0)
    total = tl.where(seeing, total, 1.0)
    acc = tl.where(seeing[:, None], acc / total[:, None], 0.0)
    lse = tl.where(seeing, (m + tl.log2(total)) * 0.6931471805599453, float("-inf"))
    row = (batch * HEADS + head) * count + rows
    tl.store(lse_ptr + row, lse, mask=rows < count)
    tl.store(out_ptr + row[:, None] * D + d[None, :], acc, mask=(rows[:, None] < count) & (d[None, :] < D))


def supports(q: Tensor) -> bool:
    """Whether attention has kernels for queries ``[..., D]`` of this dtype and width."""
    return q.dtype in (torch.float16, torch.bfloat16, torch.float32) and q.shape[-1] <= WIDEST


def flash_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float | None = None,
    bounds: Tensor | None = None,
    reach: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`compress.kernels.flash_prefill.flash_prefill`; on a GPU."""
    outputs, launch = launches(q, k, v, scaling, bounds, reach)
    launch.start()
    return outputs


def launches(
    q: Tensor, k: Tensor, v: Tensor, scaling: float | None, bounds: Tensor | None, reach: Tensor | None
) -> tuple[tuple[Tensor, Tensor], Launch]:
    """The output ``[B, H, R, D]`` and log-sum-exp ``[B, H, R]`` that the launch fills."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    (batch, heads, count, width), (kv_heads, length) = q.shape, k.shape[1:3]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, count, dtype=torch.float32, device=q.device)
    block_r, block_k, warps = _blocks(width, q.element_size())
    arguments = {
        "q_ptr": q, "k_ptr": k, "v_ptr": v, "out_ptr": out, "lse_ptr": lse,
        "bounds_ptr": None if bounds is None else bounds.to(torch.int32).contiguous(),
        "reach_ptr": None if reach is None else reach.clamp(max=UNLIMITED).to(torch.int32).contiguous(),
        "q_batch": q.stride(0), "q_head": q.stride(1), "q_row": q.stride(2),
        "k_batch": k.stride(0), "k_head": k.stride(1), "k_row": k.stride(2),
        "v_batch": v.stride(0), "v_head": v.stride(1), "v_row": v.stride(2),
        "count": count, "length": length, "scale": (width**-0.5 if scaling is None else scaling) * math.log2(math.e),
    }  # fmt: skip
    constexprs = {
        "HEADS": heads, "GROUP": heads // kv_heads, "D": width, "BLOCK_D": max(16, 1 << (width - 1).bit_length()),
        "BLOCK_R": block_r, "BLOCK_K": block_k, "BOUNDS": bounds is not None, "REACH": reach is not None,
        "TYPE": compute_type(q.dtype),
    }  # fmt: skip
    return (out, lse), Launch(
        prefill, (heads, batch, -(-count // block_r)), arguments, constexprs, warps, 3 if width <= 128 else 2
    )


def _blocks(width: int, size: int) -> tuple[int, int, int]:
    """Query rows and keys a block, and warps: the largest that spill no register on any target.

    float32 doesn't use tensor cores, so its blocks are small.
    """
    if size == 4:
        return (32, 16, 4) if width <= 64 else (32, 16, 8) if width <= 128 else (16, 16, 4)
    return (128, 64, 8) if width <= 64 else (128, 32, 8) if width <= 128 else (64, 32, 8)
