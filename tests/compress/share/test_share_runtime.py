"""Plans whose layers share, followed by a model through the plan's cache."""

import copy
import threading
from typing import Any

import pytest
import torch
from compress.calibrate.errors import InputError
from models import build_model
from torch import Tensor
from transformers import PreTrainedModel

from compress.plan import AttentionPlan, KVBits, Packing, Search, Share, Source, TopK, Window
from compress.plan_compile import predict_bytes
from compress.plan_writer import PlanWriter, Rule
from compress.runtime.model import follow
from compress.runtime.plan_cache import PlanCache
from compress.share.modules import is_shared, share_layers

LAYERS = 6
SHARES = {3: ("attn", 2), 4: ("attn", 2), 5: ("kv", 2)}
SMALL = Packing(sinks=2, window_min=8, flush=16, first_flush=24, probe_cap=16)


def tiny(name: str = "llama") -> PreTrainedModel:
    kinds = {"layer_types": ["full_attention"] * LAYERS} if name.startswith("qwen") else {}
    return build_model(name, num_hidden_layers=LAYERS, **kinds)


def shares_of(model: PreTrainedModel) -> dict[int, Share]:
    heads = model.config.num_attention_heads
    found: dict[int, Any] = {layer: Share(*share) for layer, share in SHARES.items()}  # type: ignore[arg-type]
    found[4] = Share("attn", 2, tuple(heads - 1 - head // 2 for head in range(heads)))
    return found


def shared_plan(model: PreTrainedModel, shares: dict[int, Share]) -> AttentionPlan:
    writer = PlanWriter(AttentionPlan.empty(model.config), Source("echo"))
    for layer, share in shares.items():
        writer.share(layer, share)
    return writer.finish()


def ids(batch: int, length: int) -> Tensor:
    return torch.randint(3, 300, (batch, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("name", ["llama", "llama_untied", "qwen3"])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"padding": 7}, {"prefill_chunk_size": 5}])
def test_a_model_that_follows_answers_as_its_layers_do(name: str, settings: dict[str, Any]) -> None:
    model = tiny(name)
    plain = copy.deepcopy(model)
    shares = shares_of(model)
    share_layers(plain, shares)
    follow(model, shared_plan(model, shares))
    assert is_shared(model)
    prompt, mask = ids(2, 21), torch.ones(2, 21, dtype=torch.int64)
    settings = dict(settings)
    mask[0, : settings.pop("padding", 0)] = 0
    options: dict[str, Any] = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "attention_mask": mask}
    with torch.inference_mode():
        found = model.generate(prompt, **options, **settings)
        chunks = {key: value for key, value in settings.items() if key == "num_beams"}
        wanted = plain.generate(prompt, use_cache=False, **options, **chunks)
    assert found.tolist() == wanted.tolist()


