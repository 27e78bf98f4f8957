"""What the proofs need of `flash_prefill`."""

import torch
from compress.kernels import flash_prefill as op
from compress.kernels.flash_prefill import reference, triton
from compress.kernels.proofs import Case, Compiled, Limits, OpSpec
from compress.kernels.triton_support import Launch
from torch import Tensor


def exact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float | None,
    bounds: Tensor | None,
    reach: Tensor | None,
    offsets: list[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Row by row in float64, each over the list of its keys; ``offsets``: slot of row 0 of every sequence."""
    batch, heads, count, width = q.shape
    kv_heads, length = k.shape[1:3]
    out = torch.zeros(q.shape, dtype=torch.float64)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.float64)
    for b, h, r in ((b, h, r) for b in range(batch) for h in range(heads) for r in range(count)):
        place = r + (length - count if offsets is None else offsets[b])
        kv = h // (heads // kv_heads)
        first, end = (0, length) if bounds is None else bounds[b].tolist()
        sink, window = (0, length) if reach is None else reach[kv].tolist()
        if not first <= place < end:
            continue
        seen = [j for j in range(first, place + 1) if j - first < sink or j > place - window]
        scores = k[b, kv, seen].double() @ q[b, h, r].double() * (width**-0.5 if scaling is None else scaling)
        out[b, h, r] = scores.softmax(0) @ v[b, kv, seen].double()
        lse[b, h, r] = scores.logsumexp(0)
    return out, lse


def case(
    name: str,
    heads: tuple[int, int],
    sizes: tuple[int, int, int],
    scaling: float | None = None,
    bounds: list[list[int]] | None = None,
    reach: list[list[int]] | None = None,
) -> Case:
    """A case with ``heads`` (H, Hkv) and ``sizes`` (R, T, D); as many sequences as it has bounds, or one."""

    def make(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor | float | None, ...]:
        count, length, width = sizes
        batch = 1 if bounds is None else len(bounds)
        q = torch.randn(batch, heads[0], count, width, generator=generator).to(dtype)
        # As a model's cache may hold them: tokens before heads.
        k, v = torch.randn(2, batch, length, heads[1], width, generator=generator).to(dtype).transpose(2, 3)
        pairs = (None if pair is None else torch.tensor(pair) for pair in (bounds, reach))
        return q, k, v, scaling, *pairs

    return Case(name, make)


CASES = (
    case("grouped", (3, 1), (140, 140, 64)),
    case("one-token", (4, 1), (1, 1, 80)),
    case("last-rows", (8, 8), (3, 67, 128), scaling=0.3),
    case("eight-heads", (8, 1), (5, 9, 16)),
    case("wide-head", (1, 1), (70, 75, 256)),
    case("no-rows", (2, 1), (0, 5, 64)),
    case("ragged", (2, 1), (70, 70, 96), bounds=[[0, 70], [66, 70], [0, 3], [5, 5]]),
    case("sink-and-window", (4, 4), (90, 90, 16), reach=[[4, 30], [0, 1], [300, 5], [0, 300]]),
    case("ragged-window", (2, 2), (40, 250, 32), bounds=[[230, 250], [3, 240]], reach=[[5, 20], [2, 90]]),
    case("far-from-the-sink", (6, 3), (230, 230, 16), bounds=[[0, 230], [7, 200]], reach=[[4, 30], [0, 70], [40, 1]]),
    case("last-rows-of-a-window", (2, 2), (300, 560, 16), reach=[[16, 520], [3, 129]]),
)


def compiled_arguments(
    rows: int, keys: int, width: int, dtype: torch.dtype, narrowed: bool
) -> tuple[Tensor, Tensor, Tensor, None, Tensor | None, Tensor | None]:
    """What a configuration is compiled for, on no device: 32 heads, 8 KV heads, with bounds and reach or without."""
    q = torch.empty(1, 32, rows, width, dtype=dtype, device="meta")
    k = torch.empty(1, 8, keys, width, dtype=dtype, device="meta")
    if not narrowed:
        return q, k, k, None, None, None
    bounds = torch.empty(1, 2, dtype=torch.int32, device="meta")
    reach = torch.empty(8, 2, dtype=torch.int32, device="meta")
    return q, k, k, None, bounds, reach


def _compiled(width: int, dtype: torch.dtype, narrowed: bool, limits: Limits) -> Compiled:
    def launch() -> Launch:
        return triton.launches(*compiled_arguments(4096, 4096, width, dtype, narrowed))[1]

    name = f"d{width}-{str(dtype).removeprefix('torch.')}{'-narrowed' if narrowed else ''}"
    return Compiled(name, launch, limits)


SPEC = OpSpec(
    name="flash_prefill",
    public=op.flash_prefill,
    reference=reference.flash_prefill,
    exact=exact,
    triton=triton.flash_prefill,
    cases=CASES,
    configurations=(
        _compiled(64, torch.float16, False, Limits(registers=192, wgmma=True)),
        _compiled(64, torch.bfloat16, True, Limits(registers=192, wgmma=True)),
        _compiled(96, torch.float16, False, Limits(registers=208, wgmma=True)),
        _compiled(128, torch.bfloat16, False, Limits(registers=208, wgmma=True)),
        _compiled(128, torch.float16, True, Limits(registers=224, wgmma=True)),
        _compiled(256, torch.bfloat16, False, Limits(registers=192, wgmma=True)),
        _compiled(64, torch.float32, False, Limits(mma=False)),
        _compiled(128, torch.float32, True, Limits(mma=False)),
        _compiled(256, torch.float32, True, Limits(mma=False)),
    ),
)
