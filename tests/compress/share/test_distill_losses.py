"""The losses of the distillation, against plain PyTorch."""

import copy

import pytest
import torch
import torch.nn.functional as F
from models import build_model
from torch import Tensor
from transformers import PreTrainedModel

from compress.plan import Share
from compress.share import distill
from compress.share.distill import Pair, Terms
from compress.share.modules import share_layers
from compress.share.trainer_parts import consumers, first_layer, learning, trained_parameters

SHARES = {2: Share("attn", 1, (1, 0, 2, 3, 5, 4)), 3: Share("kv", 1)}


@pytest.fixture(scope="module")
def teacher() -> PreTrainedModel:
    return build_model("llama", num_hidden_layers=5)


@pytest.fixture
def student(teacher: PreTrainedModel) -> PreTrainedModel:
    model = copy.deepcopy(teacher)
    share_layers(model, SHARES)
    return model


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 300, (3, 20), generator=torch.Generator().manual_seed(3))


def plain_losses(student: PreTrainedModel, teacher: PreTrainedModel, ids: Tensor, terms: Terms) -> list[Tensor]:
    """The definition: whole logits, PyTorch's own losses."""
    states: dict[str, list[Tensor]] = {"ours": [], "theirs": []}
    hooks = []
    for name, model in (("ours", student), ("theirs", teacher)):
        modules = [model.model.layers[layer] for layer in consumers(SHARES)] + [model.model.norm]
        for module in modules:
            hooks.append(module.register_forward_hook(lambda m, i, out, name=name: states[name].append(out)))
    logits, theirs = student(ids).logits, teacher(ids).logits
    for hook in hooks:
        hook.remove()
    hidden = torch.stack(
        [((a - b).square().sum(-1) / b.square().sum(-1)).mean() for a, b in zip(*states.values(), strict=True)]
    ).mean()
    warm = terms.temperature
    wanted, found = F.log_softmax(theirs / warm, -1).flatten(0, 1), F.log_softmax(logits / warm, -1).flatten(0, 1)
    soft = warm**2 * F.kl_div(found, wanted, reduction="batchmean", log_target=True)
    hard = F.cross_entropy(logits.flatten(0, 1), theirs.argmax(-1).flatten())
    following = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return [hidden, soft, hard, following]


@pytest.mark.parametrize("trained", ["consumers", "all"])
@pytest.mark.parametrize(
    "terms", [Terms(1.0, 0.7, 0.3, 0.2, 2.0), Terms(next=1.0), Terms(0.5, 0.0, 1.0), Terms(soft=1.0)]
)
def test_losses_and_gradients_are_those_of_plain_pytorch(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    ids: Tensor,
    trained: str,
    terms: Terms,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distill, "CHUNK", 7)
    parameters = trained_parameters(student, SHARES, trained)
    with learning(student, parameters.values()):
        pair = Pair(student, teacher, first_layer(SHARES, trained), consumers(SHARES))
        losses = pair(ids, terms)
        gradients = torch.autograd.grad(losses[0], list(parameters.values()))
        parts = plain_losses(student, teacher, ids, terms)
        whole = sum(weight * part for weight, part in zip(terms[:4], parts, strict=True))
        expected = torch.autograd.grad(whole, list(parameters.values()))
    torch.testing.assert_close(losses[0], whole.detach())
    for place, (weight, part) in enumerate(zip(terms[:4], parts, strict=True), 1):
        torch.testing.assert_close(losses[place], part.detach() if weight else torch.zeros(()))
    for name, found, wanted in zip(parameters, gradients, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6, msg=name)


def test_a_student_that_is_the_teacher_diverges_by_nothing(teacher: PreTrainedModel, ids: Tensor) -> None:
    kl, lost = Pair(copy.deepcopy(teacher), teacher, 0, [1]).judge(ids)
    assert abs(float(kl)) < 1e-6
    torch.testing.assert_close(lost, teacher(ids, labels=ids).loss)


def test_judging_gives_the_divergence_at_temperature_1(
    student: PreTrainedModel, teacher: PreTrainedModel, ids: Tensor
) -> None:
    parts = plain_losses(student, teacher, ids, Terms(1, 1, 1, 1, 1.0))
    kl, lost = Pair(student, teacher, 1, consumers(SHARES)).judge(ids)
    torch.testing.assert_close(torch.stack([kl, lost]), torch.stack([parts[1], parts[3]]).detach())
    assert kl > 0.01


def test_what_is_trained(student: PreTrainedModel) -> None:
    names = set(trained_parameters(student, SHARES, "consumers"))
    norms = ("input_layernorm", "post_attention_layernorm")
    wanted = {f"model.layers.{layer}.{norm}.weight" for layer in (2, 3, 4) for norm in norms}
    wanted |= {f"model.layers.2.self_attn.{name}_proj.weight" for name in "vo"}
    wanted |= {f"model.layers.3.self_attn.{name}_proj.weight" for name in "qo"}
    assert names == {*wanted, "model.norm.weight"}
    assert len(trained_parameters(student, SHARES, "all")) == len(list(student.parameters()))


def test_gradients_are_as_before_afterwards(student: PreTrainedModel) -> None:
    parameters = trained_parameters(student, SHARES, "consumers")
    student.model.embed_tokens.weight.requires_grad_(True)
    before = {name: parameter.requires_grad for name, parameter in student.named_parameters()}
    with learning(student, parameters.values()):
        assert {name for name, p in student.named_parameters() if p.requires_grad} == set(parameters)
    assert {name: parameter.requires_grad for name, parameter in student.named_parameters()} == before


def test_nothing_of_a_pass_is_held(student: PreTrainedModel, teacher: PreTrainedModel, ids: Tensor) -> None:
    Pair(student, teacher, 1, consumers(SHARES))(ids, Terms(soft=1.0))
    with pytest.raises(RuntimeError, match="hasn't attended"):
        student.model.layers[2].self_attn.echo.of(1)
