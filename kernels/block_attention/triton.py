"""Block-sparse attention on a GPU: listed keys are gathered block by block, sink and window are ranges.

Where the query heads of a KV head share their lists, their rows share a tile, so that gathered keys are read once. With
few rows (decoding) the keys are split over programs and merged by log-sum-exp, as `flash_decode` does: no atomics.
"""

import math
from typing import Any

import torch
from compress.kernels.block_attention.blocks import BlockList
from compress.kernels.flash_decode.triton import MAX_ROWS, merge_splits, split_count, tile
from compress.kernels.flash_prefill.triton import attend_range, load_rows, online_softmax, sequence_bounds
from compress.kernels.triton_support import Launch, compute_type, jit, multiprocessors, tl
from torch import Tensor


@jit
def listed_key(starts_ptr, number, listed, BLOCK_LIST: tl.constexpr):  # type: ignore[no-untyped-def]
    """The slot of a listed key by its number; the sequence's slot 0 beyond ``listed``."""
    start = tl.load(starts_ptr + number // BLOCK_LIST, mask=number < listed, other=0)
    return start + number % BLOCK_LIST


@jit(do_not_specialize=["count", "length", "sink", "window", "blocks", "most"])
def prefill(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, bounds_ptr, starts_ptr, counts_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    count, length, sink, window, blocks, most, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PER_KV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_LIST: tl.constexpr, TILES: tl.constexpr,
    BOUNDS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Grid [list heads, B, blocks of rows * TILES]; the last block of rows, which has most to do, comes first."""
    listing, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    place_in_grid = tl.num_programs(2) - 1 - tl.program_id(2)
    block, packed = place_in_grid // TILES, place_in_grid % TILES * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    rows, heads = block * BLOCK_Q + packed % BLOCK_Q, listing * GROUP + packed // BLOCK_Q
    there = (packed < BLOCK_Q * GROUP) & (rows < count)
    first, end = 0, length
    if BOUNDS:
        first, end = sequence_bounds(bounds_ptr, batch, length)
    places = tl.where(there, end - count + rows, first - 1)
    nearest = end - count + block * BLOCK_Q
    farthest = tl.minimum(nearest + BLOCK_Q, end) - 1

    q_place = batch * q_batch + heads.to(tl.int64) * q_head + rows.to(tl.int64) * q_row
    q = tl.load(q_ptr + q_place[:, None] + d[None, :], mask=there[:, None] & (d[None, :] < D), other=0.0).to(TYPE)
    kv_head = (listing * GROUP // PER_KV).to(tl.int64)
    k_ptr += batch * k_batch + kv_head * k_head
    v_ptr += batch * v_batch + kv_head * v_head
    lists = (batch * tl.num_programs(0) + listing) * blocks + block
    listed = tl.load(counts_ptr + lists) * BLOCK_LIST
    starts_ptr += lists * most
    m = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for begin in range(0, listed, BLOCK_K):
        number = begin + tl.arange(0, BLOCK_K)
        keys = listed_key(starts_ptr, number, listed, BLOCK_LIST)
        inside = (number < listed) & (keys >= first + sink) & (keys <= nearest - window)
        reach = tl.where(inside, keys, end)  # of what isn't to be seen nothing is read
        k = load_rows(k_ptr, reach, k_row, d, end, D, BLOCK_D, True, TYPE)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        s = tl.where(inside[None, :], s, float("-inf"))
        v = load_rows(v_ptr, reach, v_row, d, end, D, BLOCK_D, True, TYPE)
        m, total, acc = online_softmax(m, total, acc, s, v)
    sinks = tl.minimum(first + sink, farthest + 1)
    m, total, acc = attend_range(m, total, acc, q, k_ptr, v_ptr, k_row, v_row, d, places, first, sinks, 1 << 30, scale,
                                 D, BLOCK_D, BLOCK_K, True, TYPE)  # fmt: skip
    left = tl.maximum(first + sink, nearest - window + 1)
    m, total, acc = attend_range(m, total, acc, q, k_ptr, v_ptr, k_row, v_row, d, places, left, farthest + 1, 1 << 30,
                                 scale, D, BLOCK_D, BLOCK_K, True, TYPE)  # fmt: skip

    seeing = total > 0
    total = tl.where(seeing, total, 1.0)
    row = (batch * HEADS + heads) * count + rows
    tl.store(lse_ptr + row, tl.where(seeing, (m + tl.log2(total)) * 0.6931471805599453, float("-inf")), mask=there)
    tl.store(out_ptr + row[:, None] * D + d[None, :], acc / total[:, None], mask=there[:, None] & (d[None, :] < D))


@jit(do_not_specialize=["length", "sink", "window", "most"])
def decode_split(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, part_ptr, lse_ptr, bounds_ptr, starts_ptr, counts_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, length, sink, window, most, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, PER_KV: tl.constexpr, COUNT: tl.constexpr, SPLITS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_LIST: tl.constexpr,
    BOUNDS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Grid [splits, list heads, B]: output ``[B, lists, splits, rows, D]`` of a split and its log-sum-exp to base two.

    The keys that are listed, the sink's and the window's are numbered one after the other, and cut into equal runs.
    """
    split, listing, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows, d = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    first, end = 0, length
    if BOUNDS:
        first, end = sequence_bounds(bounds_ptr, batch, length)
    places = end - COUNT + rows % COUNT
    lists = batch * KV_HEADS + listing
    listed = tl.load(counts_ptr + lists) * BLOCK_LIST
    starts_ptr += lists * most
    sinks = tl.minimum(sink, end - first)
    left = tl.maximum(first + sinks, end - COUNT - window + 1)
    reachable = listed + sinks + tl.maximum(end - left, 0)
    run = ((reachable + BLOCK_K - 1) // BLOCK_K + SPLITS - 1) // SPLITS * BLOCK_K
    stop = tl.minimum((split + 1) * run, reachable)

    head = listing * GROUP + rows // COUNT
    q_place = batch * q_batch + head.to(tl.int64) * q_head + rows % COUNT * q_row
    there = (rows[:, None] < GROUP * COUNT) & (d[None, :] < D)
    q = tl.load(q_ptr + q_place[:, None] + d[None, :], mask=there, other=0.0).to(TYPE)
    kv_head = (listing * GROUP // PER_KV).to(tl.int64)
    k_ptr += batch * k_batch + kv_head * k_head
    v_ptr += batch * v_batch + kv_head * v_head
    m = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for begin in range(split * run, stop, BLOCK_K):
        number = begin + tl.arange(0, BLOCK_K)
        named, near = number < listed, number >= listed + sinks
        keys = listed_key(starts_ptr, number, listed, BLOCK_LIST)
        keys = tl.where(named, keys, tl.where(near, left + number - listed - sinks, first + number - listed))
        inside = (number < stop) & (keys < end) & (~named | ((keys >= first + sinks) & (keys < left)))
        reach = tl.where(inside, keys, end)
        k = load_rows(k_ptr, reach, k_row, d, end, D, BLOCK_D, True, TYPE)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        seen = inside[None, :] & (places[:, None] >= keys[None, :])
        v = load_rows(v_ptr, reach, v_row, d, end, D, BLOCK_D, True, TYPE)
        m, total, acc = online_softmax(m, total, acc, tl.where(seen, s, float("-inf")), v)

    seeing = (total > 0) & (places >= first)
    total = tl.where(total > 0, total, 1.0)
    row = (lists * SPLITS + split) * (GROUP * COUNT) + rows
    tl.store(lse_ptr + row, tl.where(seeing, m + tl.log2(total), float("-inf")), mask=rows < GROUP * COUNT)
    tl.store(part_ptr + row[:, None] * D + d[None, :], acc / total[:, None], mask=there)


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockList, scaling: float | None = None, bounds: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`compress.kernels.block_attention.block_attention`; on a GPU."""
    outputs, passes = launches(q, k, v, blocks, scaling, bounds)
    for launch in passes if q.numel() else ():
        launch.start()
    return outputs


def launches(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockList, scaling: float | None, bounds: Tensor | None
) -> tuple[tuple[Tensor, Tensor], tuple[Launch, ...]]:
    """The output ``[B, H, R, D]`` and log-sum-exp ``[B, H, R]`` that the launches fill."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    (batch, heads, count, width), lists = q.shape, blocks.counts.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, count, dtype=torch.float32, device=q.device)
    arguments = {
        "q_ptr": q, "k_ptr": k, "v_ptr": v,
        "bounds_ptr": None if bounds is None else bounds.to(torch.int32).contiguous(),
        "starts_ptr": blocks.starts.contiguous(), "counts_ptr": blocks.counts.contiguous(),
        "q_batch": q.stride(0), "q_head": q.stride(1), "q_row": q.stride(2),
        "k_batch": k.stride(0), "k_head": k.stride(1), "k_row": k.stride(2),
        "v_batch": v.stride(0), "v_head": v.stride(1), "v_row": v.stride(2),
        "length": k.shape[2], "sink": blocks.sink, "window": min(blocks.window, 1 << 30), "most": blocks.most,
        "scale": (width**-0.5 if scaling is None else scaling) * math.log2(math.e),
    }  # fmt: skip
    constexprs = {
        "GROUP": heads // max(1, lists), "PER_KV": heads // k.shape[1], "D": width,
        "BLOCK_D": max(16, 1 << (width - 1).bit_length()), "BLOCK_LIST": blocks.block_k, "BOUNDS": bounds is not None,
        "TYPE": compute_type(q.dtype),
    }  # fmt: skip
    make = _decode if count <= blocks.block_q and heads // max(1, lists) * count <= MAX_ROWS else _prefill
    return (out, lse), make(arguments, constexprs, blocks, out, lse)


def _prefill(
    arguments: dict[str, Any], constexprs: dict[str, Any], blocks: BlockList, out: Tensor, lse: Tensor
) -> tuple[Launch, ...]:
    """One launch, a program a tile of a block's rows."""
    batch, heads, count, width = out.shape
    number = -(-count // blocks.block_q)
    rows, keys, warps = _tile(width, out.element_size(), blocks.block_q * constexprs["GROUP"])
    tiles = -(-blocks.block_q * constexprs["GROUP"] // rows)
    arguments = arguments | {"out_ptr": out, "lse_ptr": lse, "count": count, "blocks": number}
    constexprs = constexprs | {
        "HEADS": heads, "BLOCK_R": rows, "BLOCK_K": keys, "BLOCK_Q": blocks.block_q, "TILES": tiles,
    }  # fmt: skip
    return (Launch(prefill, (blocks.counts.shape[1], batch, number * tiles), arguments, constexprs, warps, 2),)


def _decode(
    arguments: dict[str, Any], constexprs: dict[str, Any], blocks: BlockList, out: Tensor, lse: Tensor
) -> tuple[Launch, ...]:
    """Two launches: programs that share the keys, and the merging of what they found."""
    (batch, _, count, width), lists = out.shape, blocks.counts.shape[1]
    rows = constexprs["GROUP"] * count
    seen = blocks.most * blocks.block_k + blocks.sink + blocks.window
    shares = split_count(batch * lists, min(arguments["length"], seen), multiprocessors(out.device))
    part = torch.empty(batch, lists, shares, rows, width, dtype=torch.float32, device=out.device)
    part_lse = torch.empty(part.shape[:4], dtype=torch.float32, device=out.device)
    sizes = {"KV_HEADS": lists, "SPLITS": shares, "D": width, "BLOCK_D": constexprs["BLOCK_D"]}
    block_r, block_k, warps, _ = tile(rows, width, out.element_size())
    constexprs = constexprs | sizes | {"COUNT": count, "BLOCK_R": block_r, "BLOCK_K": block_k}
    merged = {"part_ptr": part, "part_lse_ptr": part_lse, "out_ptr": out, "lse_ptr": lse}
    return (
        Launch(
            decode_split,
            (shares, lists, batch),
            arguments | {"part_ptr": part, "lse_ptr": part_lse},
            constexprs,
            warps,
            2,
        ),
        Launch(merge_splits, (rows, lists, batch), merged, sizes | {"ROWS": rows, "CHUNK": min(shares, 16)}, 4, 1),
    )


def _tile(width: int, size: int, rows: int) -> tuple[int, int, int]:
    """Query rows and keys a tile, and warps: the largest that spill no register on any target."""
    least = max(16, 1 << (rows - 1).bit_length())
    if size == 4:
        return (min(least, 32), 16, 4) if width <= 128 else (16, 16, 4)
    if width > 128:
        return min(least, 64), 16, 8
    return min(least, 64), 64 if width <= 64 else 32, 4
