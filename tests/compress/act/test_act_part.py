"""Calibrated heads in the cache, against ACT on the matrix of probabilities in the model's own layers."""

import copy
from dataclasses import replace

import pytest
import torch
from compress.calibrate.errors import InputError
from models import build_model
from torch import Tensor
from transformers import PreTrainedModel

from compress.act.part import CalibratedPart
from compress.heads.layers import Layers
from compress.kv.attention import NAME
from compress.kv.layer import PlanLayer
from compress.plan import AttentionPlan, Calibration, Head, Source, Window, with_heads
from compress.plan_compile import predict_bytes
from compress.plan_writer import PlanWriter, Rule
from compress.runtime.plan_cache import PlanCache
from compress.tap import Seen, Tap

HOW = Calibration(0.3, 2.0, relative=True)


def planned() -> tuple[PreTrainedModel, AttentionPlan]:
    model = build_model("llama").train(False).requires_grad_(False)
    model.set_attn_implementation(NAME)
    writer = PlanWriter(AttentionPlan.empty(model.config), Source("act"))
    writer.calibrate(1, 1, HOW)
    writer.calibrate(2, 0, HOW)
    writer.calibrate(2, 1, HOW)
    return model, writer.finish()


def ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 300, (batch, length), generator=torch.Generator().manual_seed(seed))


def matrix_tap(calibrated: dict[int, list[int]]) -> Tap:
    """ACT with all probabilities, for a text that comes at once."""

    def tap(seen: Seen) -> Tensor:
        out = seen.attend()
        query, key, value = seen.query.double(), *(x.double().repeat_interleave(3, 1) for x in (seen.key, seen.value))
        count = query.shape[2]
        scores = query @ key.transpose(2, 3) * seen.scaling
        attention = scores.masked_fill(torch.ones(count, count).triu(1) > 0, -torch.inf).softmax(-1)
        sinks = attention.sum(2) / torch.arange(count, 0, -1) > HOW.threshold / count
        sinks[..., 0] = False
        chosen = sinks[:, :, None].expand_as(attention)
        others = attention.masked_fill(chosen, 0)
        taken = (1 - HOW.beta) * attention.masked_fill(~chosen, 0).sum(-1, keepdim=True)
        changed = torch.where(chosen, HOW.beta * attention, others + taken * others / others.sum(-1, keepdim=True))
        new = (changed @ value).float().transpose(1, 2)
        for head in calibrated.get(seen.layer, []):
            out[:, :, 3 * head : 3 * head + 3] = new[:, :, 3 * head : 3 * head + 3]
        return out

    return tap


def matrix_logits(model: PreTrainedModel, tokens: Tensor, calibrated: dict[int, list[int]]) -> Tensor:
    layers = Layers(model)
    with layers.tapped():
        hidden = layers.embed(tokens)
        positions = layers.positions(hidden)
        for index in range(layers.count):
            hidden = layers.run(index, hidden, positions, matrix_tap(calibrated))
        logits = layers.logits(hidden)
    model.set_attn_implementation(NAME)
    return logits


def test_a_prompt_is_act_on_the_matrix() -> None:
    model, plan = planned()
    tokens = ids(1, 60)
    cache = PlanCache(model.config, plan)
    out = model(tokens, past_key_values=cache).logits
    torch.testing.assert_close(out, matrix_logits(model, tokens[0], {1: [1], 2: [0, 1]}), atol=1e-4, rtol=1e-4)
    dense = model(tokens).logits
    assert float((out - dense)[:, 1:].abs().max()) > 1e-2
    torch.testing.assert_close(out[:, 0], dense[:, 0])


def part_of(cache: PlanCache, layer: int, cluster: int = 0) -> CalibratedPart:
    held = cache.layers[layer]
    assert isinstance(held, PlanLayer)
    part = held.clusters[cluster].part
    assert isinstance(part, CalibratedPart)
    return part


