"""KV heads that copy: how they are told, and that a run keeps all their tokens at the salient tokens' bits."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compress.heads.copies import Copies
from compress.kv.copying import anywhere, best, copying_scores, how_many
from compress.model import open_model
from compress.options import RunOptions
from compress.pipeline import run
from compress.plan import KVBits, read_plan
from compress.tap import Seen

Tiny = Callable[[str], Path]


def seen_by(copies: Copies, ahead: int, strength: float = 40.0) -> Seen:
    """Two heads: one looks at what is ``ahead`` of its token's copies, one everywhere alike."""
    tokens, period = len(copies.ids), copies.period
    place = (torch.arange(tokens) - copies.first) % period
    key = torch.nn.functional.one_hot(place, period).float()
    looking = torch.nn.functional.one_hot((place + ahead) % period, period).float() * strength
    query = torch.stack([looking, torch.zeros_like(looking)])[None]

    def attend() -> Tensor:
        raise AssertionError

    return Seen(0, query, key[None, None], key[None, None], 1.0, attend)


@pytest.fixture
def tokenizer(tiny: Tiny):  # type: ignore[no-untyped-def]
    return open_model(str(tiny("llama"))).tokenizer()


@pytest.mark.parametrize("ahead", [0, 1])
def test_mass_is_that_of_what_is_ahead_of_the_copies(tokenizer, ahead: int) -> None:  # type: ignore[no-untyped-def]
    copies = Copies.of(tokenizer, 300, 64, 4, seed=0)
    assert copies.period * 4 + copies.first == len(copies.ids)
    assert torch.equal(copies.ids[copies.first :].view(4, -1)[0], copies.ids[copies.first :].view(4, -1)[3])
    sharp, even = copies.mass(seen_by(copies, ahead), ahead)
    own = 1.0 if ahead else 0.5  # a row looks at itself as at its copies: half of the mass, a third, a quarter
    assert float(sharp) >= (0.95 if ahead else own)
    assert 0 < float(even) < 0.1
    assert float(copies.mass(seen_by(copies, 1 - ahead), ahead)[0]) < 0.1


def test_scores_are_those_of_the_whole_model(tiny: Tiny) -> None:
    """Layer by layer is what a model in one piece says."""
    view = open_model(str(tiny("llama")))
    found = copying_scores(view, torch.device("cpu"), seed=3)
    model = view.load_dense().eval()
    model.set_attn_implementation("compress_tap")
    copies = Copies.of(view.tokenizer(), len(view.embed_weight()), 512, 4, 3)
    expected = torch.zeros_like(found)

    def tap(seen: Seen) -> Tensor:
        expected[seen.layer] = copies.mass(seen, 1).view(2, 3).amax(1)
        return seen.attend()

    with torch.no_grad():
        model(copies.ids[None], use_cache=False, tap=tap)
    torch.testing.assert_close(found, expected)


def test_the_best_are_taken_and_ties_go_to_the_first() -> None:
    scores = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.8, 0.2]])
    assert best(scores, 3, [1, 2]) == [(1, 0), (1, 1), (2, 0)]
    assert best(scores, 1, [0, 1, 2]) == [(0, 0)]
    assert anywhere(4, 2, [0, 2, 5]) == [(0, 0), (0, 1), (2, 0), (5, 0)]
    assert [how_many(0.1, heads) for heads in (90, 91, 8, 0)] == [9, 10, 1, 0]
    assert how_many(0.0, 90) == 0


def test_a_run_keeps_them_better(tiny: Tiny, tmp_path: Path) -> None:
    source = str(tiny("llama"))
    options = RunOptions(set=("eval=null", "kv.copying_heads=0.3", "kv.boundary_bits=null"))
    result = run(source, "zipcache-plus", out=tmp_path / "out", options=options)
    found = read_plan(result.out)
    assert found is not None
    kept = [
        (i, j)
        for i, layer in enumerate(found.layers)
        for j, head in enumerate(layer.heads)
        if head.kv == KVBits(high=(4, 4), low=(4, 4), ratio=1.0)
    ]
    scores = copying_scores(open_model(source), torch.device("cpu"))
    assert kept == best(scores, 2, [0, 1, 2])
    assert result.report["kv"]["copying_heads"] == [list(place) for place in kept]
