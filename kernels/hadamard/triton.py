"""The Hadamard transform on a GPU in one pass over memory, float32 inside.

H_n = H_K (x) H_2^e is cut so that a tile fits the registers: H_2^q with q <= 10 (13 where n is a power of two) is done
by butterflies, additions alone, and what is left, H_K (x) H_2^(e-q), as one small matrix of +-1. That product comes
first, while the numbers are as they were loaded: +-1 is exact in every type, so 16-bit input keeps its tensor cores and
loses nothing.
"""

import math
from functools import lru_cache

import torch
from compress.kernels.hadamard.construct import Base, base_matrix, find_base, sylvester_matrix
from compress.kernels.triton_support import Launch, compute_type, jit, tl
from torch import Tensor

MAX_BUTTERFLY = {2: 1 << 10, 4: 1 << 9}  # the part done by butterflies beside a matrix, by bytes of a number
MAX_POWER = 1 << 13  # the largest order done by butterflies alone
TILE = 1 << 12  # numbers a program holds


@jit
def butterflies(x, LINES: tl.constexpr, ORDER: tl.constexpr, LOG: tl.constexpr):  # type: ignore[no-untyped-def]
    """x @ H for Sylvester's H of order 2^LOG: ``[LINES, ORDER]``, one pair of additions a bit of the index."""
    for bit in tl.static_range(LOG):
        pairs = tl.permute(tl.reshape(x, [LINES * (ORDER >> (bit + 1)), 2, 1 << bit]), (0, 2, 1))
        a, b = tl.split(pairs)
        x = tl.permute(tl.join(a + b, a - b), (0, 2, 1))
        x = tl.reshape(x, [LINES, ORDER])
    return x


@jit(do_not_specialize=["count"])
def transform_power(  # type: ignore[no-untyped-def]
    x_ptr, y_ptr, row, count, scale, N: tl.constexpr, LOG: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Grid [blocks of rows], n a power of two."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, N)
    x = tl.load(x_ptr + rows[:, None] * row + i[None, :], mask=rows[:, None] < count, other=0.0).to(tl.float32)
    y = butterflies(x, ROWS, N, LOG) * scale
    tl.store(y_ptr + rows[:, None] * N + i[None, :], y, mask=rows[:, None] < count)


@jit(do_not_specialize=["count"])
def transform_kronecker(  # type: ignore[no-untyped-def]
    x_ptr, h_ptr, y_ptr, row, count, scale, K: tl.constexpr, POWER: tl.constexpr, LOG: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_I: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Grid [blocks of rows, blocks of the K lines]; n = K * POWER. Column c is place c % POWER of row c // POWER."""
    columns = tl.arange(0, ROWS * POWER)
    rows = tl.program_id(0).to(tl.int64) * ROWS + columns // POWER
    place = columns % POWER
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    acc = tl.zeros([BLOCK_J, ROWS * POWER], tl.float32)
    for start in range(0, K, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        h = tl.load(h_ptr + j[:, None] * K + i[None, :], mask=(j[:, None] < K) & (i[None, :] < K), other=0.0).to(TYPE)
        x = tl.load(
            x_ptr + rows[None, :] * row + i[:, None] * POWER + place[None, :],
            mask=(i[:, None] < K) & (rows[None, :] < count),
            other=0.0,
        ).to(TYPE)
        acc = tl.dot(h, x, acc, input_precision="ieee")
    y = butterflies(tl.reshape(acc, [BLOCK_J * ROWS, POWER]), BLOCK_J * ROWS, POWER, LOG)
    y = tl.reshape(y, [BLOCK_J, ROWS * POWER]) * scale
    tl.store(
        y_ptr + rows[None, :] * (K * POWER) + j[:, None] * POWER + place[None, :],
        y,
        mask=(j[:, None] < K) & (rows[None, :] < count),
    )


def hadamard_transform(x: Tensor) -> Tensor:
    """See :func:`compress.kernels.hadamard.hadamard_transform`; float16, bfloat16 or float32, on a GPU."""
    y, launch = launches(x)
    launch.start()
    return y


def launches(x: Tensor) -> tuple[Tensor, Launch]:
    """The result, of the shape of x, that the launch fills.

    Raises:
        ValueError: no construction is known for the order.
    """
    n = x.shape[-1]
    base = find_base(n)
    if base is None:
        raise ValueError(f"no Hadamard construction is known for order {n}")
    rows = x.reshape(-1, n)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    common = {"x_ptr": rows, "y_ptr": y, "row": rows.stride(0), "count": len(rows), "scale": 1.0 / math.sqrt(n)}
    if base.order == 1 and n <= MAX_POWER:
        block = max(1, TILE // n)
        sizes = {"N": n, "LOG": n.bit_length() - 1, "ROWS": block}
        return y, Launch(transform_power, (-(-len(rows) // block),), common, sizes, 4 if n <= TILE else 8, 1)
    power = min(n // base.order, MAX_BUTTERFLY[x.element_size()])
    lines = n // power
    block_j = 16 if power > 256 else 32
    block = max(1, TILE // (block_j * power))
    sizes = {
        "K": lines, "POWER": power, "LOG": power.bit_length() - 1, "ROWS": block, "BLOCK_J": block_j,
        "BLOCK_I": 16 if x.element_size() == 4 or power > 256 else 32, "TYPE": compute_type(x.dtype),
    }  # fmt: skip
    grid = (-(-len(rows) // block), -(-lines // block_j))
    matrix = _matrix(base, lines, x.dtype, x.device)
    warps = 4 if block_j * power <= TILE else 8
    return y, Launch(transform_kronecker, grid, common | {"h_ptr": matrix}, sizes, warps, 2)


@lru_cache(maxsize=64)
def _matrix(base: Base, order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(H_K (x) Sylvester's)^T ``[order, order]``: y[j] = sum_i x[i] H[i, j]. Kept: copying it to a GPU takes longer."""
    matrix = torch.kron(base_matrix(base), sylvester_matrix(order // base.order))
    return matrix.T.contiguous().to(device=device, dtype=dtype)
