"""Gates: the loss and its gradient against plain autograd, the penalty, the schedule, and what they find."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from models import build_model
from torch import Tensor

from compress.heads.data import Item
from compress.heads.duo import (
    Gates,
    Settings,
    State,
    Streams,
    advance,
    aim_at,
    begin,
    optimise,
    place_of,
    rate_at,
    regularisation,
)
from compress.heads.layers import Layers
from compress.heads.streaming import streaming
from compress.tap import Seen

LENGTH = 48
NEAR = Settings(sink=2, recent=5, steps=20)


def items(count: int = 3, length: int = LENGTH) -> list[Item]:
    generator = torch.Generator().manual_seed(3)
    supervised = torch.arange(length) >= length - 9
    drawn = [torch.randint(0, 300, (length,), generator=generator) for _ in range(count)]
    return [Item(ids, supervised, "passkey", length - 8) for ids in drawn]


def some_gates(shape: tuple[int, ...]) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(5)) * 0.8 + 0.1


def near_mask(length: int, sink: int, recent: int) -> Tensor:
    row, key = torch.arange(length)[:, None], torch.arange(length)
    return (key <= row) & ((key < sink) | (key > row - recent))


def seen(length: int, heads: int = 4, kv_heads: int = 2) -> Seen:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, n, length, 8, generator=generator) for n in (heads, kv_heads, kv_heads))
    return Seen(0, query, key, value, 0.4, lambda: query.transpose(1, 2))


# The streaming branch


@pytest.mark.parametrize(("length", "sink", "recent"), [(300, 4, 70), (200, 90, 10), (65, 0, 64), (40, 64, 64)])
@pytest.mark.parametrize("learning", [False, True])
def test_streaming_rows_see_sinks_and_recent_tokens(length: int, sink: int, recent: int, learning: bool) -> None:
    case = seen(length)
    key, value = (x.repeat_interleave(2, 1) for x in (case.key, case.value))
    mask = near_mask(length, sink, recent)
    expected = F.scaled_dot_product_attention(case.query, key, value, mask, scale=0.4).transpose(1, 2)
    with torch.set_grad_enabled(learning):
        torch.testing.assert_close(streaming(case, sink, recent), expected, atol=1e-5, rtol=1e-5)


def test_streaming_never_makes_all_scores() -> None:
    """Neither the keys of a block nor its mask grow with the text."""
    sizes = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if function is F.scaled_dot_product_attention:
                sizes.append(args[3].numel())
            return function(*args, **(kwargs or {}))

    for length in (512, 4096):
        with Watch():
            streaming(seen(length), 4, 64)
        assert max(sizes) <= 64 * (4 + 2 * 64)


# The loss and its gradient


def plain_loss(name: str, gates: Tensor, item: Item, settings: Settings) -> Tensor:
    """The same loss by one autograd graph over both streams and whole masks."""
    model = build_model(name).eval().requires_grad_(False)
    layers = Layers(model)
    kept: list[Tensor] = []

    def reference(case: Seen) -> Tensor:
        kept.append(case.attend().detach())
        return kept[-1]

    def mixed(case: Seen) -> Tensor:
        group = case.query.shape[1] // case.key.shape[1]
        key, value = (x.repeat_interleave(group, 1) for x in (case.key, case.value))
        mask = near_mask(LENGTH, settings.sink, settings.recent)
        near = F.scaled_dot_product_attention(case.query, key, value, mask, scale=case.scaling).transpose(1, 2)
        whole = kept[case.layer] if settings.teacher_forced else case.attend()
        share = gates[case.layer].repeat_interleave(group)[:, None]
        return share * whole + (1 - share) * near

    with layers.tapped():
        finals = []
        for tap in (reference, mixed):
            hidden = layers.embed(item.ids)
            positions = layers.positions(hidden)
            for index in range(layers.count):
                hidden = layers.run(index, hidden, positions, tap if index in layers.full else None)
                if index not in layers.full and tap is reference:
                    kept.append(torch.empty(0))
            finals.append(layers.norm(hidden)[0, item.context :])
    return (finals[0] - finals[1]).square().mean()


@pytest.mark.parametrize("teacher_forced", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen2"])
def test_gradient_is_that_of_the_loss(name: str, teacher_forced: bool) -> None:
    settings = replace(NEAR, teacher_forced=teacher_forced)
    layers = Layers(build_model(name).eval())
    gates, item = some_gates((layers.count, layers.kv_heads)), items(1)[0]
    with layers.tapped():
        loss, gradient = Streams(layers, settings).distill(item, gates)
    learning = gates.clone().requires_grad_()
    expected = plain_loss(name, learning, item, settings)
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-4)
    assert gradient.abs().max() > 1e-4
    assert learning.grad is not None
    torch.testing.assert_close(gradient, learning.grad, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("teacher_forced", [True, False])
def test_open_gates_lose_nothing_and_have_no_gradient(teacher_forced: bool) -> None:
    layers = Layers(build_model("llama").eval())
    gates = torch.ones(layers.count, layers.kv_heads)
    with layers.tapped():
        loss, gradient = Streams(layers, replace(NEAR, teacher_forced=teacher_forced)).distill(items(1)[0], gates)
    assert loss == 0
    assert (gradient == 0).all()


def test_the_model_is_left_as_it_was() -> None:
    model = build_model("llama")
    before = model.config._attn_implementation
    optimise(model, items(1), replace(NEAR, steps=5))
    assert model.config._attn_implementation == before
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


# Penalty, schedule, resuming


def test_regularisation_is_a_mean_and_not_a_sum() -> None:
    """The published 0.05 goes with the mean; a sum would multiply it by the number of heads."""
    gates = torch.full((6, 4), 0.5).requires_grad_()
    found = regularisation(gates, range(6))
    assert float(found.detach()) == pytest.approx(0.5)
    found.backward()
    assert gates.grad is not None
    torch.testing.assert_close(gates.grad, torch.full((6, 4), 1 / 24))


def test_regularisation_is_weighed_against_the_distillation_as_a_mean() -> None:
    """A head whose distillation pulls with twice penalty / heads stays open; with a sum it would close."""
    settings = replace(NEAR, penalty=0.05, steps=60)
    layers = Layers(build_model("llama").eval())
    pull = torch.zeros(layers.count, layers.kv_heads)
    pull[0, 0] = -2 * settings.penalty / pull.numel()
    state = begin(Streams(layers, settings), items(1)[0])
    for _ in range(settings.steps):
        state = advance(state, 0.0, pull, settings, layers.full)
    assert state.gates[0, 0] == 1
    assert state.gates[1:].max() < 0.5


def test_sliding_layers_have_no_gates() -> None:
    model = build_model("qwen2").eval()
    layers = Layers(model)
    assert layers.full == (0,)
    found = optimise(model, items(), NEAR).values
    assert (found[1:] == 1).all()
    assert (found[0] < 1).all()
    assert float(regularisation(torch.tensor([[0.2, 0.4], [1.0, 1.0], [1.0, 1.0]]), layers.full)) == pytest.approx(0.3)


def test_schedule_rises_and_falls_as_published() -> None:
    rates = [rate_at(step, Settings()) for step in range(2000)]
    assert rates[0] == pytest.approx(0.002)
    assert rates[199] == pytest.approx(0.01)
    assert set(rates[399:1600]) == {0.02}
    assert rates[1800] == pytest.approx(0.01)
    assert rates[-1] == pytest.approx(0.002)


def test_every_item_comes_once_an_epoch() -> None:
    epochs = [[place_of(step, 7, 1) for step in range(begun, begun + 7)] for begun in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_an_interrupted_run_ends_where_a_whole_one_does() -> None:
    model, kept = build_model("llama").eval(), []
    settings = replace(NEAR, steps=6, target=0.5)
    whole = optimise(model, items(), settings, keep=kept.append)
    again = optimise(model, items(), settings, start=kept[2])
    assert torch.equal(whole.values, again.values)
    assert whole.history == again.history
    assert len(kept) == 6
    state = State.from_tensors(kept[2].tensors())
    assert state.history == kept[2].history
    assert torch.equal(optimise(model, items(), settings, start=state).values, whole.values)


# What they find


def biased(seed: int = 0) -> torch.nn.Module:
    """A model whose KV head 1 in layer 1 alone looks far: the values of the others are small."""
    model = build_model("llama", seed).eval()
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            width = layer.self_attn.head_dim
            for head in range(2):
                if (index, head) != (1, 1):
                    layer.self_attn.v_proj.weight[head * width : (head + 1) * width] *= 0.05
    return model


@pytest.mark.parametrize("target", [None, 0.4])
def test_the_head_that_matters_stays_open(target: float | None) -> None:
    found: Gates = optimise(biased(), items(), replace(NEAR, steps=60, rate=0.05, penalty=1.0, target=target))
    order = found.values.flatten().argsort(descending=True)
    assert int(order[0]) == 3
    assert found.values.flatten()[order[1]] < found.values[1, 1] - 0.05


@pytest.mark.parametrize(("target", "scale"), [(0.25, 1.0), (0.6, 30.0)])
def test_the_penalty_leads_the_mean_to_its_target(target: float, scale: float) -> None:
    """Whatever the scale of the hidden states is."""
    model = build_model("llama", num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=8).eval()
    with torch.no_grad():
        model.model.norm.weight *= scale
    found = optimise(model, items(2, 24), replace(NEAR, steps=100, rate=0.03, target=target))
    assert float(found.values.mean()) == pytest.approx(target, abs=0.04)
    assert found.values.std() > 0.1  # told apart, not all at the target
    assert all(math.isfinite(step.penalty) for step in found.history)


def test_aim_falls_from_one_to_the_target() -> None:
    settings = Settings(steps=100, target=0.3)
    aims = [aim_at(step, settings) for step in range(100)]
    assert aims == sorted(aims, reverse=True)
    assert aims[0] > 0.97
    assert aims[-1] == pytest.approx(0.3)
