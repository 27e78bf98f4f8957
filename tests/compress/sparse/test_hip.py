"""HiP's two searches: what they list, and that they find what stands out."""

import itertools

import pytest
import torch
from compress.kernels.block_attention import BlockList
from torch import Tensor

from compress.sparse.baselines import METHODS, Shape
from compress.sparse.hip import HipSettings, Stage, search
from compress.sparse.hip_tree import TreeSettings, tree_search
from compress.sparse.recall import recall

SETTINGS = HipSettings(k=64, block_q=16, sink=8, window=32)


def tensors(rows: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 4, rows, 16, generator=generator), torch.randn(2, 2, length, 16, generator=generator)


def valid(blocks: BlockList, rows: int, length: int) -> bool:
    """Lists ascend without overlaps, behind the sink and before the window of the block's first row."""
    for b, n, i in itertools.product(*map(range, blocks.counts.shape)):
        starts = blocks.starts[b, n, i, : int(blocks.counts[b, n, i])].tolist()
        near = length - rows + i * blocks.block_q - blocks.window + 1
        steps = [later - earlier for earlier, later in itertools.pairwise(starts)]
        if any(step < blocks.block_k for step in steps) or (starts and starts[0] < blocks.sink):
            return False
        if starts and starts[-1] + blocks.block_k > near:
            return False
    return True


@pytest.mark.parametrize(("rows", "length"), [(700, 700), (37, 901), (1, 650), (64, 64)])
def test_lists_are_in_order_and_between_sink_and_window(rows: int, length: int) -> None:
    q, k = tensors(rows, length)
    found = search(q, k, SETTINGS)
    assert valid(found, rows, length)
    shape = Shape(64, 16, 8, 8, 32)
    assert all(valid(method(q, k, shape), rows, length) for method in METHODS.values())


def test_a_list_as_long_as_the_text_sees_everything() -> None:
    q, k = tensors(300, 500)
    everything = search(q, k, HipSettings(k=512, block_q=16, sink=8, window=32))
    assert everything.visible(300, 500).all(1).equal(torch.ones(2, 300, 500).tril(200).bool())
    torch.testing.assert_close(recall(q, k, everything), torch.ones(2, 4, 300))


def planted(place: int, length: int) -> tuple[Tensor, Tensor]:
    """Queries that all look for one key."""
    q, k = tensors(64, length, seed=3)
    direction = torch.nn.functional.normalize(torch.randn(16, generator=torch.Generator().manual_seed(5)), dim=0)
    q = q * 0.3 + 4 * direction
    k = k - (k @ direction)[..., None] * direction
    k[:, :, place - 16 : place + 16] += 3 * direction
    return q, k


@pytest.mark.parametrize("place", [333, 1111, 1777])
def test_what_stands_out_is_found(place: int) -> None:
    q, k = planted(place, 2048)
    stages = (Stage(64, 4, 0, 1.0, 8), Stage(8, 4, 512, 1.0, 4))
    for found in (
        search(q, k, HipSettings(k=64, block_q=16, sink=8, window=32, stages=stages)),
        tree_search(q, k, TreeSettings(k=256, block_q=16, block_k=8, sink=8, window=32)),
    ):
        assert bool(found.visible(64, 2048)[..., place].all())


def test_stages_keep_what_the_length_allows() -> None:
    first, second, last = HipSettings().stages
    assert [stage.kept(1 << 20) for stage in (first, second, last)] == [1 << 20, 32768, 8192]
    assert [stage.kept(16384) for stage in (first, second, last)] == [16384, 4096, 4096]
    assert [stage.kept(16384, 2048) for stage in (first, second, last)] == [16384, 4096, 2048]


@pytest.mark.parametrize("representative", ["first", "center", "last", "random"])
def test_a_tree_of_one_iteration_takes_the_best_of_all_blocks(representative: str) -> None:
    """With twice as many blocks as nodes every block is judged by itself."""
    q, k = tensors(8, 256, seed=1)
    settings = TreeSettings(128, 8, 8, stride=1, representative=representative, sink=0, window=1)  # type: ignore[arg-type]
    found = tree_search(q, k, settings)
    products = torch.einsum("bngrd,bntd->bngrt", q.unflatten(1, (2, 2)), k)
    unseen = torch.arange(256) > torch.arange(248, 256)[:, None]
    best = products.masked_fill(unseen, -torch.inf).amax((2, 3)).unflatten(2, (32, 8)).amax(3).topk(16).indices
    assert torch.equal(found.starts[:, :, 0].long(), best.sort().values * 8)


def test_a_tree_lists_at_most_k_tokens_once_and_all_of_a_short_text() -> None:
    q, k = tensors(50, 333)
    found = tree_search(q, k, TreeSettings(64, 16, 4, shared=False))
    assert found.counts.shape == (2, 4, 4)
    assert int(found.counts.max()) == 16
    named = found.listed(336).sum(-1)
    assert torch.equal(named, found.counts * 4)
    short = tree_search(q[:, :, :5], k[:, :, :40], TreeSettings(64, 16, 4))
    assert short.counts.eq(10).all()


@pytest.mark.parametrize(
    "changed", [{"k": 4}, {"block_q": 20}, {"window": 0}, {"stages": (Stage(8, 4, 0, 1.0, 1), Stage(32, 4, 9, 1.0, 1))}]
)
def test_settings_that_do_not_fit_are_refused(changed: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"k=|block_q=|stages"):
        HipSettings(**changed)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="k=9"):
        TreeSettings(k=9)
