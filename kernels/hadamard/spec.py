"""What the proofs need of `hadamard_transform`."""

import math

import torch
from compress.kernels import hadamard as op
from compress.kernels.hadamard import reference, triton
from compress.kernels.hadamard.construct import base_matrix, find_base
from compress.kernels.proofs import Case, Compiled, Limits, OpSpec
from compress.kernels.triton_support import Launch
from torch import Tensor


def exact(x: Tensor) -> Tensor:
    """In float64, H_n = H_K (x) H_a (x) H_b with ab = 2^e and Sylvester's matrices by the bits of the indices."""
    n = x.shape[-1]
    base = find_base(n)
    assert base is not None
    power = n // base.order
    b = min(power, 128)
    y = x.double().reshape(-1, base.order, power // b, b)
    y = torch.einsum("rkab,kj,ac,bd->rjcd", y, base_matrix(base).double(), _signs(power // b), _signs(b))
    return y.reshape(x.shape) / math.sqrt(n)


def _signs(order: int) -> Tensor:
    """(-1)^popcount(r & c)."""
    common = torch.arange(order)[:, None] & torch.arange(order)[None, :]
    for shift in (8, 4, 2, 1):  # the parity of the bits, folded into the lowest one
        common = common ^ (common >> shift)
    return 1.0 - 2.0 * (common & 1).double()


def _case(shape: tuple[int, ...], strided: bool = False) -> Case:
    def make(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor]:
        x = torch.randn(shape[::-1] if strided else shape, generator=generator).to(dtype)
        return (x.T if strided else x,)

    return Case("x".join(map(str, shape)) + ("-strided" if strided else ""), make)


CASES = (
    _case((3, 1)),
    _case((0, 64)),
    _case((5, 2)),
    _case((33, 128)),
    _case((7, 64), strided=True),
    _case((2, 3, 4096)),
    _case((1, 8192)),
    _case((1, 16384)),
    _case((5, 12)),
    _case((9, 36)),
    _case((5, 576)),
    _case((1, 896)),
    _case((3, 1536)),
    _case((2, 3584)),
    _case((1, 14336)),
    _case((2, 4736)),
)


def _compiled(n: int, dtype: torch.dtype, mma: bool) -> Compiled:
    def launch() -> Launch:
        return triton.launches(torch.empty(4096, n, dtype=dtype, device="meta"))[1]

    name = f"n{n}-{str(dtype).removeprefix('torch.')}"
    return Compiled(name, launch, Limits(registers=128, mma=mma, conversions=0))


SPEC = OpSpec(
    name="hadamard",
    public=op.hadamard_transform,
    reference=reference.hadamard_transform,
    exact=exact,
    triton=triton.hadamard_transform,
    cases=CASES,
    configurations=(
        _compiled(128, torch.float16, False),
        _compiled(4096, torch.float16, False),
        _compiled(8192, torch.bfloat16, False),
        _compiled(576, torch.float16, True),
        _compiled(1536, torch.bfloat16, True),
        _compiled(14336, torch.float16, True),
        _compiled(12288, torch.bfloat16, True),
        _compiled(18944, torch.bfloat16, True),
        _compiled(4096, torch.float32, False),
        _compiled(28672, torch.float32, False),
    ),
)