def test_greedy_tokens_are_those_of_the_forward_pass_and_bytes_as_predicted() -> None:
    model = tiny()
    plan = shared_plan(model, shares_of(model))
    follow(model, plan)
    prompt = ids(1, 40)
    past = PlanCache(model.config, plan)
    with torch.no_grad():
        text = model.generate(prompt, past_key_values=past, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        logits = model(text, use_cache=False).logits
    assert text[0, 40:].tolist() == logits[0, 39:-1].argmax(-1).tolist()
    whole = 2 * 4 * model.config.num_key_value_heads * 16 * 47  # float32
    each = [layer.values.nbytes + layer.keys.nbytes if layer.is_initialized else 0 for layer in past.layers]
    assert each == [whole, whole, whole, whole // 2, whole // 2, 0]
    assert past.nbytes().stored == sum(each)
    predicted = predict_bytes(plan, model.config, 47)
    assert 2 * predicted.stored == past.nbytes().stored  # the model computes in float32


def test_crop_and_further_turns() -> None:
    model = tiny()
    plan = shared_plan(model, shares_of(model))
    follow(model, plan)
    text, past = ids(2, 30), PlanCache(model.config, plan)
    with torch.no_grad():
        whole = model(text, use_cache=False).logits
        model(text[:, :25], past_key_values=past)
        past.crop(-7)
        found = [model(part, past_key_values=past).logits for part in text[:, 18:].split([5, 1, 6], dim=1)]
    torch.testing.assert_close(torch.cat(found, 1), whole[:, 18:], atol=1e-5, rtol=1e-5)


def test_other_layers_pack_and_see_windows() -> None:
    model = tiny()
    shares = shares_of(model)
    writer = PlanWriter(shared_plan(model, shares), Source("zipcache"))
    writer.packing(SMALL)
    for layer in range(LAYERS):
        writer.kv(layer, KVBits(high=(4, 4), low=(4, 4)))
    duo = PlanWriter(writer.finish(), Source("duo"))
    for layer in range(LAYERS):
        duo.see(layer, 1, Rule(2, Window(a=64, b=0.0)))
    plan = duo.finish()
    assert [sum(head.kv is not None for head in layer.heads) for layer in plan.layers] == [1, 1, 0, 0, 0, 0]
    follow(model, plan)
    text = ids(1, 100)
    with torch.no_grad():
        close = model(text).logits
        share_only = tiny()
        share_layers(share_only, shares)
        dense = share_only(text).logits
        past = PlanCache(model.config, plan)
        parts = [model(part, past_key_values=past).logits for part in text.split([60, 1, 39], dim=1)]
    torch.testing.assert_close(close[:, :60], dense[:, :60], atol=1e-5, rtol=1e-5)  # before a window drops anything
    assert float((close[:, 80:] - dense[:, 80:]).abs().max()) > 1e-2
    torch.testing.assert_close(parts[0], dense[:, :60], atol=1e-5, rtol=1e-5)
    assert torch.isfinite(torch.cat(parts, 1)).all()


def test_threads_do_not_see_each_others_rows() -> None:
    model = tiny()
    follow(model, shared_plan(model, shares_of(model)))
    prompts = [ids(1, length) for length in (11, 17, 23, 29)]
    options: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    alone = [model.generate(prompt, **options).tolist() for prompt in prompts]
    found: dict[int, Any] = {}

    def answer(number: int) -> None:
        found[number] = model.generate(prompts[number], **options).tolist()

    threads = [threading.Thread(target=answer, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(len(prompts))] == alone


def test_a_cache_for_shared_layers_refuses_a_model_that_has_its_own() -> None:
    model = tiny()
    plan = shared_plan(model, shares_of(model))
    with pytest.raises(ValueError, match="layer 3 shares attention in the cache's plan and not in the model"):
        model(ids(1, 5), past_key_values=PlanCache(model.config, plan))
    with pytest.raises(InputError, match=r"layer 3 shares with layer 2.*leave materialize out"):
        PlanCache(model.config, plan, materialize=True)


def searching(model: PreTrainedModel, shares: dict[int, Share]) -> AttentionPlan:
    writer = PlanWriter(shared_plan(model, shares), Source("hip"))
    writer.search(Search(sink=8, window=64, block_q=16, block_k=8, pool=8, keep=(128, 64), gate=96))
    for layer in (2, 3):
        for head in range(model.config.num_key_value_heads):
            writer.topk(layer, head, TopK(k=64, policy="block_mean"))
    return writer.finish()


@pytest.mark.parametrize("padding", [0, 9])
def test_a_layer_takes_the_lists_of_another(padding: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.sparse import finder

    model = tiny()
    searched: list[int] = []
    for name in ("prompt", "token"):
        former = getattr(finder._Ranked, name)

        def count(self: Any, q: Tensor, *args: Any, former: Any = former) -> Any:
            searched.append(q.shape[2])
            return former(self, q, *args)

        monkeypatch.setattr(finder._Ranked, name, count)
    model.model.layers[3].self_attn.load_state_dict(model.model.layers[2].self_attn.state_dict())
    prompt = ids(2 if padding else 1, 200)
    mask = torch.ones_like(prompt)
    mask[0, :padding] = 0
    counts, logits = [], []
    for shares in ({}, {3: Share("mask", 2)}):
        own = copy.deepcopy(model)
        follow(own, searching(own, shares))
        searched.clear()
        with torch.no_grad():
            own.generate(prompt, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False)
            logits.append(own(prompt, attention_mask=mask).logits[:, -1])
        counts.append(len(searched))
    assert counts[0] == 2 * counts[1] > 0  # half of the searches are left
    assert torch.isfinite(logits[1]).all()
    assert float((logits[0] - logits[1]).abs().max()) > 0  # and the lists are another layer's


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_transformers_own_caches_hold_what_is_left(kind: str) -> None:
    model = tiny()
    share_layers(model, shares_of(model))
    options: dict[str, Any] = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}
    prompt = ids(2, 12)
    found = model.generate(prompt, cache_implementation=kind, **options)
    assert found.tolist() == model.generate(prompt, use_cache=False, **options).tolist()
