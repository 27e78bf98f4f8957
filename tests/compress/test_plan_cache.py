"""The plan's cache and attention function inside transformers' ``generate``."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from compress.calibrate.errors import InputError
from models import build_model
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from compress.kv.attention import NAME, plan_attention
from compress.kv.layer import PlanLayer
from compress.plan import AttentionPlan, Calibration, Head, KVBits, Packing, Source, TopK, Window, with_heads
from compress.plan_writer import PlanWriter, Rule
from compress.runtime.model import follow
from compress.runtime.plan_cache import PlanCache

SMALL = Packing(sinks=2, window_min=8, flush=16, first_flush=24, probe_cap=16)


def ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 300, (batch, length), generator=torch.Generator().manual_seed(seed))


def packed_plan(model: PreTrainedModel, bits: KVBits | None = None, packing: Packing = SMALL) -> AttentionPlan:
    writer = PlanWriter(AttentionPlan.empty(model.config), Source("zipcache"))
    writer.packing(packing)
    for layer in range(model.config.num_hidden_layers):
        if layer not in AttentionPlan.empty(model.config).fingerprint.sliding:
            writer.kv(layer, bits or KVBits(), None)
    return writer.finish()


def planned(name: str = "llama", **changes: Any) -> PreTrainedModel:
    model = build_model(name, **changes)
    model.set_attn_implementation(NAME)
    return model


def answer(model: PreTrainedModel, cache: Any, prompt: Tensor, **settings: Any) -> Tensor:
    mask = settings.pop("attention_mask", torch.ones_like(prompt))
    kept: Tensor = model.generate(
        prompt, attention_mask=mask, past_key_values=cache, do_sample=False, max_new_tokens=12, min_new_tokens=12,
        pad_token_id=0, **settings,
    )  # fmt: skip
    return kept


def left_padded(batch: int, length: int, padding: int) -> dict[str, Tensor]:
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, :padding] = 0
    return {"attention_mask": mask}


WAYS: dict[str, tuple[Tensor, dict[str, Any]]] = {
    "greedy": (ids(1, 40), {}),
    "left padding": (ids(2, 40), left_padded(2, 40, 9)),
    "beams": (ids(2, 30), {"num_beams": 4, **left_padded(2, 30, 5)}),
    "chunked prefill": (ids(1, 41), {"prefill_chunk_size": 7}),
    "prompt lookup": (ids(1, 12).repeat(1, 4), {"prompt_lookup_num_tokens": 3}),
    "several answers": (ids(1, 30), {"num_beams": 3, "num_return_sequences": 3}),
}


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "qwen3"])
@pytest.mark.parametrize("way", WAYS)
def test_an_empty_plan_changes_no_token(name: str, way: str) -> None:
    prompt, settings = WAYS[way]
    dense, model = build_model(name), planned(name)
    expected = answer(dense, DynamicCache(config=dense.config), prompt, **settings)
    found = answer(model, PlanCache(model.config, AttentionPlan.empty(model.config)), prompt, **settings)
    assert torch.equal(found, expected)


def test_an_empty_plan_over_several_turns() -> None:
    dense, model = build_model("llama"), planned()
    old, new = DynamicCache(config=dense.config), PlanCache(model.config, AttentionPlan.empty(model.config))
    prompt = ids(1, 20)
    for turn in range(3):
        expected, found = answer(dense, old, prompt), answer(model, new, prompt)
        assert torch.equal(found, expected)
        prompt = torch.cat([found, ids(1, 9, seed=turn)], 1)


@pytest.mark.parametrize("way", WAYS)
def test_a_packed_cache_takes_every_way_of_generating(way: str) -> None:
    """With 4 bits throughout the answers' logits stay near the dense model's."""
    prompt, settings = WAYS[way]
    model = planned()
    cache = PlanCache(model.config, packed_plan(model, KVBits(ratio=1.0)))
    found = answer(model, cache, prompt, **settings)
    assert found.shape[1] == prompt.shape[1] + 12
    assert any(layer.clusters[0].part.store.begun for layer in cache.layers)


@pytest.mark.parametrize("chunk", [1, 5])
def test_logits_through_a_packed_cache_are_near_the_dense_ones(chunk: int) -> None:
    dense, model = build_model("llama"), planned()
    tokens = ids(2, 90)
    cache = PlanCache(model.config, packed_plan(model, KVBits(ratio=1.0)))
    with torch.no_grad():
        expected = dense(tokens).logits[:, 60:].log_softmax(-1)
        model(tokens[:, :60], past_key_values=cache)
        found = torch.cat(
            [model(tokens[:, start : start + chunk], past_key_values=cache).logits for start in range(60, 90, chunk)],
            1,
        ).log_softmax(-1)
    assert float((expected.exp() * (expected - found)).sum(-1).mean()) < 0.02


def test_a_padded_row_answers_as_it_does_alone() -> None:
    model, prompt = planned(), ids(2, 60)
    settings = left_padded(2, 60, 17)
    together = answer(model, PlanCache(model.config, packed_plan(model)), prompt, **settings)
    alone = answer(model, PlanCache(model.config, packed_plan(model)), prompt[:1, 17:])
    assert torch.equal(together[0, 60:], alone[0, 43:])


def test_prompt_lookup_gives_the_greedy_answer() -> None:
    """Rejected drafts leave no trace in the window; the first of them come with the prompt, so none is packed here."""
    model, prompt = planned(), ids(1, 12).repeat(1, 4)
    plan = packed_plan(model, packing=Packing(window_bits=16, first_flush=200))
    greedy = answer(model, PlanCache(model.config, plan), prompt)
    drafted = answer(model, PlanCache(model.config, plan), prompt, prompt_lookup_num_tokens=3)
    assert torch.equal(greedy, drafted)


def test_sliding_layers_are_not_packed() -> None:
    model = planned("qwen2", hidden_size=64)
    cache = PlanCache(model.config, packed_plan(model))
    kinds = [isinstance(layer, PlanLayer) for layer in cache.layers]
    assert kinds == [index not in cache.plan.fingerprint.sliding for index in range(len(kinds))]
    assert not all(kinds)
    assert answer(model, cache, ids(1, 60)).shape == (1, 72)


def test_bytes_are_counted_over_all_layers() -> None:
    model = planned()
    cache = PlanCache(model.config, packed_plan(model))
    empty = PlanCache(model.config, AttentionPlan.empty(model.config))
    with torch.no_grad():
        for held in (cache, empty):
            model(ids(2, 60), past_key_values=held)
    assert cache.nbytes().stored < 0.5 * empty.nbytes().stored
    assert empty.nbytes().payload == 2 * 60 * 3 * 2 * 32 * 4


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"softcap": 30.0}, "doesn't compute softcap"),
        ({"s_aux": torch.zeros(1)}, "doesn't compute s_aux"),
        ({"sliding_window": 8}, "doesn't compute sliding_window"),
        ({"cache": object()}, "doesn't compute cache"),
        ({"output_attentions": True}, "doesn't compute output_attentions"),
        ({"dropout": 0.1}, "doesn't compute dropout"),
        ({"attention_mask": torch.zeros(1, 1, 3, 3)}, "a mask of 4 dimensions"),
    ],
)
def test_what_attention_over_packed_keys_does_not_compute_is_refused(changes: dict[str, Any], told: str) -> None:
    model = planned()
    layer = PlanCache(model.config, packed_plan(model)).layers[0]
    handle, _ = layer.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16))
    arguments: dict[str, Any] = {"attention_mask": None, "scaling": None} | changes
    with pytest.raises(ValueError, match=told):
        plan_attention(model, torch.zeros(1, 6, 3, 16), handle, handle, **arguments)


@pytest.mark.parametrize("length", [30, 64])
def test_a_static_cache_gives_the_same_logits(length: int) -> None:
    """Its keys are longer than what it holds, so that queries aren't the last tokens."""
    dense, model = build_model("llama"), planned()
    found, expected = [], []
    for own, logits in ((dense, expected), (model, found)):
        cache = StaticCache(config=own.config, max_cache_len=length)
        with torch.no_grad():
            for part in ids(2, 25).split([20, 1, 3, 1], 1):
                logits.append(own(part, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(found, 1), torch.cat(expected, 1))


def test_sequences_in_one_row_stay_apart() -> None:
    """transformers tells them by positions that begin anew, and by a mask of its own."""
    dense, model = build_model("llama"), planned()
    positions = torch.cat([torch.arange(9), torch.arange(14)])[None]
    prompt = ids(1, 23)
    with torch.no_grad():
        expected = dense(prompt, position_ids=positions, use_cache=False).logits
        found = model(prompt, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        assert not torch.allclose(found, dense(prompt, use_cache=False).logits, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"s_aux": torch.zeros(6)}, "doesn't compute s_aux"),
        ({"is_causal": False}, "isn't causal"),
        ({"head_mask": torch.ones(6)}, "doesn't compute head_mask"),
    ],
)
def test_what_plain_attention_would_leave_out_is_refused(changes: dict[str, Any], told: str) -> None:
    states = torch.zeros(1, 2, 3, 16)
    with pytest.raises(ValueError, match=told):
        plan_attention(planned(), torch.zeros(1, 6, 3, 16), states, states, None, **changes)


