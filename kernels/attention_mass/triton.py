"""Column sums on a GPU in two passes: the log-sum-exp of every row, then the sums, one block of keys a program.

No program writes what another one writes, so there are no atomics and the bits repeat. Rows are treated in the order of
their positions; every block of keys is told which rows can see it.
"""

import math

import torch
from compress.kernels.attention_mass.reference import positions
from compress.kernels.triton_support import Launch, compute_type, jit, tl
from torch import Tensor

UNLIMITED = 1 << 30  # a window that hides nothing


@jit(do_not_specialize=["count", "length", "window"])
def row_lse(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, places_ptr, lse_ptr, q_batch, q_head, q_row, k_batch, k_head, k_row, count, length, window, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """lse [B, H, R] in powers of two; infinity for a row that sees nothing, so that its probabilities come out 0."""
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    places = tl.load(places_ptr + rows, mask=rows < count, other=-1)
    q_rows = q_ptr + batch * q_batch + head * q_head + rows[:, None].to(tl.int64) * q_row
    q = tl.load(q_rows + d[None, :], mask=(rows[:, None] < count) & (d[None, :] < D), other=0.0).to(COMPUTE)
    k_rows = k_ptr + batch * k_batch + (head // GROUP) * k_head
    m = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    nearest = tl.min(tl.where(places < 0, length, places))
    first = tl.maximum(nearest - window + 1, 0)
    for start in range(first, tl.minimum(tl.max(places) + 1, length), BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        k = tl.load(
            k_rows + keys[:, None].to(tl.int64) * k_row + d[None, :],
            mask=(keys[:, None] < length) & (d[None, :] < D),
            other=0.0,
        ).to(COMPUTE)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        distance = places[:, None] - keys[None, :]
        s = tl.where((distance >= 0) & (distance < window) & (keys[None, :] < length), s, float("-inf"))
        higher = tl.maximum(m, tl.max(s, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(m - base) + tl.sum(tl.exp2(s - base[:, None]), 1)
        m = higher
    lse = tl.where(total > 0, m + tl.log2(tl.where(total > 0, total, 1.0)), float("inf"))
    tl.store(lse_ptr + (batch * HEADS + head) * count + rows, lse, mask=rows < count)


@jit(do_not_specialize=["count", "length", "window"])
def column_mass(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, places_ptr, lse_ptr, begin_ptr, end_ptr, mass_ptr, q_batch, q_head, q_row, k_batch, k_head, k_row,
    count, length, window, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """mass [B, H, T]: sum over the rows of exp2(score - lse); the block's keys stay on the chip."""
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    keys = block * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    k_rows = k_ptr + batch * k_batch + (head // GROUP) * k_head + keys[:, None].to(tl.int64) * k_row
    k = tl.load(k_rows + d[None, :], mask=(keys[:, None] < length) & (d[None, :] < D), other=0.0).to(COMPUTE)
    q_rows = q_ptr + batch * q_batch + head * q_head
    lse_rows = lse_ptr + (batch * HEADS + head) * count
    mass = tl.zeros([BLOCK_K], tl.float32)
    for start in range(tl.load(begin_ptr + block), tl.load(end_ptr + block), BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        places = tl.load(places_ptr + rows, mask=rows < count, other=-1)
        lse = tl.load(lse_rows + rows, mask=rows < count, other=float("inf"))
        q = tl.load(
            q_rows + rows[:, None].to(tl.int64) * q_row + d[None, :],
            mask=(rows[:, None] < count) & (d[None, :] < D),
            other=0.0,
        ).to(COMPUTE)
        s = tl.dot(k, tl.trans(q), input_precision="ieee") * scale - lse[None, :]
        distance = places[None, :] - keys[:, None]
        mass += tl.sum(tl.where((distance >= 0) & (distance < window), tl.exp2(s), 0.0), 1)
    tl.store(mass_ptr + (batch * HEADS + head) * length + keys, mass, mask=keys < length)


def attention_mass(
    q: Tensor,
    k: Tensor,
    rows: Tensor | None,
    scaling: float,
    window: int | None = None,
    sum_heads: bool = False,
) -> Tensor:
    """See :func:`compress.kernels.attention_mass.attention_mass`; float16, bfloat16 or float32, on a GPU."""
    if q.shape[2] == 0 or k.shape[2] == 0:
        shape = (q.shape[0], *(() if sum_heads else q.shape[1:2]), k.shape[2])
        return torch.zeros(shape, device=q.device)
    mass, passes = launches(q, k, rows, scaling, window)
    for launch in passes:
        launch.start()
    return mass.sum(1) if sum_heads else mass


def launches(
    q: Tensor, k: Tensor, rows: Tensor | None, scaling: float, window: int | None
) -> tuple[Tensor, tuple[Launch, Launch]]:
    """The result ``[B, H, T]`` that the two launches fill."""
    places = positions(q, k, rows)
    if rows is not None:
        order = places.argsort(stable=True)
        q, places = q.index_select(2, order), places[order]
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    (batch, heads, count, width), (kv_heads, length) = q.shape, k.shape[1:3]
    block_r, block_k = _blocks(width, q.element_size())
    lse = torch.empty(batch, heads, count, dtype=torch.float32, device=q.device)
    mass = torch.empty(batch, heads, length, dtype=torch.float32, device=q.device)
    reach = UNLIMITED if window is None else min(window, UNLIMITED)
    starts = torch.arange(0, length, block_k, dtype=places.dtype, device=q.device)
    common = {
        "q_ptr": q, "k_ptr": k, "places_ptr": places.to(torch.int32), "lse_ptr": lse,
        "q_batch": q.stride(0), "q_head": q.stride(1), "q_row": q.stride(2),
        "k_batch": k.stride(0), "k_head": k.stride(1), "k_row": k.stride(2),
        "count": count, "length": length, "window": reach, "scale": scaling * math.log2(math.e),
    }  # fmt: skip
    constexprs = {
        "HEADS": heads, "GROUP": heads // kv_heads, "D": width, "BLOCK_D": max(16, 1 << (width - 1).bit_length()),
        "BLOCK_R": block_r, "BLOCK_K": block_k, "COMPUTE": compute_type(q.dtype),
    }  # fmt: skip
    sums = common | {
        "begin_ptr": torch.searchsorted(places, starts).to(torch.int32),
        "end_ptr": torch.searchsorted(places, starts + (block_k - 1 + reach)).to(torch.int32),
        "mass_ptr": mass,
    }
    return mass, (
        Launch(row_lse, (-(-count // block_r), heads, batch), common, constexprs | {"BLOCK_K": min(64, block_k)}, 4, 3),
        Launch(column_mass, (len(starts), heads, batch), sums, constexprs, 4, 3),
    )


def _blocks(width: int, size: int) -> tuple[int, int]:
    """Rows and keys a block: three blocks fit 64 KiB, and float32, which has no tensor cores, fits the registers."""
    if size == 4:
        return (32, 32) if width <= 128 else (16, 16)
    return (64, 128) if width <= 128 else (64, 32)
