"""Norm fusion and rotations leave the function as it is, to the precision of float64."""

from dataclasses import replace
from types import MappingProxyType, SimpleNamespace

import pytest
import torch
from models import CONFIGS, build_model
from runs import distance, logits
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from compress.families import FAMILIES, Family
from compress.model import ModelFacts
from compress.schema import Weights
from compress.weights import rotation
from compress.weights.rotation import Rotations, describe, make_rotations, rotate_layer, rotate_rows, unties

EXACT = 1e-9


def facts_of(model: PreTrainedModel) -> ModelFacts:
    family, config = FAMILIES[model.config.model_type], model.config
    tied = bool(config.tie_word_embeddings)
    return ModelFacts("m", "m", config, family, torch.float32, tied, MappingProxyType({}), 0)


def rotated(model: PreTrainedModel, settings: Weights, centred: bool = False) -> PreTrainedModel:
    """A copy of a float64 model, untied where the settings say so, its weights through the functions under test."""
    facts = facts_of(model)
    family, rotations = facts.family, make_rotations(facts, settings, seed=3)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for index in range(facts.num_layers):
        prefix = f"{family.layers}.{index}."
        layer = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
        turn(layer, family, rotations)
        state |= {prefix + key: tensor for key, tensor in layer.items()}
    embed, norm, head = (f"{name}.weight" for name in (family.embed, family.final_norm, family.head))
    if centred:
        state[embed] -= state[embed].mean(-1, keepdim=True)
    if not facts.tied or unties(facts, settings):
        state[head] = rotate_rows(state[head].clone(), rotations, state[norm])
    else:
        del state[head]
    state[embed] = rotate_rows(state[embed].clone(), rotations)
    if rotations.residual is not None:
        state[norm] = torch.ones_like(state[norm])
    config = type(model.config).from_dict(model.config.to_dict())
    config.tie_word_embeddings = facts.tied and not unties(facts, settings)
    copy = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    copy.load_state_dict(state, strict=not config.tie_word_embeddings)
    return in_float64(copy)


def turn(layer: dict[str, Tensor], family: Family, rotations: Rotations) -> None:
    """What ``rotate_layer`` does, without its last step, the rounding to float32."""
    if rotations.residual is not None:
        rotation._rotate_residual(layer, family, rotations.residual)
    if rotations.heads is not None:
        rotation._rotate_heads(layer, family, rotations.heads)


