"""The plan's cache and attention function inside transformers' ``generate``."""

from typing import Any

import pytest
import torch
from compress.calibrate.errors import InputError
from models import build_model
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from compress.kv.layer import PackedLayer
from compress.plan import AttentionPlan, KVBits, Packing, Source
from compress.plan_writer import PlanWriter
from compress.runtime.attention import NAME
from compress.runtime.plan_cache import PlanCache

SMALL = Packing(sinks=2, window_min=8, flush=16, first_flush=24, probe_cap=16)


def ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 300, (batch, length), generator=torch.Generator().manual_seed(seed))


def packed_plan(model: PreTrainedModel, bits: KVBits | None = None, packing: Packing = SMALL) -> AttentionPlan:
    writer = PlanWriter(AttentionPlan.empty(model.config), Source("zipcache"), 512)
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
    assert any(layer.store.begun for layer in cache.layers)


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
    kinds = [isinstance(layer, PackedLayer) for layer in cache.layers]
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
    from compress.runtime.attention import plan_attention

    model = planned()
    layer = PlanCache(model.config, packed_plan(model)).layers[0]
    handle, _ = layer.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16))
    arguments: dict[str, Any] = {"attention_mask": None, "scaling": None} | changes
    with pytest.raises(ValueError, match=told):
        plan_attention(model, torch.zeros(1, 6, 3, 16), handle, handle, **arguments)


def test_gradients_are_refused() -> None:
    model = planned()
    with pytest.raises(ValueError, match="no gradients"):
        model.train(False).requires_grad_(True)(ids(1, 9), past_key_values=PlanCache(model.config, packed_plan(model)))


def test_a_plan_for_another_model_is_refused() -> None:
    plan = AttentionPlan.empty(build_model("llama").config)
    with pytest.raises(InputError, match="another model"):
        PlanCache(build_model("qwen3").config, plan)
