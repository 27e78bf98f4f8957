"""What the proofs need of `ragged_decode`."""

from dataclasses import dataclass

import torch
from compress.kernels import ragged_decode as op
from compress.kernels.proofs import Case, Compiled, Limits, OpSpec
from compress.kernels.ragged_decode import reference, triton
from compress.kernels.ragged_decode.cluster import Cluster
from compress.kernels.triton_support import Launch
from torch import Tensor

Arguments = tuple[Tensor, tuple[Cluster, ...], float]


def exact(q: Tensor, clusters: tuple[Cluster, ...], scaling: float) -> tuple[Tensor, Tensor]:
    """Row by row in float64, each over the list of its slots."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.float64)
    group = q.shape[1] // sum(len(cluster.heads) for cluster in clusters)
    for b, h in ((b, h) for b in range(q.shape[0]) for h in range(q.shape[1])):
        (cluster,) = (cluster for cluster in clusters if h // group in cluster.heads)
        n = cluster.heads.index(h // group)
        first, end = cluster.bounds[b, n].tolist()
        keys, values = (states[b, n, first:end].double() for states in (cluster.keys, cluster.values))
        for r in range(q.shape[2] if end > first else 0):
            scores = keys @ q[b, h, r].double() * scaling
            out[b, h, r] = scores.softmax(0) @ values
            lse[b, h, r] = scores.logsumexp(0)
    return out, lse


@dataclass(frozen=True)
class Part:
    """A cluster of a case: its heads, its slots, and the bounds ``[B][n][2]`` where they aren't all slots."""

    heads: tuple[int, ...]
    slots: int
    bounds: list[list[list[int]]] | None = None


def arguments(
    group: int, sizes: tuple[int, int, int], parts: tuple[Part, ...], generator: torch.Generator, dtype: torch.dtype
) -> Arguments:
    """Random queries of ``group`` heads a KV head, ``sizes`` (B, R, D); slots out of bounds are not a number."""
    batch, count, width = sizes
    q = torch.randn(batch, count, group * sum(len(part.heads) for part in parts), width, generator=generator)

    def cluster(part: Part) -> Cluster:
        every = [[[0, part.slots]] * len(part.heads)] * batch
        bounds = torch.tensor(every if part.bounds is None else part.bounds, dtype=torch.int32)
        bounds = bounds.reshape(batch, len(part.heads), 2)
        slots = torch.arange(part.slots)
        missing = (slots < bounds[..., :1]) | (slots >= bounds[..., 1:])
        # As a cache may hold them: room for more slots than there are, keys and values in different strides.
        keys = torch.randn(batch, len(part.heads), part.slots + 3, width, generator=generator)[:, :, : part.slots]
        values = torch.randn(batch, part.slots, len(part.heads), width, generator=generator).transpose(1, 2)
        keys, values = (states.masked_fill(missing[..., None], torch.nan).to(dtype) for states in (keys, values))
        lengths = (bounds[..., 1] - bounds[..., 0]).flatten().tolist()
        return Cluster(keys, values, part.heads, bounds, max(lengths, default=0))

    return q.to(dtype).transpose(1, 2), tuple(cluster(part) for part in parts), width**-0.5


def _case(name: str, group: int, sizes: tuple[int, int, int], *parts: Part) -> Case:
    return Case(name, lambda generator, dtype: arguments(group, sizes, parts, generator, dtype))


CASES = (
    _case("one-cluster", 3, (1, 1, 64), Part((0,), 200)),
    _case("one-slot", 4, (1, 1, 80), Part((0,), 1)),
    _case("streaming-and-full", 3, (1, 1, 64), Part((2, 0), 70), Part((1,), 400)),
    _case("three-clusters", 1, (2, 1, 32), Part((3,), 65), Part((0, 2), 5), Part((1,), 130)),
    _case("a-few-tokens", 2, (1, 5, 96), Part((1,), 66), Part((0,), 300)),
    _case("wide-head", 1, (1, 1, 256), Part((0,), 100)),
    _case("eight-heads", 8, (1, 1, 128), Part((0,), 67)),
    _case("ragged", 2, (2, 1, 64),
          Part((1, 2), 90, [[[0, 90], [3, 70]], [[89, 90], [5, 5]]]), Part((0,), 140, [[[0, 140]], [[70, 75]]])),
    _case("empty-cluster", 2, (2, 1, 16), Part((1, 0), 40, [[[4, 4], [0, 0]]] * 2), Part((2,), 40)),
    _case("nothing", 2, (1, 2, 64), Part((0,), 0)),
    _case("no-rows", 2, (1, 0, 64), Part((0,), 5)),
    _case("no-sequences", 2, (0, 1, 64), Part((0,), 5, [])),
)  # fmt: skip


_two = 80 * 1024  # shared memory that leaves room for two programs a multiprocessor of sm_80


def _compiled(width: int, dtype: torch.dtype, part: int, limits: Limits, rows: int = 1) -> Compiled:
    """32 query heads, 8 KV heads in three clusters: 4 hold all of 32768 slots, 2 and 2 hold fewer."""

    def cluster(heads: tuple[int, ...], slots: int) -> Cluster:
        states = torch.empty(1, len(heads), slots, width, dtype=dtype, device="meta")
        return Cluster(states, states, heads, torch.empty(1, len(heads), 2, dtype=torch.int32, device="meta"), slots)

    def launch() -> Launch:
        q = torch.empty(1, 32, rows, width, dtype=dtype, device="meta")
        clusters = (cluster((0, 1, 2, 3), 32768), cluster((4, 6), 4096), cluster((5, 7), 320))
        return triton.launches(q, clusters, 0.1)[1][part]

    name = f"{('tiles', 'merge')[part]}-r{rows}-d{width}-{str(dtype).removeprefix('torch.')}"
    return Compiled(name, launch, limits)


SPEC = OpSpec(
    name="ragged_decode",
    public=op.ragged_decode,
    reference=reference.ragged_decode,
    exact=exact,
    triton=triton.ragged_decode,
    cases=CASES,
    configurations=(
        _compiled(64, torch.float16, 0, Limits(registers=128, shared=_two)),
        _compiled(96, torch.float16, 0, Limits(registers=128, shared=_two)),
        _compiled(128, torch.bfloat16, 0, Limits(registers=128, shared=_two)),
        _compiled(64, torch.float16, 0, Limits(registers=168, shared=_two), rows=8),
        _compiled(128, torch.bfloat16, 0, Limits(registers=168, shared=_two), rows=8),
        _compiled(128, torch.float16, 0, Limits(registers=255, shared=_two, wgmma=True), rows=16),
        _compiled(256, torch.bfloat16, 0, Limits(registers=168, shared=_two)),
        _compiled(256, torch.bfloat16, 0, Limits(wgmma=True), rows=16),
        _compiled(64, torch.float32, 0, Limits(shared=_two, mma=False)),
        _compiled(128, torch.float32, 0, Limits(mma=False)),
        _compiled(128, torch.float32, 0, Limits(mma=False), rows=8),
        _compiled(128, torch.float32, 0, Limits(mma=False), rows=16),
        _compiled(256, torch.float32, 0, Limits(mma=False)),
        _compiled(256, torch.float32, 0, Limits(mma=False), rows=16),
        _compiled(128, torch.float16, 1, Limits(registers=64, mma=False)),
        _compiled(256, torch.bfloat16, 1, Limits(registers=64, mma=False)),
    ),
)
