"""What the proofs need of `block_attention`."""

import torch
from compress.kernels import block_attention as op
from compress.kernels.block_attention import reference, triton
from compress.kernels.block_attention.blocks import BlockList
from compress.kernels.proofs import Case, Compiled, Limits, OpSpec
from compress.kernels.triton_support import Launch
from torch import Tensor

Sizes = tuple[int, int, int, int]


def exact(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockList, scaling: float | None, bounds: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Row by row in float64, each over the set of its keys."""
    batch, heads, count, width = q.shape
    per_list, per_kv = heads // blocks.counts.shape[1], heads // k.shape[1]
    out = torch.zeros(q.shape, dtype=torch.float64)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.float64)
    for b, h, r in ((b, h, r) for b in range(batch) for h in range(heads) for r in range(count)):
        first, end = (0, k.shape[2]) if bounds is None else bounds[b].tolist()
        place, i = end - count + r, r // blocks.block_q
        starts = blocks.starts[b, h // per_list, i, : int(blocks.counts[b, h // per_list, i])].tolist()
        named = {slot for start in starts for slot in range(start, start + blocks.block_k)}
        seen = {
            *range(first, first + blocks.sink),
            *range(place - r % blocks.block_q - blocks.window + 1, place + 1),
            *named,
        }
        keys = sorted(slot for slot in seen if first <= slot <= place)
        if not keys:
            continue
        scores = k[b, h // per_kv, keys].double() @ q[b, h, r].double() * (width**-0.5 if scaling is None else scaling)
        out[b, h, r] = scores.softmax(0) @ v[b, h // per_kv, keys].double()
        lse[b, h, r] = scores.logsumexp(0)
    return out, lse


def drawn(generator: torch.Generator, shape: tuple[int, int, int], sizes: Sizes, length: int, most: int) -> BlockList:
    """Lists of up to ``most`` blocks, empty ones among them; ``sizes`` are block_q, block_k, sink, window.

    A list's blocks needn't begin at multiples of block_k, and the last may reach beyond the last slot.
    """
    block_q, block_k, sink, window = sizes
    places = -(-length // block_k)
    starts = torch.full((*shape, most), 1 << 20, dtype=torch.int32)
    counts = torch.randint(min(most, places) + 1, shape, generator=generator).int()
    for index in torch.cartesian_prod(*map(torch.arange, shape)).view(-1, 3).tolist():
        b, n, i = index
        some = torch.randperm(places, generator=generator)[: int(counts[b, n, i])].sort().values
        shift = torch.randint(min(block_k, length - (places - 1) * block_k), (), generator=generator)
        starts[b, n, i, : len(some)] = (some * block_k + shift).int()
    return BlockList(starts, counts, block_q, block_k, sink, window)


def _case(
    name: str,
    heads: tuple[int, int, int],
    rows: tuple[int, int, int],
    sizes: Sizes,
    most: int,
    bounds: list[list[int]] | None = None,
) -> Case:
    """A case with ``heads`` (H, Hkv, list heads), ``rows`` (R, T, D) and the sizes of `drawn`."""

    def make(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor | BlockList | float | None, ...]:
        count, length, width = rows
        batch = 1 if bounds is None else len(bounds)
        q = torch.randn(batch, heads[0], count, width, generator=generator).to(dtype)
        k, v = torch.randn(2, batch, length, heads[1], width, generator=generator).to(dtype).transpose(2, 3)
        blocks = drawn(generator, (batch, heads[2], -(-count // sizes[0])), sizes, length, most)
        return q, k, v, blocks, 0.2, None if bounds is None else torch.tensor(bounds)

    return Case(name, make)


CASES = (
    _case("grouped", (3, 1, 1), (150, 150, 64), (32, 8, 4, 20), 6),
    _case("list-a-query-head", (4, 2, 4), (70, 70, 32), (16, 4, 0, 9), 5),
    _case("one-token", (6, 2, 2), (1, 200, 80), (64, 16, 3, 30), 4),
    _case("one-token-ragged", (2, 1, 2), (1, 90, 64), (1, 2, 5, 8), 7, [[0, 90], [60, 75], [4, 4]]),
    _case("last-rows", (2, 2, 2), (21, 130, 128), (8, 16, 8, 16), 3),
    _case("ragged", (2, 1, 1), (60, 60, 16), (16, 8, 4, 12), 4, [[0, 60], [41, 60], [10, 33]]),
    _case("nothing-listed", (2, 1, 1), (40, 100, 64), (16, 8, 2, 5), 0),
    _case("window-of-one", (1, 1, 1), (33, 33, 256), (16, 1, 0, 1), 9),
    _case("everything", (2, 1, 1), (40, 40, 16), (64, 64, 16, 100), 1),
    _case("no-rows", (2, 1, 1), (0, 20, 64), (16, 8, 1, 4), 2),
)


def _compiled(rows: int, width: int, dtype: torch.dtype, sizes: tuple[int, int], part: int, limits: Limits) -> Compiled:
    """Lists per KV head, 32 heads over 8; ``sizes`` are block_q and block_k."""

    def launch() -> Launch:
        q = torch.empty(1, 32, rows, width, dtype=dtype, device="meta")
        k = torch.empty(1, 8, 32768, width, dtype=dtype, device="meta")
        number = -(-rows // sizes[0])
        starts = torch.empty(1, 8, number, 2048 // sizes[1], dtype=torch.int32, device="meta")
        blocks = BlockList(starts, starts[..., 0].clone(), *sizes, 128, 1024)
        return triton.launches(q, k, k, blocks, None, None)[1][part]

    kind = "prefill" if rows > 64 else f"{('decode', 'merge')[part]}-r{4 * rows}"
    return Compiled(f"{kind}-d{width}-k{sizes[1]}-{str(dtype).removeprefix('torch.')}", launch, limits)


SPEC = OpSpec(
    name="block_attention",
    public=op.block_attention,
    reference=reference.block_attention,
    exact=exact,
    triton=triton.block_attention,
    cases=CASES,
    configurations=(
        _compiled(4096, 64, torch.float16, (64, 8), 0, Limits(registers=192, wgmma=True)),
        _compiled(4096, 64, torch.bfloat16, (64, 16), 0, Limits(registers=192, wgmma=True)),
        _compiled(4096, 128, torch.bfloat16, (64, 8), 0, Limits(registers=224, wgmma=True)),
        _compiled(4096, 128, torch.float16, (64, 2), 0, Limits(registers=224, wgmma=True)),
        _compiled(4096, 256, torch.bfloat16, (64, 8), 0, Limits()),
        _compiled(4096, 64, torch.float32, (64, 8), 0, Limits(registers=208, mma=False)),
        _compiled(1, 64, torch.float16, (64, 8), 0, Limits()),
        _compiled(1, 128, torch.bfloat16, (64, 8), 0, Limits()),
        _compiled(1, 256, torch.float16, (64, 16), 0, Limits()),
        _compiled(16, 64, torch.float16, (64, 8), 0, Limits(wgmma=True)),
        _compiled(16, 128, torch.bfloat16, (64, 8), 0, Limits(wgmma=True)),
        _compiled(16, 256, torch.bfloat16, (64, 8), 0, Limits()),
        _compiled(1, 128, torch.bfloat16, (64, 8), 1, Limits(mma=False)),
    ),
)
