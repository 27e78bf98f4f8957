"""Which layers are chosen: blocks, the search under a budget, KVSharer's order."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from models import build_model
from share_cases import TWIN, made_up

from compress.plan import Share
from compress.schema import Sharing
from compress.share import kvsharer
from compress.share.pairs import Candidates, blocks, most
from compress.share.search import Measured, State, search
from compress.share.similarity import Similarity, look
from compress.share.trial import Course, Trial
from compress.share.workbench import Text, Workbench
from compress.tap import Seen


def candidates(layers: range, limit: int = 99, kept: tuple[int, ...] = ()) -> Candidates:
    return Candidates(tuple(layers), kept, (), limit)


class Known:
    """A bench whose costs are known: of every layer alone, and dearer the more share."""

    def __init__(self, costs: dict[int, float]) -> None:
        self.costs, self.taken, self.tries = costs, {}, 0
        self.taken: dict[int, Share] = {}

    def dense(self) -> float:
        return 1.0

    def nearest(self, layer: int, sources: list[int]) -> int:
        return sources[-1]

    def attempt(self, layer: int, source: int, shares: Mapping[int, Share]) -> tuple[float, float, float]:
        self.tries += 1
        assert source not in shares
        assert source < layer
        return self.loss({*shares, layer}), 0.5, 0.25

    def add(self, layer: int, source: int) -> float:
        self.taken[layer] = Share("attn", source)
        return self.loss({*self.taken})

    def shares(self) -> dict[int, Share]:
        return dict(self.taken)

    def loss(self, layers: set[int]) -> float:
        return 1.0 + sum(self.costs[layer] for layer in layers) * (1 + 0.1 * len(layers))


COSTS = {3: 0.02, 4: 0.001, 5: 0.05, 6: 0.004, 7: 0.003, 8: 0.002}


def found(bench: Known, budget: float | None, limit: int = 99, state: State | None = None, stop: int = 10**9) -> State:
    def keep(now: State) -> None:
        if len(now.measured) > stop:
            raise KeyboardInterrupt

    return search(bench, candidates(range(2, 9), limit), budget, state or State(), keep)


def test_blocks_are_runs_whose_first_layer_gives() -> None:
    assert blocks(candidates(range(2, 9)), 3) == {3: 2, 4: 2, 6: 5, 7: 5}
    assert blocks(candidates(range(2, 9), limit=3), 3) == {3: 2, 4: 2, 6: 5}
    assert blocks(candidates(range(2, 9), kept=(3, 5)), 3) == {4: 2, 6: 5, 7: 5}
    assert blocks(Candidates((2, 3, 5, 6, 7), (), (4,), 9), 2) == {3: 2, 6: 5}


def test_a_share_of_the_layers_is_one_at_least() -> None:
    assert (most(30, 0.2), most(30, 0.01), most(32, 0.25), most(30, 0.3)) == (6, 1, 8, 9)


def test_the_cheapest_layers_are_added_while_the_budget_lasts() -> None:
    bench = Known(COSTS)
    state = found(bench, math.expm1(0.008))
    assert state.ended == "budget"
    assert state.chosen == [(4, 3), (8, 7)]  # 7 would be the next, but has given to 8
    assert state.reached == pytest.approx(bench.loss({4, 8}))
    assert sum(one.added for one in state.measured) == 2
    assert bench.tries < 6 + 5 + 3, "every layer was measured again in every round"


def test_without_a_budget_the_limit_decides() -> None:
    state = found(Known(COSTS), None, limit=2)
    assert (state.ended, len(state.chosen)) == ("limit", 2)


def test_where_nothing_fits_nothing_is_chosen() -> None:
    state = found(Known(COSTS), 0.0)
    assert (state.ended, state.chosen) == ("budget", [])
    assert len(state.measured) == 6


def test_no_chains_where_all_layers_are_free() -> None:
    state = found(Known(dict.fromkeys(range(3, 9), 0.0)), None)
    assert state.ended == "layers"
    takers, givers = {layer for layer, _ in state.chosen}, {source for _, source in state.chosen}
    assert not takers & givers


@pytest.mark.parametrize("stop", [0, 3, 6])
def test_a_search_goes_on_where_it_was(stop: int) -> None:
    whole, bench, state = found(Known(COSTS), 0.02), Known(COSTS), State()
    with pytest.raises(KeyboardInterrupt):
        found(bench, 0.02, state=state, stop=stop)
    again = State.from_json(state.to_json())
    after = Known(COSTS)
    for layer, source in again.chosen:
        after.add(layer, source)
    assert found(after, 0.02, state=again).chosen == whole.chosen
    assert after.tries + bench.tries == len(whole.measured)


def test_a_state_survives_json() -> None:
    state = State(1.0, [Measured(3, 2, 0, 1.5, 0.4, 0.2, True)], [(3, 2)], 1.5, "budget")
    assert State.from_json(state.to_json()) == state
    assert State.from_json(State().to_json()).measured == []


def bench_of(model: Any, folder: Path, **settings: Any) -> tuple[Trial, Workbench]:
    trial = Trial(model)
    similarity = Similarity.empty(trial.view.count, trial.view.config.num_attention_heads)
    seen: dict[int, Seen] = {}

    def tap(one: Seen) -> torch.Tensor:
        seen[one.layer] = one
        return one.attend()

    with trial.at_work():
        hidden = trial.view.embed(made_up(1, 160, 11)[0])
        for index in range(trial.view.count):
            hidden = trial.view.run(index, hidden, trial.view.positions(hidden), tap)
    weights = {layer: trial.dense[layer].o_proj.weight for layer in seen}
    look(similarity, seen, weights, torch.Generator().manual_seed(0))
    text = Text(made_up(4, 80, 12), made_up(8, 80, 13))
    return trial, Workbench(trial, text, Sharing(**settings), similarity, folder)


def test_the_layer_that_attends_alike_is_found_at_no_cost(twins: Any, tmp_path: Path) -> None:
    trial, bench = bench_of(twins, tmp_path)
    with trial.at_work():
        bench.open([3], [1, 2, 3])
        state = search(bench, candidates(range(1, 4), kept=(2,)), 1e-4, State(), lambda _: None)
        assert state.chosen == [(3, 2)]
        assert bench.shares() == {3: Share("attn", 2, TWIN)}
        assert state.reached == pytest.approx(state.dense, abs=1e-5)
        bench.close()


def test_heads_in_place_cost_much_and_a_fit_brings_some_back(twins: Any, tmp_path: Path) -> None:
    losses = {}
    for name, settings in {
        "matched": {"heads": "matched", "refit": "none"},
        "same": {"heads": "same", "refit": "none"},
        "fitted": {"heads": "same", "refit": "output"},
    }.items():
        trial, bench = bench_of(twins, tmp_path / name, **settings)
        with trial.at_work():
            bench.open([3], [2])
            losses["dense"] = bench.dense()
            losses[name] = bench.add(3, 2)
            bench.close()
    assert losses["matched"] == pytest.approx(losses["dense"], abs=1e-5)
    assert losses["same"] > losses["dense"] + 0.2
    assert losses["fitted"] < losses["same"] - 0.1


def test_layers_behind_an_added_one_are_fitted_again(tmp_path: Path) -> None:
    def fits(order: list[int]) -> tuple[dict[int, Any], float]:
        trial, bench = bench_of(build_model("llama_untied", num_hidden_layers=6), tmp_path / str(order))
        with trial.at_work():
            bench.open(range(2, 6), range(1, 6))
            loss = [bench.add(layer, 1) for layer in order][-1]
        return bench.fitted(), loss

    (forward, one), (backward, other) = fits([2, 3, 5]), fits([5, 3, 2])
    assert one == pytest.approx(other, abs=1e-5)
    for layer in (2, 3, 5):
        torch.testing.assert_close(forward[layer].output, backward[layer].output, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dissimilar", [True, False])
def test_kvsharer_tries_layers_by_distance(tmp_path: Path, dissimilar: bool) -> None:
    model, ids = build_model("llama", num_hidden_layers=6), made_up(4, 32, 5)
    trial = Trial(model)
    with trial.at_work():
        apart = kvsharer.distances(trial, ids)
        course = Course(trial, ids, tmp_path, range(6))
        told: list[kvsharer.Tried] = []
        layers = candidates(range(1, 6), limit=2)
        chosen, tried = kvsharer.choose(trial, course, layers, (apart, dissimilar), -1.0, told.append)
        nothing, all_tried = kvsharer.choose(trial, course, layers, (apart, dissimilar), 1.0, told.append)
        assert trial.shares == {}
    keys = torch.stack([torch.cat([k.flatten(), v.flatten()]) for k, v in means(model, ids)])
    torch.testing.assert_close(apart, torch.cdist(keys[None], keys[None])[0], rtol=1e-4, atol=1e-4)
    order = [one.distance for one in tried]
    assert order == sorted(order, reverse=dissimilar)
    assert len(chosen) == 2
    assert all(source < layer for layer, source in chosen.items())
    assert not {*chosen} & {*chosen.values()}
    assert nothing == {}
    assert len(all_tried) == 10
    assert told == tried + all_tried


def means(model: Any, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Mean keys and values of every layer, from a plain cache."""
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    return [(layer.keys.mean(0), layer.values.mean(0)) for layer in cache.layers]
