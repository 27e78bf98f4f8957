"""Fitting SEA's estimators: a planted pattern is learnt, a run goes on to the bit, divergence ends it; files."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compress.calibrate.errors import InputError
from compress.evalsuite.report.svg import to_svg
from models import build_model
from safetensors.torch import load_file, save_file
from sea_cases import SHAPE, drawn, estimator
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.heads.layers import Layers
from compress.sparse.sea_file import Learned
from compress.sparse.sea_fit import FitState, Progress, fit, shape_of
from compress.sparse.sea_layer import FitSettings, LayerFit, divergence, teacher
from compress.sparse.sea_learn import Learning, Pace, learn
from compress.sparse.sea_map import attention_map, draw
from compress.sparse.sea_mask import Budget
from compress.tap import Seen, Tap

QUICK = FitSettings(
    map=Pace(steps=6, every=2),
    mix=Pace(steps=4, every=2, rate=1e-2),
    budget=Budget(keys=4, block_q=8, block_k=4, sink=2, window=8),
    rows=16,
    held_out=1,
)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build_model("llama")


def tokens(sequences: int = 3, length: int = 48) -> Tensor:
    return torch.randint(0, 300, (sequences, length), generator=torch.Generator().manual_seed(1))


def run(model: PreTrainedModel, settings: FitSettings = QUICK, **how: object) -> list[Progress]:
    ids = tokens()
    return list(fit(model, ids, shape_of(model, 48, width=16, mixed=True), settings, **how))


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[key].nan_to_num(-1), theirs[key].nan_to_num(-1)) for key in ours
    )


# Learning


def quadratic(start: float) -> tuple[nn.Parameter, dict[str, nn.Parameter]]:
    parameter = nn.Parameter(torch.tensor([start, 1.0]))
    return parameter, {"x": parameter}


def test_the_best_check_is_kept() -> None:
    parameter, named = quadratic(4.0)
    goal = iter([3.0, 1.0, 2.0])
    states = list(learn(named, lambda step: parameter.square().sum(), lambda: next(goal), Pace(4, 0.1, every=2)))
    assert [state.step for state in states] == [0, 1, 2, 3, 4]
    assert states[-1].checks == ((0, 3.0), (2, 1.0), (4, 2.0))
    assert torch.equal(parameter.detach(), states[2].values["x"])
    assert not torch.equal(parameter.detach(), states[4].values["x"])


@pytest.mark.parametrize("what", ["loss", "check", "nan check"])
def test_divergence_ends_it_with_the_best(what: str) -> None:
    parameter, named = quadratic(4.0)
    wrong = {"loss": math.nan, "check": 9.0, "nan check": math.nan}[what]
    goal = iter([3.0, 1.0, 1.0 if what == "loss" else wrong, 1.0])

    def loss(step: int) -> Tensor:
        return parameter.square().sum() * (math.nan if what == "loss" and step == 3 else 1.0)

    states = list(learn(named, loss, lambda: next(goal), Pace(20, 0.1, every=2)))
    assert states[-1].diverged
    assert states[-1].step == 4
    assert torch.equal(parameter.detach(), states[2].values["x"])
    assert states[-1].lowest == 1.0


def test_the_rate_rises_and_falls() -> None:
    pace = Pace(steps=100, rate=2.0)
    rates = [pace.rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.4, rel=0.01)
    assert rates[4] == pytest.approx(2.0, rel=0.01)
    assert rates[-1] == pytest.approx(0.1, rel=0.02)
    assert rates[5:] == sorted(rates[5:], reverse=True)


def test_an_interrupted_learning_goes_on_to_the_bit() -> None:
    def states(start: Learning | None) -> list[Learning]:
        parameter, named = quadratic(4.0)
        return list(learn(named, lambda s: (parameter - s).square().sum(), lambda: parameter.sum().item(), pace, start))

    pace = Pace(9, 0.1, every=4)
    whole = states(None)
    for state in whole:
        again = states(Learning.from_tensors(state.tensors()))
        assert same(again[-1].tensors(), whole[-1].tensors())


# Losses


def test_the_teacher_is_the_models_own_attention(model: PreTrainedModel) -> None:
    layers, rows = Layers(model), torch.tensor([0, 7, 31])
    hidden = layers.embed(tokens()[0, :32])
    with layers.tapped(), torch.no_grad():
        caught: list[Seen] = []
        layers.run(1, hidden, layers.positions(hidden), lambda seen: caught.append(seen) or seen.attend())
        (seen,) = caught
        found = teacher(seen, rows) @ seen.value.repeat_interleave(3, 1)
        torch.testing.assert_close(found, seen.attend().transpose(1, 2)[:, :, rows], atol=1e-5, rtol=1e-4)


def test_divergence_is_zero_at_equal_maps_and_positive_elsewhere() -> None:
    q, k, v = drawn(20)
    seen = Seen(0, q, k, v, 0.4, lambda: q)
    attention = teacher(seen, torch.arange(20))
    assert divergence(attention, attention.log()) == pytest.approx(0, abs=1e-6)
    uniform = torch.ones(20, 20).tril()
    uniform = (uniform / uniform.sum(-1, keepdim=True)).log().expand(1, 4, 20, 20)
    expected = torch.nn.functional.kl_div(uniform[..., 5:, :5], attention[..., 5:, :5], reduction="none")
    assert divergence(attention, uniform) > 0.01
    assert expected.isfinite().all()


class Planted:
    """Layers without a model: heads 0 and 1 look at a marked token, the others at the first."""

    device = torch.device("cpu")

    def positions(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return hidden, hidden

    def run(self, index: int, hidden: Tensor, positions: tuple[Tensor, Tensor], tap: Tap) -> Tensor:
        seed = int(hidden[0, 0, 0])
        q, k, v = (x * 0.1 for x in drawn(hidden.shape[1], seed))
        mark = (6, 20)[seed % 2]
        q[:, :2, :, 0], q[:, 2:, :, 1] = 6.0, 6.0
        k[:, :, mark, 0], k[:, :, 0, 1] = 4.0, 4.0
        return tap(Seen(index, q, k, v, 0.35, lambda: q.transpose(1, 2)))


def test_a_planted_pattern_is_learnt_better_than_a_mean_map() -> None:
    """Which token is marked differs by sequence, so that no map for all rows can say it: queries and keys do."""
    hidden = [torch.full((1, 40, 1), float(seed)) for seed in range(10)]
    settings = FitSettings(map=Pace(steps=160, rate=2e-2, every=20), held_out=2)
    layer = LayerFit(Planted(), hidden, 0, replace(SHAPE, length=40, width=40), settings)
    mean, grid = layer.bounds()
    last = list(layer.learn("map", None))[-1]
    assert grid < 0.01
    assert last.lowest < 0.5 * last.before
    assert last.lowest < 0.8 * mean
    assert layer.divergence() == pytest.approx(last.lowest)


def test_bounds_are_those_of_known_attention() -> None:
    """Sequences that are all alike: their mean map is off only in that it stretches; wide pixels blur a peak."""
    hidden = [torch.full((1, 40, 1), 1.0) for _ in range(3)]
    settings = FitSettings(rows=1, held_out=1)  # the last row alone
    fine, coarse = (LayerFit(Planted(), hidden, 0, replace(SHAPE, length=40, width=w), settings) for w in (40, 4))
    assert fine.bounds() == pytest.approx((0, 0), abs=1e-4)
    assert coarse.bounds() == pytest.approx((math.log(10), math.log(10)), rel=0.1)


# The fit


def test_a_fit_walks_all_layers_and_leaves_the_model_as_it_was(model: PreTrainedModel) -> None:
    before = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    attention, model_was = model.config._attn_implementation, model.training
    progress = run(model)
    assert [p.layer for p in progress] == sorted(p.layer for p in progress)
    assert progress[-1].state.finished.keys() == {0, 1, 2}
    steps = [(p.phase, p.step) for p in progress if p.layer == 1]
    assert steps == [("map", s + 1) for s in range(6)] + [("mix", s + 1) for s in range(4)] + [("mix", 4)]
    assert same(before, model.state_dict())
    assert model.config._attn_implementation == attention
    assert model.training == model_was
    assert all(parameter.requires_grad for parameter in model.parameters())
    for layer in progress[-1].state.finished.values():
        assert layer.figures.after <= layer.figures.before
        assert layer.figures.mixed <= layer.figures.sparse
        assert layer.figures.mean_map > 0


def test_gradients_of_the_caller_are_the_callers(model: PreTrainedModel) -> None:
    walk = fit(model, tokens(), shape_of(model, 48, width=16), QUICK)
    with torch.enable_grad():
        for _ in range(3):
            next(walk)
            assert torch.is_grad_enabled()
    attention = model.config._attn_implementation
    walk.close()
    assert attention == "compress_tap"
    assert model.config._attn_implementation != attention


@pytest.mark.parametrize("place", [0, 3, 6, 8, 10, 14, 25])
def test_an_interrupted_fit_goes_on_to_the_bit(
    model: PreTrainedModel, place: int, tmp_path: Path, whole: list[Progress]
) -> None:
    path = tmp_path / "state.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in whole[place].state.tensors().items()}, path)
    again = run(model, start=FitState.from_tensors(load_file(path)))
    assert same(again[-1].state.tensors(), whole[-1].state.tensors())


@pytest.fixture(scope="module")
def whole(model: PreTrainedModel) -> list[Progress]:
    return run(model)


def test_only_chosen_layers_are_fitted(model: PreTrainedModel, whole: list[Progress]) -> None:
    found = run(model, chosen={1: (0, 1)})[-1].state.finished
    assert found.keys() == {1}
    assert same(found[1].tensors, whole[-1].state.finished[1].tensors)


def test_layers_with_a_window_of_their_own_are_left_alone() -> None:
    with pytest.raises(InputError, match="isn't a layer that attends to everything"):
        run(build_model("qwen2"), chosen={2: (0,)})


def test_what_cannot_be_fitted_is_told(model: PreTrainedModel) -> None:
    with pytest.raises(InputError, match="1 to 2 of 3 sequences"):
        run(model, replace(QUICK, held_out=3))
    with pytest.raises(InputError, match="at most 47"):
        next(fit(model, tokens(), shape_of(model, 47, width=16), QUICK))


# The file


def test_a_file_gives_the_estimators_back(model: PreTrainedModel, whole: list[Progress], tmp_path: Path) -> None:
    shape = shape_of(model, 48, width=16, mixed=True)
    learned = Learned.of(model.config, shape, whole[-1].state)
    learned.save(tmp_path / "sea.safetensors")
    found = Learned.load(tmp_path / "sea.safetensors", model.config)
    assert same(found.tensors, learned.tensors)
    assert found.header == learned.header
    assert found.layers == (0, 1, 2)
    assert same(found.estimator(2).state_dict(), whole[-1].state.finished[2].tensors)


def test_another_models_file_is_refused_with_both_fingerprints(
    model: PreTrainedModel, whole: list[Progress], tmp_path: Path
) -> None:
    learned = Learned.of(model.config, shape_of(model, 48, width=16, mixed=True), whole[-1].state)
    learned.save(tmp_path / "sea.safetensors")
    with pytest.raises(InputError, match=r"6 query and 2 KV heads of 16.*; this one: .*4 query and 4 KV heads of 12"):
        Learned.load(tmp_path / "sea.safetensors", build_model("llama_untied").config)


def test_damaged_files_are_told(model: PreTrainedModel, whole: list[Progress], tmp_path: Path) -> None:
    learned, path = Learned.of(model.config, shape_of(model, 48, width=16, mixed=True), whole[-1].state), tmp_path / "s"
    path.write_bytes(b"nothing")
    with pytest.raises(InputError, match="can't be read"):
        Learned.load(path, model.config)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="has no estimators"):
        Learned.load(path, model.config)
    save_file({"x": torch.zeros(1)}, path, {"compress_sea": '{"version": 1}'})
    with pytest.raises(InputError, match="header can't be read"):
        Learned.load(path, model.config)
    save_file({"x": torch.zeros(1)}, path, {"compress_sea": '{"version": 9}'})
    with pytest.raises(InputError, match="version 9"):
        Learned.load(path, model.config)
    save_file({name: t for name, t in learned.tensors.items() if "encoder" not in name}, path, learned.metadata())
    with pytest.raises(InputError, match=r"layers\.0\.encoder"):
        Learned.load(path, model.config)


# The picture


def test_a_map_is_the_heads_attention_in_fields() -> None:
    q, k, v = drawn(60)
    seen = Seen(3, q, k, v, 0.4, lambda: q)
    found = attention_map(estimator(), seen, head=2, size=12)
    assert found.rows == tuple(range(4, 60, 5))
    assert found.columns == tuple(range(0, 60, 5))
    torch.testing.assert_close(found.own.sum(1), torch.ones(12))
    torch.testing.assert_close(found.estimated.sum(1), torch.ones(12))
    own = teacher(seen, torch.arange(60))[0, 2]
    torch.testing.assert_close(found.own[7, 3], own[39, 15:20].sum())
    assert not found.own.triu(1).any()
    assert not found.estimated.triu(1).any()
    svg = to_svg(lambda: draw(340, found), "map", "chart", "attention of a head")
    assert "estimated" in svg
    assert "token 59, keys from 0" in svg
    with pytest.raises(ValueError, match="no head 4"):
        attention_map(estimator(), seen, head=4)
