"""What the proofs need to know of `quant_linear`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from compress.kernels import native
from compress.kernels import quant_linear as op
from compress.kernels.proofs import DTYPES, Case, Compiled, Limits, OpSpec
from compress.kernels.quant_linear import cpu, reference, triton
from compress.kernels.quant_linear.weight import QuantWeight, from_codes, to_codes
from compress.kernels.triton_support import Launch
from torch import Tensor


def _public(x: Tensor, weight: QuantWeight, bias: Tensor | None) -> Tensor:
    """As users of a CPU call it: cases come in layout "planes", and the C++ path reads "rows"."""
    return op.quant_linear(x, _in_rows(weight), bias)


def _native(build: str, x: Tensor, weight: QuantWeight, bias: Tensor | None) -> Tensor:
    return cpu.quant_linear(x, _in_rows(weight), bias, build=native.built(build))


def _in_rows(weight: QuantWeight) -> QuantWeight:
    return from_codes(*to_codes(weight), weight.bits, weight.group_size, "rows")


def _exact(x: Tensor, weight: QuantWeight, bias: Tensor | None = None) -> Tensor:
    """In float64."""
    y = torch.einsum("...k,nk->...n", x.double(), exact_weights(weight))
    return y + (0 if bias is None else bias.double())


def exact_weights(weight: QuantWeight) -> Tensor:
    """Every weight by its formula, ``[N, K]`` float64."""
    codes, scale, zero = to_codes(weight)
    group = torch.arange(weight.shape[1]) // weight.group_size
    point = 2 ** (weight.bits - 1) if zero is None else zero.double()[:, group]
    return (codes.double() - point) * scale.double()[:, group]


@dataclass(frozen=True)
class _Layer:
    N: int
    bits: int
    group_size: int
    zero: bool = False
    bias: bool = False


def _case(name: str, x_shape: tuple[int, ...], layer: _Layer, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Case:
    """Random codes and signed scales, with zero points and a bias where the layer has them."""
    bits, N = layer.bits, layer.N

    def make(generator: torch.Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        K = x_shape[-1]
        size = K if layer.group_size == -1 else layer.group_size
        codes = torch.randint(0, 1 << bits, (N, K), dtype=torch.uint8, generator=generator)
        scale = (torch.randn(N, K // size, generator=generator) / 100).half()
        points = (
            torch.randint(0, 1 << bits, scale.shape, dtype=torch.uint8, generator=generator) if layer.zero else None
        )
        x = torch.randn(x_shape, generator=generator).to(dtype)
        b = torch.randn(N, generator=generator).to(dtype) if layer.bias else None
        return x, from_codes(codes, scale, points, bits, layer.group_size, "planes"), b

    return Case(name, make, dtypes)


def _product(bits: int, group_size: int, dtype: torch.dtype, rows: int, zero: bool = True) -> Callable[[], Launch]:
    x = torch.empty(rows, 4096, dtype=dtype, device="meta")
    return lambda: triton.product_launches(x, _shape(bits, group_size, dtype, zero), None)[1][0]


def _addition() -> Launch:
    x = torch.empty(16, 4096, dtype=torch.float16, device="meta")
    bias = torch.empty(4096, dtype=torch.float16, device="meta")
    return triton.product_launches(x, _shape(4, 128, torch.float16, True), bias)[1][1]


def _shape(bits: int, group_size: int, dtype: torch.dtype, zero: bool) -> QuantWeight:
    """A weight of 4096 x 4096 without data."""
    codes = torch.empty(4096 * bits // 8, 4096, dtype=torch.uint8, device="meta")
    scale = torch.empty(4096 // group_size, 4096, dtype=dtype, device="meta")
    points = torch.empty(scale.shape, dtype=torch.uint8, device="meta") if zero else None
    return QuantWeight(codes, scale, points, (4096, 4096), bits, group_size, "planes")


_WIDE = (torch.float32,)
_half, _brain = torch.float16, torch.bfloat16
_decode = Limits(registers=168, conversions=0)  # three programs of 4 warps a multiprocessor
_several = Limits(registers=255, conversions=0, wgmma=True)

SPEC = OpSpec(
    name="quant_linear",
    public=_public,
    reference=reference.quant_linear,
    exact=_exact,
    triton=triton.quant_linear,
    cpu=_native,
    cases=(
        _case("one-token", (192,), _Layer(72, 4, 64)),
        _case("w2-small-groups", (2, 96), _Layer(70, 2, 32, zero=True)),
        _case("w3-nine-groups", (1, 1, 576), _Layer(40, 3, 64, bias=True)),  # SmolLM2's hidden size
        _case("w3-wide-groups", (3, 256), _Layer(40, 3, 128, zero=True), _WIDE),
        _case("w4-groups-of-16", (2, 48), _Layer(33, 4, 16, zero=True, bias=True), _WIDE),
        _case("w4-one-group-a-row", (3, 192), _Layer(65, 4, -1), _WIDE),
        _case("w8-zero-points", (2, 3, 256), _Layer(17, 8, 128, zero=True)),
        _case("no-token", (0, 64), _Layer(16, 4, 32, bias=True), _WIDE),
        _case("one-output", (1, 128), _Layer(1, 2, 64), _WIDE),
        _case("ragged-17", (17, 128), _Layer(72, 4, 128, zero=True, bias=True)),
        _case("ragged-70", (70, 64), _Layer(130, 3, 64, zero=True, bias=True)),
        _case("dense-from-256", (257, 64), _Layer(40, 4, 32, bias=True)),
    ),
    configurations=(
        Compiled("w4-g128-m16-float16", _product(4, 128, _half, 16), _decode),
        Compiled("w4-g32-m16-symmetric-bfloat16", _product(4, 32, _brain, 16, zero=False), _decode),
        Compiled("w3-g64-m16-symmetric-float16", _product(3, 64, _half, 16, zero=False), _decode),
        Compiled("w2-g64-m16-float16", _product(2, 64, _half, 16), _decode),
        Compiled("w8-g128-m16-bfloat16", _product(8, 128, _brain, 16), _decode),
        Compiled("w4-g128-m32-float16", _product(4, 128, _half, 32), _decode),
        Compiled("w3-g32-m32-float16", _product(3, 32, _half, 32), _decode),
        Compiled("w4-g128-m64-float16", _product(4, 128, _half, 64), _several),
        Compiled("w3-g64-m64-bfloat16", _product(3, 64, _brain, 64), _several),
        Compiled("w8-g128-m64-float16", _product(8, 128, _half, 64), _several),
        Compiled("w4-g128-m16-float32", _product(4, 128, torch.float32, 16), Limits(registers=255, mma=False)),
        Compiled("w3-g128-m16-float32", _product(3, 128, torch.float32, 16), Limits(registers=255, mma=False)),
        Compiled("w3-g128-m32-float32", _product(3, 128, torch.float32, 32), Limits(registers=255, mma=False)),
        Compiled("w8-g128-m64-float32", _product(8, 128, torch.float32, 64), Limits(registers=255, mma=False)),
        Compiled("sum-of-parts-float16", _addition, Limits(registers=64, mma=False, conversions=0)),
        Compiled(
            "dequantize-w4-g128-float16",
            lambda: triton.dequantize_launch(_shape(4, 128, torch.float16, True), torch.float16)[1],
            Limits(registers=128, mma=False, conversions=0),
        ),
    ),
)
