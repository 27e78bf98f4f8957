"""Influence: against attention with masks, against the loss itself, and against MoA's formula."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from compress.evalsuite.head import evaluating
from models import build_model
from torch import Tensor
from transformers import PreTrainedModel

from compress.heads import bins
from compress.heads import influence as module
from compress.heads.bins import Rows, Span, changes, elementwise, row_blocks
from compress.heads.data import Item
from compress.heads.influence import answer_loss, attention_gradients, influence
from compress.heads.layers import Layers
from compress.plan import BLOCK, Stride, Window
from compress.plan_writer import Rule
from compress.tap import Seen

SPANS = [
    Span(4, 64), Span(4, 128), Span(0, 64), Span(70, 1), Span(4, 192), Span(16, 400), Span(4, 64, Stride(3, 1)),
    Span(0, 1), Span(4, 10**6),
]  # fmt: skip


def item(length: int = 48, seed: int = 1) -> Item:
    ids = torch.randint(0, 300, (length,), generator=torch.Generator().manual_seed(seed))
    place = torch.arange(length)
    return Item(ids, (place >= length - 9) & (place < length - 1), "passkey", length - 9)


def shown(length: int, heads: int = 4, kv_heads: int = 2, scale: float = 1.0) -> tuple[Seen, Tensor]:
    """A layer's call, and a gradient of what it gives."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, n, length, 8, generator=generator) for n in (heads, kv_heads, kv_heads))
    gradient = torch.randn(1, length, heads, 8, generator=generator)
    return Seen(0, query * scale, key, value, 0.4, lambda: query.transpose(1, 2)), gradient