def test_decoded_tokens_take_the_sinks_of_the_prompt() -> None:
    """A single token behind a prompt gets what it would get as the last row of the matrix with the prompt's sinks."""
    model, plan = planned()
    tokens, cache = ids(1, 60), PlanCache(model.config, plan)
    model(tokens[:, :59], past_key_values=cache)
    layer = cache.layers[2]
    assert isinstance(layer, PlanLayer)
    part = part_of(cache, 2)
    kinds = part._known.kinds[..., :59].clone()
    assert bool((kinds == 1).any())
    taken: list[tuple[Tensor, Tensor]] = []
    step = part.step

    def watched(query: Tensor, new: object, scaling: float) -> Tensor:
        out = step(query, new, scaling)  # type: ignore[arg-type]
        scores = query.double() @ part.near.keys[:, :, :60].double().repeat_interleave(3, 1).transpose(2, 3) * scaling
        attention = scores.softmax(-1)
        chosen = torch.nn.functional.pad(kinds == 1, (0, 1))[:, :, None]
        others = attention.masked_fill(chosen, 0)
        weak = (1 - HOW.beta) * attention.masked_fill(~chosen, 0).sum(-1, keepdim=True)
        changed = torch.where(chosen, HOW.beta * attention, others + weak * others / others.sum(-1, keepdim=True))
        taken.append((out, changed @ part.near.values[:, :, :60].double().repeat_interleave(3, 1)))
        return out

    part.step = watched  # type: ignore[method-assign]
    model(tokens[:, 59:], past_key_values=cache)
    ((out, wanted),) = taken
    torch.testing.assert_close(out.double(), wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(part._known.kinds[..., :59], kinds)
    assert bool((part._known.kinds[..., 59] == 0).all())


def test_padding_changes_nothing() -> None:
    model, plan = planned()
    tokens = ids(2, 50)
    mask = torch.ones_like(tokens)
    mask[1, :9] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    cache = PlanCache(model.config, plan)
    together = model(tokens, attention_mask=mask, position_ids=places, past_key_values=cache).logits
    alone = PlanCache(model.config, plan)
    own = model(tokens[1:, 9:], past_key_values=alone).logits
    torch.testing.assert_close(together[1:, 9:], own, atol=1e-4, rtol=1e-4)
    more = torch.cat([mask, mask.new_ones(2, 1)], 1)
    for seed in (5, 6):
        new = ids(2, 1, seed)
        first = model(new, attention_mask=more, position_ids=more.sum(1)[:, None] - 1, past_key_values=cache).logits
        then = model(new[1:], past_key_values=alone).logits
        torch.testing.assert_close(first[1:], then, atol=1e-4, rtol=1e-4)
        more = torch.cat([more, more.new_ones(2, 1)], 1)


def test_chunks_add_up_to_the_same_sinks() -> None:
    model, plan = planned()
    tokens = ids(1, 60)
    whole, parts = PlanCache(model.config, plan), PlanCache(model.config, plan)
    model(tokens, past_key_values=whole)
    for chunk in tokens.split(25, 1):
        model(chunk, past_key_values=parts)
    # the first calibrated layer sees the same states; later ones those that other rows left
    torch.testing.assert_close(part_of(whole, 1, 1)._known.sums, part_of(parts, 1, 1)._known.sums, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(part_of(whole, 1, 1)._known.kinds, part_of(parts, 1, 1)._known.kinds)


def test_crop_beams_copies_and_reset() -> None:
    model, plan = planned()
    tokens, cache = ids(1, 40), PlanCache(model.config, plan)
    model(tokens, past_key_values=cache)
    expected = model(ids(1, 1, 7), past_key_values=copy.deepcopy(cache)).logits
    model(ids(1, 1, 8), past_key_values=cache)
    model(ids(1, 1, 9), past_key_values=cache)
    cache.crop(-2)
    torch.testing.assert_close(model(ids(1, 1, 7), past_key_values=copy.deepcopy(cache)).logits, expected)
    cache.batch_repeat_interleave(3)
    cache.reorder_cache(torch.tensor([2, 0]))
    again = model(ids(1, 1, 7).expand(2, 1), past_key_values=cache).logits
    torch.testing.assert_close(again, expected.expand(2, -1, -1), atol=1e-5, rtol=1e-5)
    cache.reset()
    fresh = PlanCache(model.config, plan)
    torch.testing.assert_close(model(tokens, past_key_values=cache).logits, model(tokens, past_key_values=fresh).logits)


def test_bytes_count_what_is_known_of_tokens() -> None:
    model, plan = planned()
    cache = PlanCache(model.config, plan)
    model(ids(1, 64), past_key_values=cache)
    found = cache.nbytes()
    assert found.payload == 3 * 2 * 2 * 64 * 16 * 4
    assert found.stored - found.payload == 64 * ((3 + 6) * 5 + 2 * 4)  # query heads; two parts
    assert found.allocated >= found.stored
    predicted = predict_bytes(plan, model.config, 64)
    assert predicted.stored - predicted.payload == found.stored - found.payload
    assert any("sinks x 0.3" in line for line in plan.lines())


def test_beta_of_one_is_the_model() -> None:
    model, plan = planned()
    same = Head(calibration=Calibration(1.0, 0.01))
    layers = (
        with_heads(own, {number: same for number, head in enumerate(own.heads) if head.calibration})
        for own in plan.layers
    )
    one = replace(plan, layers=tuple(layers))
    tokens = ids(2, 40)
    out = model(tokens, past_key_values=PlanCache(model.config, one)).logits
    torch.testing.assert_close(out, model(tokens).logits, atol=1e-4, rtol=1e-4)


def test_tensors_of_a_materialized_cache_cannot_be_calibrated() -> None:
    model, plan = planned()
    with pytest.raises(InputError, match="layer 1: KV head 1 re-weights its sinks"):
        PlanCache(model.config, plan, materialize=True)


def test_a_head_that_drops_tokens_is_not_calibrated() -> None:
    model, _ = planned()
    duo = PlanWriter(AttentionPlan.empty(model.config), Source("duo"))
    duo.see(1, 0, Rule(16, Window(a=64, b=0.0)))
    act = PlanWriter(duo.finish(), Source("act"))
    act.calibrate(1, 0, HOW)
    with pytest.raises(InputError, match=r"layer 1, KV head 0.*calibration by act, window by duo"):
        act.finish()


def test_generation_runs_through_it() -> None:
    model, plan = planned()
    out = model.generate(ids(1, 30), past_key_values=PlanCache(model.config, plan), max_new_tokens=5, do_sample=False)
    assert out.shape[1] <= 35
