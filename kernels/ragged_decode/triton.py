"""Stream-K decode attention on a GPU: every program takes an equal run of tiles, across heads and clusters.

The run of a program falls into pieces, one a head; their partial results in float32 have places of their own
(`Schedule`), and a second kernel merges each head's by log-sum-exp in a fixed order: bits repeat. The rows of one KV
head's query heads are one tile. The schedule is a few numbers, known from the clusters' ``longest``: what bounds on the
device cut off is time that a program doesn't use. Sizes that are divided by are not known at compile time, but that is
once a piece.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from compress.kernels.flash_decode.triton import MAX_ROWS, tile
from compress.kernels.flash_prefill.triton import load_rows, online_softmax
from compress.kernels.ragged_decode.cluster import MAX_CLUSTERS, Cluster
from compress.kernels.ragged_decode.schedule import Schedule, plan
from compress.kernels.triton_support import Launch, compute_type, jit, multiprocessors, tl
from torch import Tensor

PROGRAMS_A_PROCESSOR = 2  # what fits by shared memory; gfx942, where one does, has two equal rounds
MERGED_AT_ONCE = 16
CHANGING = ["begin1", "begin2", "total", "share", "batches"]  # from step to step, or from layer to layer
CHANGING += [f"{name}{cluster}" for name in ("heads", "tiles", "slots") for cluster in range(MAX_CLUSTERS)]


@jit
def _of(cluster, a, b, c):  # type: ignore[no-untyped-def]
    """What belongs to a cluster."""
    return tl.where(cluster == 0, a, tl.where(cluster == 1, b, c))


@jit(do_not_specialize=CHANGING)
def attend_tiles(  # type: ignore[no-untyped-def]
    q_ptr, heads_ptr, part_ptr, lse_ptr, k0_ptr, k1_ptr, k2_ptr, v0_ptr, v1_ptr, v2_ptr,
    bounds0_ptr, bounds1_ptr, bounds2_ptr, q_batch, q_head, q_row,
    k0_batch, k1_batch, k2_batch, k0_head, k1_head, k2_head, k0_row, k1_row, k2_row,
    v0_batch, v1_batch, v2_batch, v0_head, v1_head, v2_head, v0_row, v1_row, v2_row,
    slots0, slots1, slots2, heads0, heads1, heads2, tiles0, tiles1, tiles2, begin1, begin2, total, share, batches,
    scale, GROUP: tl.constexpr, COUNT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Grid [programs]: output ``[pieces, rows, D]`` of every piece and its log-sum-exp in powers of two."""
    rows, d = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    real = (rows[:, None] < GROUP * COUNT) & (d[None, :] < D)
    tile = tl.program_id(0) * share
    stop = tl.minimum(tile + share, total)
    while tile < stop:
        cluster = (tile >= begin1).to(tl.int32) + (tile >= begin2).to(tl.int32)
        tiles, count = _of(cluster, tiles0, tiles1, tiles2), _of(cluster, heads0, heads1, heads2)
        before = _of(cluster, 0, heads0, heads0 + heads1)
        within = tile - _of(cluster, 0, begin1, begin2)
        item, start = within // tiles, within % tiles
        batch, head = (item // count).to(tl.int64), item % count
        run = tl.minimum(stop - tile, tiles - start)

        slots = _of(cluster, slots0, slots1, slots2)
        bounds_ptr = _of(cluster, bounds0_ptr, bounds1_ptr, bounds2_ptr) + item * 2
        first = tl.minimum(tl.maximum(tl.load(bounds_ptr), 0), slots)  # cut to the slots that there are
        end = tl.minimum(tl.load(bounds_ptr + 1), slots)
        low = first + start * BLOCK_K
        end = tl.minimum(end, low + run * BLOCK_K)
        k_ptr = _of(cluster, k0_ptr, k1_ptr, k2_ptr) + batch * _of(cluster, k0_batch, k1_batch, k2_batch)
        v_ptr = _of(cluster, v0_ptr, v1_ptr, v2_ptr) + batch * _of(cluster, v0_batch, v1_batch, v2_batch)
        k_ptr += head.to(tl.int64) * _of(cluster, k0_head, k1_head, k2_head)
        v_ptr += head.to(tl.int64) * _of(cluster, v0_head, v1_head, v2_head)
        k_row, v_row = _of(cluster, k0_row, k1_row, k2_row), _of(cluster, v0_row, v1_row, v2_row)

        kv_head = tl.load(heads_ptr + before + head)
        q_rows = (kv_head * GROUP + rows // COUNT)[:, None].to(tl.int64) * q_head + (rows % COUNT)[:, None] * q_row
        q = tl.load(q_ptr + batch * q_batch + q_rows + d[None, :], mask=real, other=0.0).to(TYPE)
        m = tl.full([BLOCK_R], float("-inf"), tl.float32)
        sums = tl.zeros([BLOCK_R], tl.float32)
        acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        for place in range(low, end, BLOCK_K):
            keys = place + tl.arange(0, BLOCK_K)
            k = load_rows(k_ptr, keys, k_row, d, end, D, BLOCK_D, True, TYPE)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            v = load_rows(v_ptr, keys, v_row, d, end, D, BLOCK_D, True, TYPE)
            m, sums, acc = online_softmax(m, sums, acc, tl.where((keys < end)[None, :], s, float("-inf")), v)

        seeing = sums != 0  # so that a NaN stays one
        sums = tl.where(seeing, sums, 1.0)
        piece = tl.program_id(0) + batches * before + item
        row = piece.to(tl.int64) * (GROUP * COUNT) + rows
        tl.store(lse_ptr + row, tl.where(seeing, m + tl.log2(sums), float("-inf")), mask=rows < GROUP * COUNT)
        tl.store(part_ptr + row[:, None] * D + d[None, :], acc / sums[:, None], mask=real)
        tile += run


@jit(do_not_specialize=CHANGING)
def merge_pieces(  # type: ignore[no-untyped-def]
    part_ptr, part_lse_ptr, out_ptr, lse_ptr, heads_ptr, heads0, heads1, heads2, tiles0, tiles1, tiles2,
    begin1, begin2, share, batches, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid [rows, Hkv, B]: ``out = sum_p exp(lse_p - lse) out_p``; zeros, minus infinity where none saw a slot."""
    row, place, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    d = tl.arange(0, BLOCK_D)
    cluster = (place >= heads0).to(tl.int32) + (place >= heads0 + heads1).to(tl.int32)
    before = _of(cluster, 0, heads0, heads0 + heads1)
    item = batch * _of(cluster, heads0, heads1, heads2) + place - before
    tiles = _of(cluster, tiles0, tiles1, tiles2)
    start = _of(cluster, 0, begin1, begin2) + item * tiles
    number = batches * before + item
    last = tl.where(tiles > 0, (start + tiles - 1) // share, -1)  # program of the last piece; none without tiles
    m = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for program in range(start // share, last + 1, CHUNK):
        own = program + tl.arange(0, CHUNK)
        piece = (own + number).to(tl.int64) * ROWS + row
        lse = tl.load(part_lse_ptr + piece, mask=own <= last, other=float("-inf"))
        higher = tl.maximum(m, tl.max(lse, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight, keep = tl.exp2(lse - base), tl.exp2(m - base)
        part = tl.load(part_ptr + piece[:, None] * D + d, mask=(own <= last)[:, None] & (d < D)[None, :], other=0.0)
        acc = acc * keep + tl.sum(weight[:, None] * part, 0)
        total = total * keep + tl.sum(weight, 0)
        m = higher
    seeing = total != 0
    total = tl.where(seeing, total, 1.0)
    kv_heads = tl.num_programs(1)
    to = (batch.to(tl.int64) * kv_heads + tl.load(heads_ptr + place)) * ROWS + row
    lse = tl.where(seeing, (m + tl.log2(total)) * 0.6931471805599453, float("-inf"))
    tl.store(lse_ptr + to + tl.arange(0, 1), lse)
    tl.store(out_ptr + to * D + d, acc / total, mask=d < D)


def ragged_decode(q: Tensor, clusters: Sequence[Cluster], scaling: float) -> tuple[Tensor, Tensor]:
    """See :func:`compress.kernels.ragged_decode.ragged_decode`; on a GPU."""
    outputs, passes = launches(q, clusters, scaling)
    for launch in passes:
        launch.start()
    return outputs


def launches(
    q: Tensor, clusters: Sequence[Cluster], scaling: float
) -> tuple[tuple[Tensor, Tensor], tuple[Launch, Launch]]:
    """The output ``[B, H, R, D]`` and log-sum-exp ``[B, H, R]`` that the two launches fill.

    Raises:
        ValueError: more than `MAX_ROWS` query rows a KV head.
    """
    q = q if q.stride(-1) == 1 else q.contiguous()
    batch, heads, count, width = q.shape
    kv_heads = sum(len(cluster.heads) for cluster in clusters)
    group = heads // kv_heads
    rows = group * count
    if rows > MAX_ROWS:
        raise ValueError(f"ragged_decode takes at most {MAX_ROWS} query rows a KV head, got {rows}")
    block_r, block_k, warps, stages = tile(rows, width, q.element_size())
    warps = min(warps, 8)  # float32 spills with 16
    padded = (*clusters, *[None] * (MAX_CLUSTERS - len(clusters)))
    schedule = plan(
        batch,
        [0 if cluster is None else len(cluster.heads) for cluster in padded],
        [0 if cluster is None else cluster.longest for cluster in padded],
        block_k,
        PROGRAMS_A_PROCESSOR * multiprocessors(q.device),
    )
    part = torch.empty(schedule.pieces, rows, width, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(part.shape[:2], dtype=torch.float32, device=q.device)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, count, dtype=torch.float32, device=q.device)
    numbers = _numbers(schedule) | {
        "heads_ptr": _order(tuple(head for cluster in clusters for head in cluster.heads), q.device)
    }
    sizes = {"D": width, "BLOCK_D": max(16, 1 << (width - 1).bit_length())}
    arguments = numbers | {"q_ptr": q, "part_ptr": part, "lse_ptr": part_lse, "total": schedule.begins[-1]}
    arguments |= {"q_batch": q.stride(0), "q_head": q.stride(1), "q_row": q.stride(2)}
    arguments["scale"] = scaling * math.log2(math.e)
    for i, cluster in enumerate(padded):
        arguments |= _tensors(i, clusters[0] if cluster is None else cluster)
    constexprs = sizes | {
        "GROUP": group, "COUNT": count, "BLOCK_R": block_r, "BLOCK_K": block_k, "TYPE": compute_type(q.dtype),
    }  # fmt: skip
    merged = numbers | {"part_ptr": part, "part_lse_ptr": part_lse, "out_ptr": out, "lse_ptr": lse}
    return (out, lse), (
        Launch(attend_tiles, (schedule.programs if rows else 0,), arguments, constexprs, warps, stages),
        Launch(merge_pieces, (rows, kv_heads, batch), merged, sizes | {"ROWS": rows, "CHUNK": MERGED_AT_ONCE}, 4, 1),
    )


def _numbers(schedule: Schedule) -> dict[str, Any]:
    """The schedule as both kernels take it."""
    found = {f"heads{i}": heads for i, heads in enumerate(schedule.heads)}
    found |= {f"tiles{i}": tiles for i, tiles in enumerate(schedule.tiles)}
    _, begin1, begin2, _ = schedule.begins
    return found | {"begin1": begin1, "begin2": begin2, "share": schedule.share, "batches": schedule.batch}


def _tensors(number: int, cluster: Cluster) -> dict[str, Any]:
    """A cluster's tensors, their strides and slots."""
    found: dict[str, Any] = {
        f"bounds{number}_ptr": cluster.bounds.contiguous(), f"slots{number}": cluster.keys.shape[2]
    }  # fmt: skip
    for name, states in (("k", cluster.keys), ("v", cluster.values)):
        states = states if states.stride(-1) == 1 else states.contiguous()
        found[f"{name}{number}_ptr"] = states
        found |= {f"{name}{number}_{axis}": states.stride(i) for i, axis in enumerate(("batch", "head", "row"))}
    return found


@cache
def _order(heads: tuple[int, ...], device: torch.device) -> Tensor:
    """The KV heads in the order of the clusters; kept, since a copy to the GPU would have every step wait."""
    return torch.tensor(heads, dtype=torch.int32, device=device)