def visible(span: Span, length: int) -> Tensor:
    row, key = torch.arange(length)[:, None], torch.arange(length)
    found = (key < span.sink) | (key > row - span.window)
    if span.stride is not None:
        found |= (key // BLOCK - span.stride.phase) % span.stride.every == 0
    return found & (key <= row)


def output(seen: Seen, mask: Tensor) -> Tensor:
    """Attention over what a mask lets rows see, ``[1, heads, T, D]`` float64."""
    group = seen.query.shape[1] // seen.key.shape[1]
    key, value = (x.double().repeat_interleave(group, 1) for x in (seen.key, seen.value))
    scores = seen.query.double() @ key.transpose(2, 3) * seen.scaling
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value


def direct(seen: Seen, gradient: Tensor, spans: Sequence[Span]) -> Tensor:
    """``<dO, O_rule - O_full>``, [heads, T, rules]."""
    length, upstream = seen.key.shape[2], gradient.transpose(1, 2).double()
    full = output(seen, visible(Span(0, length), length))
    each = [((output(seen, visible(span, length)) - full) * upstream).sum(-1)[0] for span in spans]
    return torch.stack(each, -1)


def gathered(seen: Seen, gradient: Tensor, spans: Sequence[Span], elements: bool = False) -> Tensor:
    """All blocks of rows, [heads, T, rules]."""
    heads, length = seen.query.shape[1:3]
    found = torch.full((heads, length, len(spans)), torch.nan)
    group = heads // seen.key.shape[1]
    for rows in row_blocks(seen, gradient):
        own = slice(rows.kv_heads.start * group, rows.kv_heads.stop * group)
        measured = elementwise(rows, spans) if elements else changes(rows, spans)
        found[own, rows.start : rows.scores.shape[2]] = measured.float()
    return found


# All rules from one pass


@pytest.mark.parametrize("elements", [1, 1 << 22])  # one KV head at a time, and all together
@pytest.mark.parametrize(("length", "scale"), [(300, 1.0), (129, 30.0), (5, 1.0)])
def test_bins_give_what_windowed_attention_gives(
    length: int, scale: float, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bins, "BLOCK_ELEMENTS", elements)
    seen, gradient = shown(length, scale=scale)
    expected, found = direct(seen, gradient, SPANS), gathered(seen, gradient, SPANS)
    assert expected[..., 0].abs().max() > (0.1 if length > 64 else -1)
    assert (found - expected).abs().max() < 1e-5 * gradient.abs().max() * 8
    assert (found[..., -1] == 0).all()  # nothing is dropped


def test_keys_far_below_others_are_no_division_by_zero() -> None:
    """Where all that a rule leaves is negligible, its own keys still share what there is."""
    seen, gradient = shown(200)
    key = seen.key.clone()
    query = torch.ones_like(seen.query)
    key[:, :, 4:8] += 100
    far = replace(seen, query=query, key=key)
    expected, found = direct(far, gradient, SPANS[:1]), gathered(far, gradient, SPANS[:1])
    assert expected.abs().max() > 0.1
    assert (found - expected).abs().max() < 1e-4


def test_a_single_dropped_key_is_moas_element() -> None:
    """Row sink + window drops one key alone: A / (1 - A) (S - g)."""
    seen, gradient = shown(200)
    key = seen.key.repeat_interleave(2, 1)
    row, sink, window = 68, 4, 64
    mass = (seen.query[0, :, row, None] @ key[0, :, : row + 1].transpose(1, 2) * seen.scaling).softmax(-1)[:, 0]
    g = (gradient[0, row, :, None] * seen.value.repeat_interleave(2, 1)[0, :, : row + 1]).sum(-1)
    element = (mass / (1 - mass) * ((mass * g).sum(-1, keepdim=True) - g))[:, sink]
    span = [Span(sink, window)]
    assert torch.allclose(gathered(seen, gradient, span)[:, row, 0], element, atol=1e-6)
    assert torch.allclose(gathered(seen, gradient, span, True)[:, row, 0], element.abs(), atol=1e-5)
    assert element.abs().min() > 1e-5


def test_the_published_form_sums_elements() -> None:
    length, spans = 300, SPANS
    seen, gradient = shown(length)
    key, value = (x[0].double().repeat_interleave(2, 0) for x in (seen.key, seen.value))
    causal = visible(Span(0, length), length)
    scores = seen.query[0].double() @ key.transpose(1, 2) * seen.scaling
    mass = scores.masked_fill(~causal, -torch.inf).softmax(-1)
    g = gradient[0].double().transpose(0, 1) @ value.transpose(1, 2)
    single = (mass / (1 - mass + bins.EPSILON) * ((mass * g).sum(-1, keepdim=True) - g)).abs()
    expected = torch.stack([(single * (causal & ~visible(span, length))).sum(-1) for span in spans], -1)
    found = gathered(seen, gradient, spans, elements=True)
    assert torch.allclose(found.double(), expected, rtol=1e-3, atol=1e-4)


# The model


@pytest.mark.parametrize("name", ["llama", "qwen3", "llama_untied"])
def test_gradients_are_those_of_the_loss(name: str) -> None:
    """Mixing 1e-3 of a rule's output into one KV head changes the loss by what is predicted, within 1 %."""
    model, rule = build_model(name).double(), Span(2, 6)
    layers, of = Layers(model), item()
    step, checked = 1e-3, 0
    with evaluating(model), layers.tapped():
        for seen, gradient in attention_gradients(layers, of):
            group = seen.query.shape[1] // layers.kv_heads
            predicted = direct(seen, gradient, [rule])[..., 0].sum(1)
            for head in range(layers.kv_heads):
                own = slice(head * group, (head + 1) * group)

                def mix(now: Seen, share: float, layer: int = seen.layer, own: slice = own) -> Tensor:
                    given = now.attend()
                    if now.layer == layer:
                        other = output(now, visible(rule, len(of.ids))).transpose(1, 2)
                        given = given.clone()
                        given[:, :, own] += share * (other - given)[:, :, own]
                    return given

                more, less = (answer_loss(layers, of, partial(mix, share=share)) for share in (step, -step))
                assert (more - less) / (2 * step) == pytest.approx(float(predicted[own].sum()), rel=0.01)
                checked += 1
    assert checked == layers.count * layers.kv_heads


def test_the_loss_is_that_of_the_answer() -> None:
    model, of = build_model("llama"), item()
    layers = Layers(model)
    with evaluating(model), layers.tapped():
        found = answer_loss(layers, of)
    with torch.no_grad():
        logits = model(of.ids[None]).logits[0]
    nats = -logits.log_softmax(-1)[torch.arange(47), of.ids[1:]]
    assert found == pytest.approx(float(nats[-8:].mean()), rel=1e-5)


def by_hand(model: PreTrainedModel, of: Item, span: Span) -> Tensor:
    """Z [layers, KV heads] of one rule by autograd through the whole model."""
    layers, held = Layers(model), []

    def hold(seen: Seen) -> Tensor:
        held.append((seen, seen.attend()))
        return held[-1][1]

    model.requires_grad_(True)
    with layers.tapped():
        model.model.embed_tokens.weight.requires_grad_(True)
        hidden = layers.embed(of.ids)
        positions = layers.positions(hidden)
        for index in range(layers.count):
            hidden = layers.run(index, hidden, positions, hold if index in layers.full else None)
        nats = -layers.logits(hidden)[0].log_softmax(-1)[torch.arange(47), of.ids[1:]]
        gradients = torch.autograd.grad(nats[of.supervised[:-1]].mean(), [given for _, given in held])
    found = torch.zeros(layers.count, layers.kv_heads)
    for (seen, _), gradient in zip(held, gradients, strict=True):
        each = direct(seen, gradient, [span])[..., 0].detach()
        found[seen.layer] = each.view(layers.kv_heads, -1, len(of.ids)).sum(1).abs().sum(1)
    return found


@pytest.mark.parametrize("name", ["llama", "qwen2", "llama_untied"])
def test_influence_sums_groups_within_and_rows_outside_the_absolute_value(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "chunk_tokens", lambda *_: 3)  # a few answer tokens at a time
    model, items = build_model(name), [item(), item(seed=2)]
    rule = Rule(2, Window(6, 0.0))
    monkeypatch.setattr(Window, "span", lambda self, length: self.a)  # not in blocks: the text is short
    before = model.config._attn_implementation
    found = influence(model, items, [rule, Rule(0, Window(48, 0.0))])
    expected = torch.stack([by_hand(model, of, Span(2, 6)) for of in items]).mean(0)
    assert found.shape == (3, model.config.num_key_value_heads, 2)
    assert torch.allclose(found[..., 0], expected, rtol=1e-4, atol=1e-7)
    assert (found[Layers(model).full[0], :, 0] > 0).all()
    assert (found[..., 1] == 0).all()
    assert model.config._attn_implementation == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_wider_windows_and_strides_are_rules_like_others() -> None:
    """Lengths of an item decide on elastic windows; sums of elements never grow with what is seen."""
    model = build_model("llama")
    rules = [
        Rule(4, Window(64, 0.0)), Rule(4, Window(64, 0.0), Stride(2)), Rule(4, Window(0, 0.5)), Rule(4, Window()),
    ]  # fmt: skip
    found = influence(model, [item(300)], rules, published=True)
    assert (found[..., 0] > found[..., 1]).all()
    assert (found[..., 0] > found[..., 2]).all()
    assert (found[..., :3] > 0).all()
    assert (found[..., 3] == 0).all()
    exact = influence(model, [item(300)], rules)
    alone = influence(model, [item(300)], [Rule(4, Window(192, 0.0))])[..., 0]
    assert torch.allclose(exact[..., 2], alone, rtol=1e-4)


def test_strides_begin_elsewhere_in_every_layer() -> None:
    model, of = build_model("llama"), item(300)
    found = influence(model, [of], [Rule(4, Window(64, 0.0), Stride(2))])[..., 0]
    layers = Layers(model)
    with evaluating(model), layers.tapped():
        for seen, gradient in attention_gradients(layers, of):
            each = direct(seen, gradient, [Span(4, 64, Stride(2, seen.layer % 2))])[..., 0]
            expected = each.view(layers.kv_heads, -1, 300).sum(1).abs().sum(1).float()
            assert torch.allclose(found[seen.layer], expected, rtol=1e-4)


def test_scores_exist_for_a_block_of_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, gradient = shown(1000)
    monkeypatch.setattr(bins, "BLOCK_ELEMENTS", 1)
    blocks: list[Rows] = list(row_blocks(seen, gradient, first=300))
    assert {tuple(block.scores.shape)[:2] for block in blocks} <= {(2, bins.ROWS), (2, 1000 % bins.ROWS)}
    assert min(block.start for block in blocks) == 256
