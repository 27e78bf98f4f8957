"""What attention over heads of unequal length must keep, beyond the four proofs of every operation."""

from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest
import ragged_in_triton
import torch
from compress.kernels import triton_support
from compress.kernels.flash_decode import flash_decode
from compress.kernels.flash_decode.triton import split_count
from compress.kernels.ragged_decode import Cluster, ragged_decode, reference
from compress.kernels.ragged_decode.schedule import Schedule, plan
from compress.kernels.ragged_decode.spec import Part, arguments
from torch import Tensor

needs_triton = pytest.mark.skipif(not triton_support.AVAILABLE, reason="Triton has no wheel for this platform")
TILE, PROCESSORS = 64, 132


def _made(parts: tuple[Part, ...], sizes: tuple[int, int, int] = (2, 1, 32)) -> tuple[Tensor, tuple[Cluster, ...]]:
    return arguments(3, sizes, parts, torch.Generator().manual_seed(0), torch.float32)[:2]


@pytest.mark.parametrize("streaming", [1, 4, 7])
def test_balance_of_stream_k_against_a_fixed_split(streaming: int) -> None:
    """Heads of 320 and 131072 tokens: tiles of the busiest program over the mean of all that the GPU runs at once."""
    programs, lengths = 2 * PROCESSORS, [131072] * (8 - streaming) + [320] * streaming
    tiles = [-(-length // TILE) for length in lengths]
    loads = plan(1, [8 - streaming, streaming], [131072, 320], TILE, programs).loads()
    assert sum(loads) == sum(tiles)
    assert len(loads) <= programs
    assert max(loads) / (sum(tiles) / programs) < 1.1

    splits = split_count(8, 131072, PROCESSORS)  # as flash_decode cuts all heads of a layer
    fixed = [-(-own // splits) for own in tiles]
    ideal = sum(tiles) / (8 * splits)
    assert max(fixed) / ideal > {1: 1.1, 4: 1.9, 7: 7}[streaming]


def _pieces(schedule: Schedule) -> list[tuple[int, int]]:
    """(program, item) of every tile."""
    items = [
        schedule.batch * sum(schedule.heads[:c]) + local
        for c, (heads, tiles) in enumerate(zip(schedule.heads, schedule.tiles, strict=True))
        for local in range(schedule.batch * heads)
        for _ in range(tiles)
    ]
    return [(tile // schedule.share, item) for tile, item in enumerate(items)]


@pytest.mark.parametrize(
    ("batch", "heads", "lengths", "programs"),
    [
        (1, (4, 4), (131072, 320), 264),
        (3, (1, 2, 1), (64, 0, 1000), 7),
        (2, (3,), (1,), 264),
        (1, (1, 0), (5000, 0), 1),
    ],
)
def test_pieces_have_places_of_their_own(batch: int, heads: tuple[int, ...], lengths: tuple[int, ...], programs: int):
    schedule = plan(batch, heads, lengths, TILE, programs)
    found = _pieces(schedule)
    assert len(found) == schedule.begins[-1]
    assert schedule.programs == len({program for program, _ in found}) <= programs
    places = Counter(program + item for program, item in set(found))
    assert set(places.values()) == {1}
    assert max(places) < schedule.pieces


def test_no_tiles() -> None:
    schedule = plan(2, [3, 1], [0, 0], TILE, 264)
    assert (schedule.programs, schedule.loads(), schedule.share) == (0, [], 1)


@needs_triton
def test_programs_across_heads(interpreter: ProcessPoolExecutor) -> None:
    """1, 2 and 3 multiprocessors for 36 tiles, and more than there are tiles."""
    assert max(interpreter.submit(ragged_in_triton.errors, [1, 2, 3, 50]).result()) < 1e-6


@needs_triton
def test_bounds_are_cut_on_a_gpu(interpreter: ProcessPoolExecutor) -> None:
    assert interpreter.submit(ragged_in_triton.wild_bounds_are_cut).result()


@needs_triton
def test_nan_stays_on_a_gpu(interpreter: ProcessPoolExecutor) -> None:
    assert interpreter.submit(ragged_in_triton.nan_stays).result()


def test_nan_stays() -> None:
    q, (cluster,) = _made((Part((0, 1), 5),))
    cluster.keys[0, 1, 2] = torch.nan
    for out, lse in (ragged_decode(q, (cluster,)), reference.ragged_decode(q, (cluster,), 0.2)):
        assert out[0, 3:].isnan().all()
        assert lse[0, 3:].isnan().all()
        assert out[0, :3].isfinite().all()
        assert out[1].isfinite().all()


def test_equal_lengths_are_dense_decoding() -> None:
    q, clusters = _made((Part((2, 0), 50), Part((1,), 50)))
    order = [(*clusters[0].heads, *clusters[1].heads).index(head) for head in range(3)]
    keys, values = (
        torch.cat([getattr(cluster, name) for cluster in clusters], 1)[:, order] for name in ("keys", "values")
    )
    torch.testing.assert_close(ragged_decode(q, clusters), flash_decode(q, keys, values), atol=1e-6, rtol=0)


def test_order_of_slots_does_not_matter() -> None:
    q, (cluster,) = _made((Part((0,), 90),))
    turned = replace(cluster, keys=cluster.keys.roll(37, 2), values=cluster.values.roll(37, 2))
    torch.testing.assert_close(ragged_decode(q, (turned,)), ragged_decode(q, (cluster,)), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"heads": (0,)}, "keys of 2 KV heads"),
        ({"longest": 9}, "longest=9, but there are 8 slots"),
        ({"values": torch.zeros(1, 2, 7, 16)}, "one shape and type"),
        ({"bounds": torch.zeros(1, 2, 2)}, "bounds must be int32"),
    ],
)
def test_clusters_that_do_not_fit_themselves(change: dict[str, object], problem: str) -> None:
    (cluster,) = _made((Part((0, 1), 8),), (1, 1, 16))[1]
    with pytest.raises(ValueError, match=problem):
        replace(cluster, **change)  # type: ignore[arg-type]


def test_clusters_that_do_not_fit_the_queries() -> None:
    q, (cluster,) = _made((Part((0, 1), 8),), (1, 1, 16))
    for clusters, problem in (
        ((), "1 to 3 clusters"),
        ((replace(cluster, heads=(0, 2)),), r"they hold \[0, 2\]"),
        ((cluster, cluster), r"they hold \[0, 0, 1, 1\]"),
        ((replace(cluster, keys=cluster.keys.half(), values=cluster.values.half()),), "don't fit cluster 0"),
    ):
        with pytest.raises(ValueError, match=problem):
            ragged_decode(q, clusters)
    with pytest.raises(ValueError, match="of 5 query heads once"):
        ragged_decode(q[:, :5], (cluster,))
