"""Attention of a few rows over packed segments on a GPU: slots are split over programs, a second kernel merges.

A segment is one launch, so that its formats are known when it is compiled; its splits write float32 partial results to
places of their own in one buffer, which are merged by log-sum-exp in a fixed order. The rows of a KV head's query heads
are one list, so that decoding and a chunk of a prompt differ in nothing but the rows of a tile.

Codes are never dequantized: they become small whole numbers, exact in float16, without a conversion instruction (or-ed
into the mantissa of 2^10 they read 2^10 + code), and are multiplied as such; a token's s and z go to its score and
its probability, c and mu of the channels to the query and to the result. Both factors of a product are scaled to at
most 1 in magnitude, so that float16 is wide enough for any of them.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from compress.kernels.segment_attention.segment import Segment
from compress.kernels.triton_support import Launch, compute_type, jit, multiprocessors, tl
from torch import Tensor

SLOTS_A_SPLIT = 256  # at least
MAX_SPLITS = 64
MERGED_AT_ONCE = 16


@jit
def _channels(BLOCK_D: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """The channel at every column ``[BLOCK_D]``, part by part, each filled up to a power of two; D for none."""
    column = tl.arange(0, BLOCK_D)
    J: tl.constexpr = D // PARTS
    BLOCK_J: tl.constexpr = BLOCK_D // PARTS
    return tl.where(column % BLOCK_J < J, column // BLOCK_J * J + column % BLOCK_J, D)


@jit
def _to_byte_order(x, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Columns of x ``[rows, BLOCK_D]`` in the order in which codes come out of bytes: the parts' first ones, ..."""
    BLOCK_J: tl.constexpr = x.shape[1] // PARTS
    if PARTS > 1:
        x = tl.reshape(tl.permute(tl.reshape(x, (x.shape[0], PARTS, BLOCK_J)), (0, 2, 1)), x.shape)
    return x