class Norm(nn.Module):
    """RMSNorm in the type of its input; transformers' own goes through float32."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


def in_float64(model: PreTrainedModel) -> PreTrainedModel:
    model = model.double().eval()
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            model.set_submodule(name, Norm(module))
    return model


@pytest.fixture(scope="module", params=CONFIGS)
def dense(request: pytest.FixtureRequest) -> PreTrainedModel:
    return in_float64(build_model(request.param))


@pytest.mark.parametrize("kind", ["hadamard", "random"])
@pytest.mark.parametrize("untie", ["auto", "no"])
def test_logits_stay(dense: PreTrainedModel, kind: str, untie: str) -> None:
    settings = Weights(rotation=kind, untie=untie)  # type: ignore[arg-type]
    turned = rotated(dense, settings)
    assert distance(logits(turned), logits(dense)) <= EXACT
    value = "model.layers.0.self_attn.v_proj.weight"
    assert distance(turned.state_dict()[value], dense.state_dict()[value]) > 0.1
    stays = dense.config.tie_word_embeddings and untie == "no"
    assert torch.equal(turned.model.embed_tokens.weight, dense.model.embed_tokens.weight) == stays
    assert (turned.lm_head.weight is turned.model.embed_tokens.weight) == stays
    if not stays:
        gains = [tensor for key, tensor in turned.state_dict().items() if key.endswith("layernorm.weight")]
        assert all(torch.equal(gain, torch.ones_like(gain)) for gain in gains)


def test_centred_embeddings_would_change_the_function(dense: PreTrainedModel) -> None:
    assert distance(logits(rotated(dense, Weights(rotation="hadamard"), centred=True)), logits(dense)) > 1e-3


@pytest.mark.parametrize("part", ["residual", "heads"])
def test_each_rotation_stays_by_itself(monkeypatch: pytest.MonkeyPatch, dense: PreTrainedModel, part: str) -> None:
    def one(facts: ModelFacts, settings: Weights, seed: int) -> Rotations:
        return replace(rotation.make_rotations(facts, settings, seed), **{part: None})

    monkeypatch.setitem(rotated.__globals__, "make_rotations", one)
    assert distance(logits(rotated(dense, Weights(rotation="hadamard"))), logits(dense)) <= EXACT


def test_a_rotated_layer_is_rounded_once(dense: PreTrainedModel) -> None:
    facts = facts_of(dense)
    rotations = make_rotations(facts, Weights(rotation="hadamard"), seed=0)
    weights = {key: tensor.float() for key, tensor in dense.model.layers[0].state_dict().items()}
    kept = {key: tensor.clone() for key, tensor in weights.items()}
    expected = {key: tensor.double() for key, tensor in weights.items()}
    turn(expected, facts.family, rotations)
    found = rotate_layer(weights, facts.family, rotations)
    assert found.keys() == weights.keys()
    for key, tensor in found.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[key].float()), key
        assert torch.equal(weights[key], kept[key]), key


def test_without_rotations_nothing_changes(dense: PreTrainedModel) -> None:
    weights = {key: tensor.float() for key, tensor in dense.model.layers[0].state_dict().items()}
    rotations = make_rotations(facts_of(dense), Weights(rotation="none"), seed=0)
    found = rotate_layer(weights, facts_of(dense).family, rotations)
    assert all(torch.equal(found[key], weights[key]) for key in weights)
    embed = dense.model.embed_tokens.weight.detach().float()
    assert rotate_rows(embed, rotations, torch.rand(embed.shape[1])) is embed


def test_rows_are_rotated_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    Q, _ = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64, generator=generator))
    matrix, gain = torch.randn(37, 16, generator=generator), torch.rand(16, generator=generator)
    expected = (matrix.double() * gain.double() @ Q).float()
    monkeypatch.setattr(rotation, "ROWS_AT_ONCE", 10)
    found = rotate_rows(matrix, Rotations(residual=Q), gain)
    assert found is matrix
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_seeds_and_the_two_rotations_differ() -> None:
    model = build_model("llama_untied")
    facts, settings = facts_of(model), Weights(rotation="random")
    first, again, other = (make_rotations(facts, settings, seed) for seed in (0, 0, 1))
    assert torch.equal(first.residual, again.residual)  # type: ignore[arg-type]
    for part in ("residual", "heads"):
        Q = getattr(first, part)
        torch.testing.assert_close(Q @ Q.t(), torch.eye(len(Q), dtype=torch.float64), rtol=0, atol=1e-12)
        assert not torch.equal(Q, getattr(other, part))


@pytest.mark.parametrize(
    ("tied", "kind", "untie", "residual", "heads", "untied"),
    [
        (True, "none", "auto", False, False, False),
        (True, "none", "yes", False, False, True),
        (True, "hadamard", "auto", True, True, True),
        (True, "hadamard", "yes", True, True, True),
        (True, "hadamard", "no", False, True, False),
        (False, "hadamard", "no", True, True, False),
        (False, "random", "auto", True, True, False),
        (False, "none", "yes", False, False, False),
    ],
)
def test_what_is_rotated_and_untied(
    tied: bool, kind: str, untie: str, residual: bool, heads: bool, untied: bool
) -> None:
    facts = SimpleNamespace(tied=tied, config=SimpleNamespace(hidden_size=24), head_dim=8)
    settings = Weights(rotation=kind, untie=untie)  # type: ignore[arg-type]
    rotations = make_rotations(facts, settings, 0)  # type: ignore[arg-type]
    assert (rotations.residual is not None, rotations.heads is not None) == (residual, heads)
    assert tuple(name != "none" for name in rotations.names) == (residual, heads)
    assert describe(facts, settings) == rotations.names  # type: ignore[arg-type]
    assert unties(facts, settings) == untied  # type: ignore[arg-type]
