"""What the proofs need of `chunk_scores`."""

import math

import torch
from compress.kernels import chunk_scores as op
from compress.kernels.chunk_scores import reference, triton
from compress.kernels.proofs import Case, Compiled, Limits, OpSpec
from compress.kernels.triton_support import Launch
from torch import Tensor


def exact(q: Tensor, k: Tensor, base: Tensor, starts: Tensor, ends: Tensor, chunk: int) -> Tensor:
    """Chunk by chunk in float64."""
    out = torch.full(starts.shape, -math.inf, dtype=torch.float64)
    for n, row in enumerate(starts.tolist()):
        end = int(ends[n])
        keys = k[int(base[n]) : int(base[n]) + end].double()
        for c, start in enumerate(row):
            if not 0 <= start < end:
                continue
            left, right = start, start + chunk
            while right - left > 1:
                centre = (left + right) // 2
                near, far = (float((q[n].double() @ keys[min(at, end - 1)]).max())
                             for at in ((left + centre) // 2, (centre + right) // 2))  # fmt: skip
                out[n, c] = max(float(out[n, c]), near, far)
                left, right = (centre, right) if far >= near else (left, centre)
    return out


def _case(name: str, sizes: tuple[int, int, int], starts: list[list[int]], ends: list[int], chunk: int) -> Case:
    """A case with ``sizes`` (P, keys of each n, D)."""

    def make(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor | int, ...]:
        rows, length, width = sizes
        q = torch.randn(len(starts), rows, width, generator=generator).to(dtype)
        k = torch.randn(len(starts) * length, width, generator=generator).to(dtype)
        base = torch.arange(len(starts), dtype=torch.int32).flip(0) * length
        return q, k, base, torch.tensor(starts, dtype=torch.int32), torch.tensor(ends, dtype=torch.int32), chunk

    return Case(name, make)


CASES = (
    _case("whole-chunks", (16, 200, 64), [[0, 64, 128], [64, 128, 0]], [192, 200], 64),
    _case("beyond-the-end", (5, 90, 80), [[0, 32, 64, 96], [3, 35, 67, -1]], [70, 68], 32),
    _case("one-row", (1, 40, 16), [[0, 8, 16, 24, 32]], [40], 8),
    _case("none", (3, 20, 32), [[-1, 16], [4, 8]], [16, 0], 4),
    _case("wide-head", (48, 70, 256), [list(range(0, 70, 2))], [70], 2),
    _case("no-chunks", (2, 4, 64), [[]], [4], 16),
)


def _compiled(rows: int, width: int, dtype: torch.dtype, chunk: int, limits: Limits) -> Compiled:
    def launch() -> Launch:
        q = torch.empty(512, rows, width, dtype=dtype, device="meta")
        k = torch.empty(1 << 16, width, dtype=dtype, device="meta")
        each, chunks = (torch.empty(*shape, dtype=torch.int32, device="meta") for shape in ((512,), (512, 256)))
        return triton.launches(q, k, each, chunks, each, chunk)[1]

    return Compiled(f"p{rows}-d{width}-c{chunk}-{str(dtype).removeprefix('torch.')}", launch, limits)


SPEC = OpSpec(
    name="chunk_scores",
    public=op.chunk_scores,
    reference=reference.chunk_scores,
    exact=exact,
    triton=triton.chunk_scores,
    cases=CASES,
    configurations=(
        _compiled(48, 64, torch.float16, 256, Limits()),
        _compiled(64, 128, torch.bfloat16, 256, Limits()),
        _compiled(64, 128, torch.float16, 32, Limits()),
        _compiled(128, 128, torch.bfloat16, 8, Limits()),
        _compiled(4, 128, torch.bfloat16, 32, Limits()),
        _compiled(16, 256, torch.float16, 32, Limits()),
        _compiled(16, 64, torch.float32, 8, Limits(mma=False)),
    ),
)