@jit
def _from_byte_order(x, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The inverse of `_to_byte_order`."""
    BLOCK_J: tl.constexpr = x.shape[1] // PARTS
    if PARTS > 1:
        x = tl.reshape(tl.permute(tl.reshape(x, (x.shape[0], BLOCK_J, PARTS)), (0, 2, 1)), x.shape)
    return x


@jit
def _codes(found, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The codes ``[slots, BLOCK_D]`` of bytes ``[slots, BLOCK_D * BITS / 8]``, those of a byte next to each other."""
    if BITS == 4:
        codes = tl.interleave(found & 15, found >> 4)
    else:
        codes = tl.interleave(tl.interleave(found & 3, (found >> 4) & 3), tl.interleave((found >> 2) & 3, found >> 6))
    return codes


@jit
def _numbers(  # type: ignore[no-untyped-def]
    ptr, slots, stride, stop, D: tl.constexpr, BLOCK_D: tl.constexpr, BITS: tl.constexpr, TYPE: tl.constexpr
):  # fmt: skip
    """A tile ``[slots, BLOCK_D]`` of floats, or of codes less half their range, columns in byte order."""
    PARTS: tl.constexpr = 8 // BITS if BITS < 8 else 1
    J: tl.constexpr = D // PARTS
    BLOCK_J: tl.constexpr = BLOCK_D // PARTS
    HALF: tl.constexpr = 1 << (BITS - 1)
    j = tl.arange(0, BLOCK_J)
    inside = slots[:, None] < stop
    if J != BLOCK_J:
        inside = inside & (j[None, :] < J)
    found = tl.load(ptr + slots[:, None].to(tl.int64) * stride + j[None, :], mask=inside, other=0)
    if BITS == 16:
        numbers = found.to(TYPE)
    else:
        codes = found.to(tl.uint8, bitcast=True) ^ 128 if BITS == 8 else _codes(found, BITS)
        if TYPE == tl.float16:  # noqa: SIM300
            numbers = (codes.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - (1024 + HALF)
        else:
            numbers = (codes.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True) - (8388608 + HALF)
    return numbers


@jit
def _params(ptr, slots, stride, stop, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Every slot's factor of `_numbers` and what is added to it, float32 ``[slots]``."""
    if BITS == 16:
        step = tl.full(slots.shape, 1.0, tl.float32)
        zero = tl.full(slots.shape, 0.0, tl.float32)
    elif ptr is None:
        step = tl.full(slots.shape, 1.0, tl.float32)
        zero = tl.full(slots.shape, 1 << (BITS - 1), tl.float32)
    else:
        places = ptr + slots.to(tl.int64) * stride
        step = tl.load(places, mask=slots < stop, other=0.0).to(tl.float32)
        if BITS == 8:
            zero = tl.full(slots.shape, 0.0, tl.float32)
        else:
            zero = tl.load(places + 1, mask=slots < stop, other=0.0).to(tl.float32) + (1 << (BITS - 1)) * step
    return step, zero


@jit(do_not_specialize=["rows", "share", "splits", "place"])
def attend_segment(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, k_params_ptr, v_params_ptr, k_channels_ptr, v_channels_ptr, bounds_ptr, part_ptr, lse_ptr,
    k_batch, k_head, k_slot, v_batch, v_head, v_slot, kp_batch, kp_head, kp_slot, vp_batch, vp_head, vp_slot,
    rows, share, splits, place, scale,
    KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, K_TYPE: tl.constexpr, V_TYPE: tl.constexpr,
):  # fmt: skip
    """Grid [splits of this segment, blocks of rows, B Hkv]: results ``[B Hkv, splits, rows, D]`` from ``place`` on.

    A split takes ``share`` slots. Log-sum-exps are in powers of two.
    """
    head = tl.program_id(2).to(tl.int64)
    batch, kv_head = head // KV_HEADS, head % KV_HEADS
    row = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    first = tl.load(bounds_ptr + head * 2) + tl.program_id(0) * share
    stop = tl.minimum(first + share, tl.load(bounds_ptr + head * 2 + 1))

    K_PARTS: tl.constexpr = 8 // K_BITS if K_BITS < 8 else 1
    V_PARTS: tl.constexpr = 8 // V_BITS if V_BITS < 8 else 1
    d = _channels(BLOCK_D, K_PARTS, D)
    real = (row[:, None] < rows) & (d[None, :] < D)
    q = tl.load(q_ptr + (head * rows + row)[:, None] * D + d[None, :], mask=real, other=0.0).to(tl.float32) * scale
    away = tl.zeros([BLOCK_R], tl.float32)
    if k_channels_ptr is not None:
        k_channels_ptr += head * (2 * D)
        away = tl.sum(q * tl.load(k_channels_ptr + D + d, mask=d < D, other=0.0).to(tl.float32)[None, :], 1)
        q *= tl.load(k_channels_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    size = tl.max(tl.abs(q), 1)
    size = tl.where(size > 0, size, 1.0)
    q = (q * (1.0 / size)[:, None]).to(K_TYPE)
    along = tl.sum(q.to(tl.float32), 1)
    q = _to_byte_order(q, K_PARTS)

    k_ptr += batch * k_batch + kv_head * k_head
    v_ptr += batch * v_batch + kv_head * v_head
    if k_params_ptr is not None:
        k_params_ptr += batch * kp_batch + kv_head * kp_head
    if v_params_ptr is not None:
        v_params_ptr += batch * vp_batch + kv_head * vp_head
    m = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    shift = tl.zeros([BLOCK_R], tl.float32)
    unit = tl.cast(5.9604644775390625e-08, tl.float32)  # the largest step so far, in which acc is counted; 2^-24
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for start in range(first, stop, BLOCK_K):
        slots = start + tl.arange(0, BLOCK_K)
        k = _numbers(k_ptr, slots, k_slot, stop, D, BLOCK_D, K_BITS, K_TYPE)
        step, zero = _params(k_params_ptr, slots, kp_slot, stop, K_BITS)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        s = (s * step[None, :] + along[:, None] * zero[None, :]) * size[:, None] + away[:, None]
        s = tl.where((slots < stop)[None, :], s, float("-inf"))
        higher = tl.maximum(m, tl.max(s, 1))  # finite: the first slot of every block exists
        p = tl.exp2(s - higher[:, None])
        keep = tl.exp2(m - higher)
        m = higher
        total = total * keep + tl.sum(p, 1)
        v = _numbers(v_ptr, slots, v_slot, stop, D, BLOCK_D, V_BITS, V_TYPE)
        if V_BITS == 16:
            acc = tl.dot(p.to(V_TYPE), v, acc * keep[:, None], input_precision="ieee")
        else:
            step, zero = _params(v_params_ptr, slots, vp_slot, stop, V_BITS)
            shift = shift * keep + tl.sum(p * zero[None, :], 1)
            larger = tl.maximum(unit, tl.max(step, 0))
            p = p * (step / larger)[None, :]
            acc = tl.dot(p.to(V_TYPE), v, acc * (keep * (unit / larger))[:, None], input_precision="ieee")
            unit = larger

    seeing = total > 0
    total = tl.where(seeing, total, 1.0)
    d = _channels(BLOCK_D, V_PARTS, D)
    if V_BITS != 16:
        acc = acc * unit + shift[:, None]
    out = _from_byte_order(acc * (1.0 / total)[:, None], V_PARTS)
    if v_channels_ptr is not None:
        v_channels_ptr += head * (2 * D)
        out = out * tl.load(v_channels_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        out += tl.load(v_channels_ptr + D + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    to = (head * splits + place + tl.program_id(0)) * rows + row
    tl.store(lse_ptr + to, tl.where(seeing, m + tl.log2(total), float("-inf")), mask=row < rows)
    tl.store(part_ptr + to[:, None] * D + d[None, :], out, mask=(row[:, None] < rows) & (d[None, :] < D))


@jit(do_not_specialize=["rows", "splits"])
def merge_parts(  # type: ignore[no-untyped-def]
    part_ptr, part_lse_ptr, out_ptr, lse_ptr, rows, splits, D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Grid [rows, B Hkv]: ``out = sum_s exp(lse_s - lse) out_s``; zeros, minus infinity where none saw a slot."""
    row, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    m = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, splits, CHUNK):
        split = start + tl.arange(0, CHUNK)
        place = (head * splits + split) * rows + row
        own = tl.load(part_lse_ptr + place, mask=split < splits, other=float("-inf"))
        higher = tl.maximum(m, tl.max(own, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight, keep = tl.exp2(own - base), tl.exp2(m - base)
        real = (split < splits)[:, None] & (d < D)[None, :]
        part = tl.load(part_ptr + place[:, None] * D + d[None, :], mask=real, other=0.0)
        acc = acc * keep + tl.sum(weight[:, None] * part, 0)
        total = total * keep + tl.sum(weight, 0)
        m = higher
    seeing = total > 0
    total = tl.where(seeing, total, 1.0)
    place = head * rows + row
    lse = tl.where(seeing, (m + tl.log2(total)) * 0.6931471805599453, float("-inf"))
    tl.store(lse_ptr + place + tl.arange(0, 1), lse)
    tl.store(out_ptr + place * D + d, acc / total, mask=d < D)


def segment_attention(q: Tensor, segments: Sequence[Segment], scaling: float) -> tuple[Tensor, Tensor]:
    """See :func:`compress.kernels.segment_attention.segment_attention`; on a GPU."""
    outputs, passes = launches(q, segments, scaling)
    for launch in passes:
        launch.start()
    return outputs


def launches(
    q: Tensor, segments: Sequence[Segment], scaling: float
) -> tuple[tuple[Tensor, Tensor], tuple[Launch, ...]]:
    """The output ``[B, H, R, D]`` and log-sum-exp ``[B, H, R]``, and the launches that fill them: one a segment that
    holds anything, and one that merges."""
    used = [segment for segment in segments if segment.longest]
    lse = torch.full(q.shape[:3], -math.inf, dtype=torch.float32, device=q.device)
    if not used or not q.numel():
        return (torch.zeros_like(q, memory_format=torch.contiguous_format), lse), ()
    q = q.contiguous()
    (batch, heads, count, width), kv_heads = q.shape, used[0].keys.shape[1]
    rows = heads // kv_heads * count
    block_r, block_k, warps = _blocks(rows, width, q.element_size())
    blocks = -(-rows // block_r)
    share = slots_a_split(used, batch * kv_heads * blocks, multiprocessors(q.device))
    splits = [-(-segment.longest // share) for segment in used]
    part = torch.empty(batch * kv_heads, sum(splits), rows, width, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(part.shape[:3], dtype=torch.float32, device=q.device)
    out = torch.empty_like(q)
    sizes = {"D": width, "BLOCK_D": max(16, 1 << (width - 1).bit_length())}
    common = {"q_ptr": q, "part_ptr": part, "lse_ptr": part_lse, "rows": rows, "share": share, "splits": sum(splits)}
    common["scale"] = scaling * math.log2(math.e)
    passes = [
        Launch(
            attend_segment,
            (splits[i], blocks, batch * kv_heads),
            common | _arguments(segment) | {"place": sum(splits[:i])},
            sizes | _formats(segment, q.dtype) | {"KV_HEADS": kv_heads, "BLOCK_R": block_r, "BLOCK_K": block_k},
            warps,
            3 if width <= 128 else 2,
        )
        for i, segment in enumerate(used)
    ]
    merged = {"part_ptr": part, "part_lse_ptr": part_lse, "out_ptr": out, "lse_ptr": lse, "rows": rows}
    merged["splits"] = sum(splits)
    passes.append(Launch(merge_parts, (rows, batch * kv_heads), merged, sizes | {"CHUNK": MERGED_AT_ONCE}, 4, 1))
    return (out, lse), tuple(passes)


def slots_a_split(segments: Sequence[Segment], tiles: int, processors: int) -> int:
    """How many slots a program takes, so that two programs fall to every multiprocessor; whole blocks of slots.

    Args:
        segments: all of one call.
        tiles: blocks of rows, over all sequences and KV heads.
        processors: multiprocessors of the GPU.
    """
    wanted = min(max(1, 2 * processors // tiles), MAX_SPLITS)
    share = max(SLOTS_A_SPLIT, -(-sum(segment.longest for segment in segments) // wanted))
    return -(-share // SLOTS_A_SPLIT) * SLOTS_A_SPLIT


def _arguments(segment: Segment) -> dict[str, Any]:
    tensors = {
        "k": _last_contiguous(segment.keys), "v": _last_contiguous(segment.values),
        "kp": segment.key_params, "vp": segment.value_params,
    }  # fmt: skip
    strides = {
        f"{name}_{axis}": 0 if x is None else x.stride(i)
        for name, x in tensors.items()
        for i, axis in enumerate(("batch", "head", "slot"))
    }
    key_channels, value_channels = segment.key_channels, segment.value_channels
    return strides | {
        "k_ptr": tensors["k"], "v_ptr": tensors["v"], "k_params_ptr": tensors["kp"], "v_params_ptr": tensors["vp"],
        "k_channels_ptr": None if key_channels is None else key_channels.contiguous(),
        "v_channels_ptr": None if value_channels is None else value_channels.contiguous(),
        "bounds_ptr": segment.bounds.contiguous(),
    }  # fmt: skip


def _formats(segment: Segment, dtype: torch.dtype) -> dict[str, Any]:
    """Bits, and the types in which products are made: float32 for queries in float32, else what holds the numbers."""

    def held(numbers: Tensor, bits: int) -> Any:
        exact = numbers.dtype if bits == 16 else torch.float16
        return compute_type(torch.float32 if dtype == torch.float32 else exact)

    return {
        "K_BITS": segment.key_bits, "V_BITS": segment.value_bits,
        "K_TYPE": held(segment.keys, segment.key_bits), "V_TYPE": held(segment.values, segment.value_bits),
    }  # fmt: skip


def _blocks(rows: int, width: int, size: int) -> tuple[int, int, int]:
    """Rows and slots a tile, and warps: the largest that spill no register on any target."""
    block_r = min(64, max(16, 1 << (rows - 1).bit_length()))
    if size == 4 or width > 128:
        return 16, 32, 4
    if block_r == 64:
        return 64, 32, 8
    return block_r, 64 if block_r == 16 and width <= 64 else 32, 4


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
