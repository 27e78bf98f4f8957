"""Scores of chunks on a GPU: a program descends into some chunks of one row's keys at once; no atomics, no sorting."""

import torch
from compress.kernels.triton_support import Launch, compute_type, jit, tl
from torch import Tensor


@jit
def best_row(q, k_ptr, places, k_row, d, rows, valid, count, D: tl.constexpr, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest product of any of ``count`` query rows with the key at each place ``[chunks]``."""
    k = tl.load(k_ptr + places[:, None] * k_row + d[None, :], mask=valid[:, None] & (d[None, :] < D), other=0.0)
    s = tl.dot(q, tl.trans(k.to(TYPE)), input_precision="ieee")
    return tl.max(tl.where(rows[:, None] < count, s, float("-inf")), 0)


@jit(do_not_specialize=["chunks"])
def scores_of_chunks(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, base_ptr, starts_ptr, ends_ptr, out_ptr, k_row, chunks,
    ROWS: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, LEVELS: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Grid [N, blocks of chunks]."""
    n = tl.program_id(0).to(tl.int64)
    columns, rows, d = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    places = q_ptr + n * ROWS * D + rows[:, None] * D + d[None, :]
    q = tl.load(places, mask=(rows[:, None] < ROWS) & (d[None, :] < D), other=0.0).to(TYPE)
    end = tl.load(ends_ptr + n)
    k_ptr += tl.load(base_ptr + n).to(tl.int64) * k_row
    left = tl.load(starts_ptr + n * chunks + columns, mask=columns < chunks, other=-1)
    valid = (left >= 0) & (left < end)
    best = tl.full([BLOCK_C], float("-inf"), tl.float32)
    for level in tl.static_range(LEVELS):
        half = CHUNK >> (level + 1)
        near = tl.minimum(left + half // 2, end - 1).to(tl.int64)
        far = tl.minimum(left + half + half // 2, end - 1).to(tl.int64)
        first = best_row(q, k_ptr, near, k_row, d, rows, valid, ROWS, D, TYPE)
        second = best_row(q, k_ptr, far, k_row, d, rows, valid, ROWS, D, TYPE)
        left = tl.where(second >= first, left + half, left)
        best = tl.maximum(best, tl.maximum(first, second))
    tl.store(out_ptr + n * chunks + columns, tl.where(valid, best, float("-inf")), mask=columns < chunks)


def chunk_scores(q: Tensor, k: Tensor, base: Tensor, starts: Tensor, ends: Tensor, chunk: int) -> Tensor:
    """See :func:`compress.kernels.chunk_scores.chunk_scores`; on a GPU."""
    out, launch = launches(q, k, base, starts, ends, chunk)
    if out.numel():
        launch.start()
    return out


def launches(q: Tensor, k: Tensor, base: Tensor, starts: Tensor, ends: Tensor, chunk: int) -> tuple[Tensor, Launch]:
    """The scores ``[N, C]`` that the launch fills."""
    k = k if k.stride(-1) == 1 else k.contiguous()
    (count, rows, width), chunks = q.shape, starts.shape[1]
    out = torch.empty(count, chunks, dtype=torch.float32, device=q.device)
    arguments = {
        "q_ptr": q.contiguous(), "k_ptr": k, "base_ptr": base.contiguous(), "starts_ptr": starts.contiguous(),
        "ends_ptr": ends.contiguous(), "out_ptr": out, "k_row": k.stride(0), "chunks": chunks,
    }  # fmt: skip
    constexprs = {
        "ROWS": rows, "D": width, "CHUNK": chunk, "LEVELS": chunk.bit_length() - 1,
        "BLOCK_R": max(16, 1 << (rows - 1).bit_length()), "BLOCK_D": max(16, 1 << (width - 1).bit_length()),
        "BLOCK_C": _chunks(rows, width, k.element_size()), "TYPE": compute_type(k.dtype),
    }  # fmt: skip
    return out, Launch(scores_of_chunks, (count, -(-chunks // constexprs["BLOCK_C"])), arguments, constexprs, 4, 1)


def _chunks(rows: int, width: int, size: int) -> int:
    """Chunks that a program descends into: as many as spill no register on any target."""
    if size == 4:
        return 16
    return 64 if width <= 128 and rows <= 64 else 32
