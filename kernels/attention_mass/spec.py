"""What the proofs need of `attention_mass`."""

import math
from typing import Any

import torch
from compress.kernels import attention_mass as op
from compress.kernels.attention_mass import reference, triton
from compress.kernels.proofs import Case, Compiled, Limits, OpSpec
from compress.kernels.triton_support import Launch
from torch import Tensor


def exact(q: Tensor, k: Tensor, rows: Tensor | None, scaling: float, window: int | None, sum_heads: bool) -> Tensor:
    """Row by row in float64."""
    batch, heads, count, _ = q.shape
    length, group = k.shape[2], heads // k.shape[1]
    places = range(length - count, length) if rows is None else rows.tolist()
    mass = torch.zeros(batch, heads, length, dtype=torch.float64)
    for row, place in enumerate(places):
        first = 0 if window is None else max(0, place - window + 1)
        seen = slice(first, min(place + 1, length))
        if place < 0 or first >= length:
            continue
        for head in range(heads):
            scores = k[:, head // group, seen].double() @ q[:, head, row].double()[:, :, None] * scaling
            mass[:, head, seen] += scores[..., 0].softmax(-1)
    return mass.sum(1) if sum_heads else mass


def _case(
    name: str,
    heads: tuple[int, int],
    sizes: tuple[int, int, int],
    rows: list[int] | None = None,
    window: int | None = None,
    sum_heads: bool = False,
) -> Case:
    """A case with ``heads`` (H, Hkv) and ``sizes`` (R, T, D), of one sequence; two where heads are added up."""

    def make(generator: torch.Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        count, length, width = sizes
        batch = 2 if sum_heads else 1
        q = torch.randn(batch, heads[0], count, width, generator=generator).to(dtype)
        k = torch.randn(batch, heads[1], length, width, generator=generator).to(dtype)
        places = None if rows is None else torch.tensor(rows, dtype=torch.int64)
        return q, k, places, 1.5 / math.sqrt(width), window, sum_heads

    return Case(name, make)


CASES = (
    _case("all-rows", (3, 1), (70, 70, 64)),
    _case("one-token", (2, 2), (1, 1, 64)),
    _case("last-rows", (4, 1), (5, 133, 80)),
    _case("probes", (1, 1), (4, 150, 64), rows=[149, 3, 77, 77]),
    _case("empty-rows", (2, 1), (5, 40, 16), rows=[-1, 20, 200, -7, 39], window=30),
    _case("no-rows", (2, 1), (0, 9, 64), rows=[]),
    _case("grouped-window", (8, 2), (70, 70, 32), window=7),
    _case("window-of-one", (1, 1), (20, 20, 64), window=1),
    _case("wide-head", (1, 1), (40, 70, 256), sum_heads=True),
)


def _compiled(name: str, width: int, dtype: torch.dtype, part: int, limits: Limits) -> Compiled:
    def launch() -> Launch:
        q = torch.empty(1, 32, 4096, width, dtype=dtype, device="meta")
        k = torch.empty(1, 8, 4096, width, dtype=dtype, device="meta")
        return triton.launches(q, k, None, 0.1, None)[1][part]

    return Compiled(name, launch, limits)


def _configurations() -> tuple[Compiled, ...]:
    made = []
    for part, name in enumerate(("lse", "mass")):
        for width, dtype in ((64, torch.float16), (128, torch.bfloat16), (256, torch.float16)):
            limits = Limits(registers=168, wgmma=name == "lse" or width < 256)
            made.append(_compiled(f"{name}-d{width}-{str(dtype).removeprefix('torch.')}", width, dtype, part, limits))
        made.append(_compiled(f"{name}-d64-float32", 64, torch.float32, part, Limits(mma=False)))
    return tuple(made)


SPEC = OpSpec(
    name="attention_mass",
    public=op.attention_mass,
    reference=reference.attention_mass,
    exact=exact,
    triton=triton.attention_mass,
    cases=CASES,
    configurations=_configurations(),
)
