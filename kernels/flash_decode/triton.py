"""Attention of the newest tokens on a GPU: the keys are split over programs, a second kernel merges by log-sum-exp.

The rows of one KV head's query heads are one tile, so that keys are read once and multiplied on tensor cores. The
number of splits depends on the shapes and the GPU alone, and every split has its own place in memory: bits repeat.
"""

import math

import torch
from compress.kernels.flash_prefill.triton import UNLIMITED, load_rows, online_softmax, sequence_bounds
from compress.kernels.triton_support import Launch, compute_type, jit, multiprocessors, tl
from torch import Tensor

KEYS_A_SPLIT = 256  # at least
MAX_SPLITS = 64
MAX_ROWS = 64  # query rows of one KV head


@jit(do_not_specialize=["length"])
def decode_split(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, part_ptr, lse_ptr, bounds_ptr, reach_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, length, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, COUNT: tl.constexpr, SPLITS: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BOUNDS: tl.constexpr, REACH: tl.constexpr,
    TYPE: tl.constexpr,
):  # fmt: skip
    """Grid [splits, Hkv, B]: output ``[B, Hkv, splits, rows, D]`` of a split and its log-sum-exp in powers of two.

    The keys in reach, the sink and then the window, are numbered without the gap between them, and cut into equal runs.
    """
    split, kv_head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows, d = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    first, end = 0, length
    if BOUNDS:
        first, end = sequence_bounds(bounds_ptr, batch, length)
    places = end - COUNT + rows % COUNT
    sink, window, left = 0, 1 << 30, first
    if REACH:
        sink = tl.minimum(tl.maximum(tl.load(reach_ptr + kv_head * 2), 0), end - first)
        window = tl.load(reach_ptr + kv_head * 2 + 1)
        left = tl.maximum(first + sink, end - COUNT - window + 1)
    reachable = sink + tl.maximum(end - left, 0)
    run = ((reachable + BLOCK_K - 1) // BLOCK_K + SPLITS - 1) // SPLITS * BLOCK_K
    stop = tl.minimum((split + 1) * run, reachable)

    q_rows = (kv_head * GROUP + rows // COUNT)[:, None].to(tl.int64) * q_head + (rows % COUNT)[:, None] * q_row
    q = tl.load(
        q_ptr + batch * q_batch + q_rows + d[None, :],
        mask=(rows[:, None] < GROUP * COUNT) & (d[None, :] < D),
        other=0.0,
    ).to(TYPE)
    k_ptr += batch * k_batch + kv_head * k_head
    v_ptr += batch * v_batch + kv_head * v_head
    m = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for start in range(split * run, stop, BLOCK_K):
        number = start + tl.arange(0, BLOCK_K)
        keys = first + number
        if REACH:
            keys = tl.where(number < sink, keys, left + number - sink)
        k = load_rows(k_ptr, keys, k_row, d, end, D, BLOCK_D, True, TYPE)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        distance = places[:, None] - keys[None, :]
        seen = (distance >= 0) & (number[None, :] < stop)
        if REACH:
            seen &= (number[None, :] < sink) | (distance < window)
        v = load_rows(v_ptr, keys, v_row, d, end, D, BLOCK_D, True, TYPE)
        m, total, acc = online_softmax(m, total, acc, tl.where(seen, s, float("-inf")), v)

    seeing = total > 0
    total = tl.where(seeing, total, 1.0)
    row = ((batch * KV_HEADS + kv_head) * SPLITS + split) * (GROUP * COUNT) + rows
    tl.store(lse_ptr + row, tl.where(seeing, m + tl.log2(total), float("-inf")), mask=rows < GROUP * COUNT)
    tl.store(
        part_ptr + row[:, None] * D + d[None, :],
        acc / total[:, None],
        mask=(rows[:, None] < GROUP * COUNT) & (d[None, :] < D),
    )


@jit
def merge_splits(  # type: ignore[no-untyped-def]
    part_ptr, part_lse_ptr, out_ptr, lse_ptr,
    KV_HEADS: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid [rows, Hkv, B]: ``out = sum_s exp(lse_s - lse) out_s``; zeros, minus infinity where none saw a key."""
    row, kv_head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    d, splits = tl.arange(0, BLOCK_D), tl.arange(0, SPLITS)
    head = batch * KV_HEADS + kv_head
    m = tl.max(tl.load(part_lse_ptr + (head * SPLITS + splits) * ROWS + row), 0)
    base = tl.where(m == float("-inf"), 0.0, m)
    total = 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in tl.static_range(0, SPLITS, CHUNK):
        place = (head * SPLITS + start + tl.arange(0, CHUNK)) * ROWS + row
        weight = tl.exp2(tl.load(part_lse_ptr + place) - base)
        total += tl.sum(weight, 0)
        part = tl.load(part_ptr + place[:, None] * D + d[None, :], mask=d[None, :] < D, other=0.0)
        acc += tl.sum(weight[:, None] * part, 0)
    seeing = total > 0
    total = tl.where(seeing, total, 1.0)
    place = head * ROWS + row
    tl.store(lse_ptr + place, tl.where(seeing, (base + tl.log2(total)) * 0.6931471805599453, float("-inf")))
    tl.store(out_ptr + place * D + d, acc / total, mask=d < D)


def flash_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float | None = None,
    bounds: Tensor | None = None,
    reach: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`compress.kernels.flash_decode.flash_decode`; on a GPU."""
    outputs, passes = launches(q, k, v, scaling, bounds, reach)
    for launch in passes:
        launch.start()
    return outputs


def launches(
    q: Tensor, k: Tensor, v: Tensor, scaling: float | None, bounds: Tensor | None, reach: Tensor | None
) -> tuple[tuple[Tensor, Tensor], tuple[Launch, Launch]]:
    """The output ``[B, H, R, D]`` and log-sum-exp ``[B, H, R]`` that the two launches fill.

    Raises:
        ValueError: more than `MAX_ROWS` query rows a KV head.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    (batch, heads, count, width), (kv_heads, length) = q.shape, k.shape[1:3]
    group = heads // kv_heads
    rows = group * count
    if rows > MAX_ROWS:
        raise ValueError(f"flash_decode takes at most {MAX_ROWS} query rows a KV head, got {rows}; use flash_prefill")
    shares = split_count(batch * kv_heads, length, multiprocessors(q.device))
    part = torch.empty(batch, kv_heads, shares, rows, width, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(part.shape[:4], dtype=torch.float32, device=q.device)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, count, dtype=torch.float32, device=q.device)
    sizes = {"KV_HEADS": kv_heads, "SPLITS": shares, "D": width, "BLOCK_D": max(16, 1 << (width - 1).bit_length())}
    arguments = {
        "q_ptr": q, "k_ptr": k, "v_ptr": v, "part_ptr": part, "lse_ptr": part_lse,
        "bounds_ptr": None if bounds is None else bounds.to(torch.int32).contiguous(),
        "reach_ptr": None if reach is None else reach.clamp(max=UNLIMITED).to(torch.int32).contiguous(),
        "q_batch": q.stride(0), "q_head": q.stride(1), "q_row": q.stride(2),
        "k_batch": k.stride(0), "k_head": k.stride(1), "k_row": k.stride(2),
        "v_batch": v.stride(0), "v_head": v.stride(1), "v_row": v.stride(2),
        "length": length, "scale": (width**-0.5 if scaling is None else scaling) * math.log2(math.e),
    }  # fmt: skip
    block_r, block_k, warps, stages = tile(rows, width, q.element_size())
    constexprs = sizes | {
        "GROUP": group, "COUNT": count, "BLOCK_R": block_r, "BLOCK_K": block_k,
        "BOUNDS": bounds is not None, "REACH": reach is not None, "TYPE": compute_type(q.dtype),
    }  # fmt: skip
    merged = {"part_ptr": part, "part_lse_ptr": part_lse, "out_ptr": out, "lse_ptr": lse}
    empty = 0 if rows == 0 else shares
    return (out, lse), (
        Launch(decode_split, (empty, kv_heads, batch), arguments, constexprs, warps, stages),
        Launch(merge_splits, (rows, kv_heads, batch), merged, sizes | {"ROWS": rows, "CHUNK": min(shares, 16)}, 4, 1),
    )


def tile(rows: int, width: int, size: int) -> tuple[int, int, int, int]:
    """Query rows and keys a tile, warps, stages: the most that spill no register and fit shared memory on any target.

    float32 doesn't use tensor cores, so its tiles are small.
    """
    block_r = max(16, 1 << (max(1, rows) - 1).bit_length())
    if size == 4 and width > 128:
        return block_r, 16, 4 if block_r == 16 else 8, 2
    if size == 4 and (width > 64 or block_r > 16):
        return block_r, 16, block_r // 4, 3
    if block_r == MAX_ROWS:
        return block_r, 32 if width <= 128 else 16, 8, 3
    return block_r, 64 if block_r == 16 and width <= 128 and size == 2 else 32, 4, 3


def split_count(heads: int, length: int, processors: int) -> int:
    """How many programs share the keys of one KV head: a power of two that fills the GPU twice, of 256 keys or more."""
    wanted = min(2 * processors // max(1, heads), -(-length // KEYS_A_SPLIT), MAX_SPLITS)
    return 1 << (max(1, wanted).bit_length() - 1)
