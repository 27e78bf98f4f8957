"""Group-dequantizing matrix products on a GPU: y = x W^T + bias with W in layout "planes".

Up to 32 rows (decoding): codes are multiplied as whole numbers, exact in any float type, and a group's sum is scaled
once. Up to 255 rows: the weights are scaled before they are multiplied. From 256 rows on they are dequantized once and
left to the vendor's dense product, which no dequantizing kernel beats.

Codes become floats without a conversion instruction: or-ed into the mantissa of 2^m they read 2^m + code, and taking
away 2^m + zero leaves the whole number code - zero exactly. Where the output has too few tiles to fill the GPU, K is
split; the parts go to float32 partial sums that a second kernel adds in a fixed order, so there are no atomics.
"""

from dataclasses import dataclass

import torch
from compress.kernels.quant_linear import planes
from compress.kernels.quant_linear.weight import QuantWeight
from compress.kernels.triton_support import Launch, compute_type, jit, multiprocessors, tl
from torch import Tensor

SMALLEST_TILE = 16  # inputs that a tensor core takes at once
DENSE_ROWS = 256
REDUCE_BLOCK = 1024


@jit
def _magic(codes, COMPUTE: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """2^m + code for unsigned codes, m so large that every code is exact."""
    if COMPUTE == tl.float16:  # noqa: SIM300
        numbers = (codes.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True)  # 2^10
    elif COMPUTE == tl.bfloat16 and BITS < 8:  # noqa: SIM300
        numbers = (codes.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True)  # 2^7
    else:
        numbers = (codes.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True)  # 2^23
    return numbers


@jit
def _centred(codes, zero, COMPUTE: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """code - zero of a [T, BN] tile of codes and its [BN] zero points, exactly, in COMPUTE."""
    return (_magic(codes, COMPUTE, BITS) - _magic(zero, COMPUTE, BITS)[None, :]).to(COMPUTE)


@jit
def _zero_points(zero, row, N, n, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The [BN] zero points of one row of groups; 2^(BITS - 1) for symmetric codes, which store none."""
    if zero is None:
        points = tl.full(n.shape, 1 << (BITS - 1), tl.uint8)
    else:
        points = tl.load(zero + row * N + n, mask=n < N, other=0)
    return points


@jit
def _codes(unit, N, n, j, BITS: tl.constexpr, UNIT: tl.constexpr, T: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes of inputs j T .. j T + T - 1 of a unit that begins at ``unit``: [T, BN], as `planes` stores them."""
    t = tl.arange(0, T)
    inside = (n < N)[None, :]
    LOW: tl.constexpr = 2 if BITS == 3 else BITS
    R: tl.constexpr = UNIT * LOW // 8
    if R <= T:  # whole planes: the same bytes for every j
        low = tl.load(unit + (t % R)[:, None] * N + n[None, :], mask=inside, other=0)
        shift = LOW * (j * (T // R) + t // R)
    else:
        low = tl.load(unit + (j % (R // T) * T + t)[:, None] * N + n[None, :], mask=inside, other=0)
        shift = LOW * (j // (R // T)) + t * 0
    codes = (low >> shift.to(tl.uint8)[:, None]) & ((1 << LOW) - 1)
    if BITS == 3:
        H: tl.constexpr = UNIT // 8
        high = tl.load(unit + (R + t % H)[:, None] * N + n[None, :], mask=inside, other=0)
        codes |= ((high >> (j * (T // H) + t // H).to(tl.uint8)[:, None]) & 1) << 2
    return codes


@jit(do_not_specialize=["M", "share"])
def _multiply(  # type: ignore[no-untyped-def]
    x, codes, scale, zero, bias, y, M, N, K, share,
    BITS: tl.constexpr, UNIT: tl.constexpr, T: tl.constexpr, UNITS_A_GROUP: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, SCALE_SUMS: tl.constexpr, WHOLE: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """One [BM, BN] tile over ``share`` units of K, to y [M, N] (WHOLE), or to partial sums [splits, M, N]."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    split = tl.program_id(2)
    t = tl.arange(0, T)
    bytes_a_unit = tl.cast(N, tl.int64) * (UNIT * BITS // 8)
    acc = tl.zeros((BM, BN), tl.float32)
    for u in range(split * share, tl.minimum((split + 1) * share, K // UNIT)):
        group = u // UNITS_A_GROUP
        s = tl.load(scale + group * N + n, mask=n < N, other=0.0)
        z = _zero_points(zero, group, N, n, BITS)
        unit = codes + u * bytes_a_unit
        part = tl.zeros((BM, BN), tl.float32)
        for j in tl.static_range(UNIT // T):
            a = tl.load(x + m[:, None] * K + (u * UNIT + j * T + t)[None, :], mask=(m < M)[:, None], other=0.0)
            b = _centred(_codes(unit, N, n, j, BITS, UNIT, T), z, COMPUTE, BITS)
            if SCALE_SUMS:
                part = tl.dot(a.to(COMPUTE), b, part, input_precision="ieee")
            else:
                acc = tl.dot(a.to(COMPUTE), b * s.to(COMPUTE)[None, :], acc, input_precision="ieee")
        if SCALE_SUMS:
            acc += part * s.to(tl.float32)[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    if WHOLE:
        if bias is not None:
            acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        tl.store(y + m[:, None] * N + n[None, :], acc.to(y.dtype.element_ty), mask=inside)
    else:
        tl.store(y + (split * M + m).to(tl.int64)[:, None] * N + n[None, :], acc, mask=inside)


@jit(do_not_specialize=["M", "splits"])
def _add_up(parts, bias, y, M, N, splits, BN: tl.constexpr):  # type: ignore[no-untyped-def]
    """y [M, N] = bias + the sum of parts [splits, M, N] float32, always added in the same order."""
    m = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    acc = tl.zeros((BN,), tl.float32)
    for split in range(splits):
        acc += tl.load(parts + (split * M + m) * N + n, mask=n < N, other=0.0)
    if bias is not None:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y + m * N + n, acc.to(y.dtype.element_ty), mask=n < N)


@jit
def _dequantize(  # type: ignore[no-untyped-def]
    codes, scale, zero, w, N,
    BITS: tl.constexpr, UNIT: tl.constexpr, T: tl.constexpr, UNITS_A_GROUP: tl.constexpr, BN: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """One unit of BN outputs, to the dense w [K, N]."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    u = tl.program_id(1)
    group = u // UNITS_A_GROUP
    s = tl.load(scale + group * N + n, mask=n < N, other=0.0).to(tl.float32)
    z = _zero_points(zero, group, N, n, BITS)
    unit = codes + u * tl.cast(N, tl.int64) * (UNIT * BITS // 8)
    out = w + u * tl.cast(N, tl.int64) * UNIT
    for j in tl.static_range(UNIT // T):
        b = _centred(_codes(unit, N, n, j, BITS, UNIT, T), z, COMPUTE, BITS).to(tl.float32) * s[None, :]
        rows = j * T + tl.arange(0, T)
        tl.store(out + rows[:, None] * N + n[None, :], b.to(w.dtype.element_ty), mask=(n < N)[None, :])


@dataclass(frozen=True)
class _Tiles:
    """Tile sizes and warps for a number of rows; shapes decide, nothing is tuned at run time."""

    BM: int
    BN: int
    T: int
    num_warps: int
    num_stages: int
    scale_sums: bool


def _tiles(rows: int, dtype: torch.dtype, weight: QuantWeight) -> _Tiles:
    small = 16 if rows <= 16 else 32
    if dtype == torch.float32:  # no tensor cores for exact float32: a small tile, or it doesn't fit the registers
        return _Tiles(small, 64, 16, 8, 2, scale_sums=rows <= 32)
    if rows <= 32:
        tight = small == 32 and weight.bits == 3 and planes.unit(weight.group_size) == 32  # ptxas spills one at 64
        return _Tiles(small, 128 if tight else 64, 64, 4, 3, scale_sums=True)
    return _Tiles(64, 128, 32, 8, 3, scale_sums=False)


def supports(x: Tensor, weight: QuantWeight) -> bool:
    """Whether there are kernels for these arguments: layout "planes", groups of whole 16 inputs, a dtype of the GPU."""
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    return weight.layout == "planes" and weight.group_size % SMALLEST_TILE == 0 and x.dtype in dtypes


def quant_linear(x: Tensor, weight: QuantWeight, bias: Tensor | None = None) -> Tensor:
    """As `reference.quant_linear` with float activations; x and weight on one GPU (or in the interpreter).

    Args:
        x: [..., K] float16, bfloat16 or float32.
        weight: [N, K] in layout "planes", the group size a multiple of 16.
        bias: [N] or None.

    Raises:
        ValueError: arguments without a kernel, or a device that can't run Triton.
    """
    if not supports(x, weight):
        raise ValueError(
            f"no Triton kernel for {x.dtype} activations and layout {weight.layout} with groups of {weight.group_size}"
        )
    rows = x.reshape(-1, weight.shape[1]).contiguous()
    if rows.shape[0] >= DENSE_ROWS:
        w, launch = dequantize_launch(weight, x.dtype)
        launch.start()
        y = rows @ w if bias is None else torch.addmm(bias.to(x.dtype), rows, w)
    else:
        y, launches = product_launches(rows, weight, bias)
        for launch in launches:
            launch.start()
    return y.view(*x.shape[:-1], weight.shape[0])


def product_launches(x: Tensor, weight: QuantWeight, bias: Tensor | None) -> tuple[Tensor, tuple[Launch, ...]]:
    """The output y [M, N], not yet filled, and the launches that fill it, for x [M, K] contiguous."""
    M, (N, K) = x.shape[0], weight.shape
    tiles = _tiles(M, x.dtype, weight)
    constexprs = _unit_constexprs(weight, tiles.T, x.dtype)
    units = K // constexprs["UNIT"]
    grid = (-(-N // tiles.BN), -(-M // tiles.BM))
    share = -(-units // _splits(grid[0] * grid[1], units, multiprocessors(x.device)))
    splits = -(-units // share)
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    whole = splits == 1
    parts = y if whole else torch.empty(splits, M, N, dtype=torch.float32, device=x.device)
    multiply = Launch(
        _multiply,
        (*grid, splits),
        {"x": x, "codes": weight.codes, "scale": weight.scale, "zero": weight.zero, "bias": bias if whole else None}
        | {"y": parts, "M": M, "N": N, "K": K, "share": share},
        constexprs | {"BM": tiles.BM, "BN": tiles.BN, "SCALE_SUMS": tiles.scale_sums, "WHOLE": whole},
        tiles.num_warps,
        tiles.num_stages,
    )
    if whole:
        return y, (multiply,)
    arguments = {"parts": parts, "bias": bias, "y": y, "M": M, "N": N, "splits": splits}
    return y, (multiply, Launch(_add_up, (-(-N // REDUCE_BLOCK), M), arguments, {"BN": REDUCE_BLOCK}))


def dequantize_launch(weight: QuantWeight, dtype: torch.dtype) -> tuple[Tensor, Launch]:
    """The dense weights [K, N], not yet filled, and the launch that fills them."""
    N, K = weight.shape
    w = torch.empty(K, N, dtype=dtype, device=weight.codes.device)
    constexprs = _unit_constexprs(weight, 32, dtype) | {"BN": 128}
    arguments = {"codes": weight.codes, "scale": weight.scale, "zero": weight.zero, "w": w, "N": N}
    return w, Launch(_dequantize, (-(-N // 128), K // constexprs["UNIT"]), arguments, constexprs)


def _unit_constexprs(weight: QuantWeight, largest_tile: int, dtype: torch.dtype) -> dict[str, int]:
    """The compile-time parameters that say how codes are stored and how many rows of a unit are multiplied at once."""
    unit = planes.unit(weight.group_size)
    return {
        "BITS": weight.bits,
        "UNIT": unit,
        "T": min(largest_tile, max(SMALLEST_TILE, unit * (2 if weight.bits == 3 else weight.bits) // 8)),
        "UNITS_A_GROUP": weight.group_size // unit,
        "COMPUTE": compute_type(dtype),
    }


def _splits(tiles: int, units: int, processors: int) -> int:
    """Parts of K so that about two programs fall to every multiprocessor."""
    return max(1, min(round(2 * processors / max(1, tiles)), units))
