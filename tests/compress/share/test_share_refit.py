"""Trials, streams of windows, and fits against least squares on matrices written out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import build_model
from share_cases import TWIN, made_up
from torch import Tensor

from compress.plan import Share
from compress.share.modules import share_layers
from compress.share.refit import Fit, fit, targets
from compress.share.trial import Course, Fitted, Trial

DAMP = 0.01


def windows(count: int = 3, length: int = 80) -> Tensor:
    return torch.randint(4, 300, (count, length), generator=torch.Generator().manual_seed(2))


def fitted(trial: Trial, folder: Path, ids: Tensor, shares: dict[int, Share], values: bool = False) -> dict[int, Fit]:
    """All layers that share, one after the other; call it at work."""
    course = Course(trial, ids, folder, [share.source for share in shares.values()])
    files = {layer: targets(trial, course, layer, folder / f"target-{layer}.bin") for layer in shares}
    trial.share(shares)
    course.changed(min(shares))
    return {layer: fit(trial, course, layer, files[layer], DAMP, values) for layer in sorted(shares)}


def outputs(model: Any, layer: int, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer's output projection gets and gives in a plain forward pass, tokens in rows."""
    held: list[tuple[Tensor, Tensor]] = []
    module = model.model.layers[layer].self_attn.o_proj
    hook = module.register_forward_hook(lambda _, given, out: held.append((given[0].flatten(0, 1), out.flatten(0, 1))))
    with torch.no_grad():
        model(ids, use_cache=False)
    hook.remove()
    return held[0]


@pytest.mark.parametrize(
    "shares", [{2: Share("attn", 1)}, {3: Share("kv", 0), 4: Share("kv", 0)}, {4: Share("attn", 1)}]
)
def test_a_course_is_the_models_own_forward_pass(tmp_path: Path, shares: dict[int, Share]) -> None:
    ids = windows()
    plain, tried = (build_model("llama", num_hidden_layers=6) for _ in range(2))
    share_layers(plain, shares)
    held: dict[int, Tensor] = {}
    for index, layer in enumerate(plain.model.layers):
        layer.register_forward_pre_hook(lambda _, given, index=index: held.setdefault(index, given[0]))
    with torch.no_grad():
        wanted = plain(ids, use_cache=False)
        loss = torch.nn.functional.cross_entropy(wanted.logits[0, :-1], ids[0, 1:], reduction="sum")
    trial = Trial(tried)
    with trial.at_work():
        course = Course(trial, ids, tmp_path, [1, 2, 3])
        for layer in (5, 0, 2, 4):
            course.stream(1, layer)  # of the dense model
        trial.share(shares)
        course.changed(min(shares))
        for layer in (4, 5, 2):
            torch.testing.assert_close(course.stream(1, layer)[0], held[layer][1], rtol=1e-4, atol=1e-5)
        assert trial.nll(course.final(0, min(shares)), ids[0]) == pytest.approx(float(loss), rel=1e-5)
        course.close()
    assert not list(tmp_path.glob("*.bin"))


def test_a_model_is_dense_again_behind_a_trial(tmp_path: Path) -> None:
    model, ids = build_model("llama", num_hidden_layers=4), windows(1, 20)
    with torch.no_grad():
        before = model(ids).logits
        trial = Trial(model)
        with trial.at_work():
            trial.share({2: Share("attn", 1)}, {2: Fitted(torch.zeros(96, 96))})
        assert torch.equal(model(ids).logits, before)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("mode", ["attn", "kv"])
@pytest.mark.parametrize("name", ["llama", "llama_untied"])
def test_a_fit_is_the_ridge_regression_that_it_says(tmp_path: Path, name: str, mode: Any) -> None:
    ids, shares = windows(), {2: Share(mode, 1), 3: Share(mode, 0)}
    model = build_model(name, num_hidden_layers=4)
    wanted = {layer: outputs(model, layer, ids)[1].double() for layer in shares}
    own = {layer: model.model.layers[layer].self_attn.o_proj.weight.double() for layer in shares}
    trial = Trial(model)
    with trial.at_work():
        fits = fitted(trial, tmp_path, ids, shares)
    for layer in shares:  # each in the model in which the one before shares and is fitted
        share_model = build_model(name, num_hidden_layers=4)
        share_layers(share_model, {index: share for index, share in shares.items() if index <= layer})
        if layer == 3:
            share_model.model.layers[2].self_attn.o_proj.weight.data = fits[2].fitted.output
        inputs, given = (part.double() for part in outputs(share_model, layer, ids))
        left = wanted[layer] - given
        ridge = DAMP * inputs.square().sum(0).mean()
        step = torch.linalg.solve(inputs.t() @ inputs + ridge * torch.eye(inputs.shape[1]), inputs.t() @ left)
        torch.testing.assert_close(fits[layer].fitted.output.double(), own[layer] + step.t(), rtol=1e-3, atol=1e-4)
        norm = wanted[layer].square().sum()
        assert fits[layer].before == pytest.approx(float(left.square().sum() / norm), rel=1e-4)
        assert fits[layer].after == pytest.approx(float((left - inputs @ step).square().sum() / norm), rel=1e-3)


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("mode", ["attn", "kv"])
@pytest.mark.parametrize("name", ["llama", "llama_untied", "qwen3"])
def test_every_fit_lowers_the_error_and_values_lower_it_more(tmp_path: Path, name: str, mode: Any, layer: int) -> None:
    trial = Trial(build_model(name, num_hidden_layers=4))
    with trial.at_work():
        (tmp_path / "a").mkdir()
        found = fitted(trial, tmp_path / "a", windows(), {layer: Share(mode, layer - 1)})[layer]
        assert found.after < found.before
        if mode == "attn":
            trial.share({})
            (tmp_path / "b").mkdir()
            more = fitted(trial, tmp_path / "b", windows(), {layer: Share(mode, layer - 1)}, values=True)[layer]
            assert more.fitted.value is not None
            assert more.after < found.after
            assert more.before == pytest.approx(found.before)


def test_what_a_layer_has_anyway_is_left_as_it_is(twins: Any, tmp_path: Path) -> None:
    trial, ids = Trial(twins), made_up(4, 100, 3)
    weight = twins.model.layers[3].self_attn.o_proj.weight.clone()
    with trial.at_work():
        found = fitted(trial, tmp_path, ids, {3: Share("attn", 2, TWIN)})[3]
    assert found.before < 1e-10
    torch.testing.assert_close(found.fitted.output, weight, rtol=1e-4, atol=1e-5)


def test_keys_and_values_have_no_values_to_fit(tmp_path: Path) -> None:
    trial = Trial(build_model("llama"))
    with trial.at_work(), pytest.raises(ValueError, match="layer 2 has no values"):
        fitted(trial, tmp_path, windows(), {2: Share("kv", 1)}, values=True)