@pytest.mark.parametrize("kind", ["offloaded", "static"])
def test_a_cache_that_knows_nothing_of_the_plan_is_refused(kind: str) -> None:
    model = planned()
    follow(model, packed_plan(model))
    with pytest.raises(ValueError, match=f"cache_implementation={kind!r}.*attention plan"):
        answer(model, None, ids(1, 20), cache_implementation=kind)


def windowed_plan(model: PreTrainedModel) -> AttentionPlan:
    writer = PlanWriter(AttentionPlan.empty(model.config), Source("duo"))
    for layer in range(model.config.num_hidden_layers):
        writer.see(layer, layer % 2, Rule(4, Window(a=64, b=0.0)))
    return writer.finish()


@pytest.mark.parametrize("way", WAYS)
def test_windows_that_hold_everything_change_no_token(way: str) -> None:
    prompt, settings = WAYS[way]
    dense, model = build_model("llama"), planned()
    expected = answer(dense, DynamicCache(config=dense.config), prompt, **settings)
    assert torch.equal(answer(model, PlanCache(model.config, windowed_plan(model)), prompt, **settings), expected)


def test_windows_drop_what_they_do_not_see() -> None:
    model = planned()
    cache = PlanCache(model.config, windowed_plan(model))
    with torch.no_grad():
        logits = model(ids(1, 300), past_key_values=cache).logits
        expected = model(ids(1, 300)).logits
    size, layers = cache.nbytes(), model.config.num_hidden_layers
    assert size.stored == layers * 2 * 4 * 16 * (300 + 68)
    assert size.allocated < 1.02 * size.stored
    torch.testing.assert_close(logits[:, :68], expected[:, :68], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(logits[:, 200:], expected[:, 200:], atol=1e-3)


def test_a_copy_of_a_whole_cache_goes_on_by_itself() -> None:
    model = planned()
    for plan in (packed_plan(model), windowed_plan(model)):
        cache = PlanCache(model.config, plan)
        with torch.no_grad():
            model(ids(1, 100), past_key_values=cache)
            model(ids(1, 1), past_key_values=cache)
            other = copy.deepcopy(cache)
            expected = model(ids(1, 1, seed=3), past_key_values=cache).logits
            torch.testing.assert_close(model(ids(1, 1, seed=3), past_key_values=other).logits, expected)


PARTS: dict[str, Any] = {
    "not how": {"topk": TopK(k=64)},
    "searches": {"topk": TopK(k=64), "window": Window(a=64, b=0.0)},
    "calibrated": {"calibration": Calibration(0.4, 0.1), "window": Window(a=64, b=0.0)},
    "summary": {"summary": "mean_all"},
    "packs them too": {"kv": KVBits(), "window": Window(a=64, b=0.0)},
}


@pytest.mark.parametrize("part", PARTS)
def test_what_the_cache_does_not_run_is_refused(part: str) -> None:
    config = build_model("llama").config
    empty = AttentionPlan.empty(config)
    head = dataclasses.replace(Head(), **PARTS[part])
    layers = (empty.layers[0], with_heads(empty.layers[1], {1: head}), *empty.layers[2:])
    with pytest.raises(InputError, match=f"layer 1.*{part}"):
        PlanCache(config, dataclasses.replace(empty, layers=layers, packing=SMALL))


def test_heads_of_a_layer_may_be_packed_differently() -> None:
    model = planned()
    writer = PlanWriter(AttentionPlan.empty(model.config), Source("zipcache"))
    writer.packing(SMALL)
    writer.kv(1, KVBits(ratio=1.0), (0,))
    writer.kv(1, KVBits(ratio=0.0), (1,))
    cache = PlanCache(model.config, writer.finish())
    with torch.no_grad():
        model(ids(1, 90), past_key_values=cache)
    high, low = (cluster.part.nbytes().payload for cluster in cache.layers[1].clusters)
    assert high > 1.5 * low


def test_gradients_are_refused() -> None:
    model = planned()
    with pytest.raises(ValueError, match="no gradients"):
        model.train(False).requires_grad_(True)(ids(1, 9), past_key_values=PlanCache(model.config, packed_plan(model)))


def test_a_plan_for_another_model_is_refused() -> None:
    plan = AttentionPlan.empty(build_model("llama").config)
    with pytest.raises(InputError, match="another model"):
        PlanCache(build_model("qwen3").config, plan)
