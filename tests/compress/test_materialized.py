"""The packed cache that returns tensors: against the layer that attends over handles, and under other functions."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compress.calibrate.errors import InputError
from models import build_model
from test_kv_layer import KV_HEADS, PAPER, PLUS, SCALE, WIDTH, Stream, layer, part
from test_plan_cache import SMALL, WAYS, answer, ids, left_padded, packed_plan, planned
from test_searched import SEARCH
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from compress.kv.arena import Place
from compress.kv.layer import Cluster, PlanLayer
from compress.kv.materialized import MaterializedLayer
from compress.kv.packed import PackedPart
from compress.kv.plain import PlainPart
from compress.plan import AttentionPlan, Head, KVBits, Packing, Source, Stride, TopK, Window, with_heads
from compress.plan_writer import PlanWriter
from compress.runtime.plan_cache import PlanCache

FUNCTIONS = ["eager", "sdpa"]
EVEN = {"two bits": KVBits(ratio=0.0), "four bits": KVBits(ratio=1.0)}
SIXTEEN = Packing(window_bits=16, first_flush=1000, rotate=False)


def dense(name: str = "llama", function: str = "sdpa") -> PreTrainedModel:
    model = build_model(name)
    model.set_attn_implementation(function)
    return model


def materialized(model: PreTrainedModel, plan: AttentionPlan) -> PlanCache:
    return PlanCache(model.config, plan, materialize=True)


def twin(held: PlanLayer) -> MaterializedLayer:
    """An empty layer of the same format that returns tensors."""
    format = dataclasses.replace(part(held).format, blind=True)
    return MaterializedLayer(held.index, [Cluster(None, PackedPart(format))])


def sdpa(found: tuple[Tensor, Tensor], query: Tensor) -> Tensor:
    keys, values = found
    count, length = query.shape[2], keys.shape[2]
    mask = torch.ones(count, length, dtype=torch.bool).tril(length - count)
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=SCALE, enable_gqa=True)


def kept(held: PlanLayer) -> list[Tensor]:
    """Codes, parameters and window of a layer."""
    own = part(held)
    tensors = [own.window.keys, own.window.values]
    for arena in own.store.arenas.values():
        tensors += [x for x in (arena.keys, arena.values, arena.key_params, arena.value_params) if x is not None]
    return tensors


@pytest.mark.parametrize("kind", ["plus", "paper"])
@pytest.mark.parametrize("bits", EVEN)
def test_it_keeps_and_returns_what_the_handle_attends_to(kind: str, bits: str) -> None:
    """Prompt, chunks, single tokens, a crop into the window and into packed tokens, beams, and repetition."""
    held = layer(kind, EVEN[bits])
    own, stream = twin(held), Stream(batch=2)
    for count in (90, 1, 1, 37, -3, 1, 13, -60, 9, *[1] * 30, 0, 1, 25):
        if count <= 0:
            for each in (held, own):
                each.crop(count) if count else each.reorder_cache(torch.tensor([1, 1]))
            continue
        query, key, value = (states.half().float() for states in stream(count))  # a window of 16 bits holds these
        held.update(key, value)
        expected = held.attend(query, None, SCALE)
        found = own.update(key, value)
        assert found[0].shape == (2, KV_HEADS, held.get_seq_length(), WIDTH)
        assert torch.equal(found[0][:, :, -count:], key)
        torch.testing.assert_close(sdpa(found, query), expected, atol=3e-5, rtol=1e-4)
        for mine, others in zip(kept(own), kept(held), strict=True):
            assert torch.equal(mine, others)
    assert part(own).store.begun
    assert own.get_seq_length() == held.get_seq_length()
    assert own.nbytes() == held.nbytes()


@pytest.mark.parametrize("settings", [PLUS, PAPER, PLUS | {"sinks": 0}], ids=["plus", "paper", "no sinks"])
def test_mixed_bits_are_returned_in_the_order_of_the_tokens(settings: dict[str, Any]) -> None:
    """With several epochs, and heads whose classes are unequally long since a crop."""
    held = layer(**settings)
    stream = Stream(batch=2)
    for count in (120, 1, 60, -70, 50, -3, 90):
        if count < 0:
            held.crop(count)
            continue
        query, key, value = stream(count)
        held.update(key + (20.0 * torch.randn(WIDTH, generator=stream.generator) if count == 60 else 0.0), value)
        held.attend(query, None, SCALE)  # saliency of its own for every head
    counts = part(held).store.arenas["high"].counts
    assert not bool((counts == counts[0, 0]).all())
    found = part(held).store.tokens()
    for row in range(2):
        for head in range(KV_HEADS):
            keys, values = part(held).store.unpacked(row, head)
            torch.testing.assert_close(found.keys[row, head], keys)
            torch.testing.assert_close(found.values[row, head], values)


def test_salient_tokens_are_the_newest_of_a_flush() -> None:
    own, stream = twin(layer(sinks=0)), Stream()
    own.update(*stream(116)[1:])
    labels = part(own).store.labels
    assert labels is not None
    packed = torch.arange(100)
    assert torch.equal(
        labels.read(Place(slice(None), slice(None)), 100)[0, 0], packed >= 70
    )  # ratio 0.3; 16 stay in the window
    assert part(own).window.mass is None


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("way", WAYS)
def test_with_16_bits_every_way_of_generating_gives_the_dense_tokens(name: str, function: str, way: str) -> None:
    prompt, settings = WAYS[way]
    model = dense(name, function).to(torch.bfloat16)
    expected = answer(model, DynamicCache(config=model.config), prompt, **settings)
    found = answer(model, materialized(model, packed_plan(model, packing=SIXTEEN)), prompt, **settings)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("way", WAYS)
def test_packed_tokens_answer_as_over_handles(function: str, way: str) -> None:
    """Greedy answers of one model with one plan; where rows are padded, only whole batches can be compared."""
    prompt, settings = WAYS[way]
    model, other = dense("llama", function), planned()
    plan = packed_plan(model, KVBits(ratio=1.0))
    cache = materialized(model, plan)
    found = answer(model, cache, prompt, **settings)
    assert all(each.clusters[0].part.store.begun for each in cache.layers)
    expected = answer(other, PlanCache(other.config, plan), prompt, **settings)
    rows = slice(1, None) if len(prompt) > 1 else slice(None)  # the first of two is padded, and has other sinks
    assert torch.equal(found[rows], expected[rows])
    assert found.shape == expected.shape


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("ratio", [0.3, 1.0])
def test_a_padded_row_is_near_the_dense_logits(function: str, ratio: float) -> None:
    model, prompt = dense("llama", function), ids(2, 60)
    mask = left_padded(2, 60, 17)["attention_mask"]
    plan = packed_plan(model, KVBits(high=(4, 4), low=(4, 4) if ratio == 1.0 else (2, 2), ratio=ratio))
    logits = []
    for cache in (DynamicCache(config=model.config), materialized(model, plan)):
        with torch.no_grad():
            model(prompt, attention_mask=mask, past_key_values=cache)
            further = torch.cat([mask, torch.ones(2, 20, dtype=torch.int64)], 1)
            logits.append(model(ids(2, 20, seed=5), attention_mask=further, past_key_values=cache).logits)
    expected, found = (each.log_softmax(-1) for each in logits)
    assert torch.isfinite(found).all()
    assert float((expected.exp() * (expected - found)).sum(-1).mean()) < (0.02 if ratio == 1.0 else 0.3)


def test_chunks_and_steps_give_the_logits_of_the_handle_path() -> None:
    model, other, tokens = dense(function="eager"), planned(), ids(2, 120)
    plan = packed_plan(model, KVBits(ratio=0.0))
    logits = []
    for own, cache in ((other, PlanCache(other.config, plan)), (model, materialized(model, plan))):
        with torch.no_grad():
            parts = tokens.split([50, 7, 1, 1, 30, 1, 30], 1)
            logits.append(torch.cat([own(each, past_key_values=cache).logits for each in parts], 1))
    torch.testing.assert_close(logits[1], logits[0], atol=1e-3, rtol=1e-3)


def test_layers_may_mix_packed_and_plain_heads() -> None:
    model = dense()
    writer = PlanWriter(AttentionPlan.empty(model.config), Source("zipcache"))
    writer.packing(SMALL)
    writer.kv(1, KVBits(ratio=1.0), (1,))
    cache = materialized(model, writer.finish())
    dense_cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for tokens in ids(1, 130).split([90, 1, 9, 30], 1):
            model(tokens, past_key_values=cache)
            model(tokens, past_key_values=dense_cache)
    first = cache.layers[1].clusters
    assert [type(cluster.part) for cluster in first] == [PlainPart, PackedPart]
    key = torch.zeros(1, 2, 1, 16)
    keys, _ = cache.layers[1].update(key, key)
    torch.testing.assert_close(keys[:, 0, :-1], dense_cache.layers[1].keys[:, 0], atol=1e-4, rtol=1e-3)
    assert float((keys[:, 1, :-1] - dense_cache.layers[1].keys[:, 1]).abs().max()) > 0.01


def test_an_attention_function_of_its_own_is_served() -> None:
    """Gemma 2 caps its scores, which the plan's function refuses; eager does it over tensors."""
    config = CONFIG_MAPPING["gemma2"](
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=32, layer_types=["full_attention", "sliding_attention"],
        attn_logit_softcapping=5.0, query_pre_attn_scalar=16, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    plan = packed_plan(model, KVBits(ratio=1.0))
    expected = answer(model, DynamicCache(config=model.config), ids(1, 60))
    assert torch.equal(
        answer(model, materialized(model, dataclasses.replace(plan, packing=SIXTEEN)), ids(1, 60)), expected
    )
    assert answer(model, materialized(model, plan), ids(1, 60)).shape == expected.shape
    model.set_attn_implementation("compress_plan")
    with pytest.raises(ValueError, match=r"softcap.*materialize=True"):
        answer(model, PlanCache(model.config, plan), ids(1, 60))


def test_a_model_without_handles_in_its_functions_says_what_to_do() -> None:
    model = dense(function="eager")
    with pytest.raises(AttributeError, match=r"materialize=True"):
        model(ids(1, 9), past_key_values=PlanCache(model.config, packed_plan(model)))


def test_crop_reset_and_copies() -> None:
    model, tokens = dense(), ids(1, 100)
    cache = materialized(model, packed_plan(model))
    with torch.no_grad():
        first = model(tokens, past_key_values=cache).logits
        other = copy.deepcopy(cache)
        new = [model(ids(1, 4, seed=3), past_key_values=each).logits for each in (cache, other)]
        torch.testing.assert_close(new[0], new[1])
        cache.crop(-4)
        assert cache.get_seq_length() == 100
        cache.reset()
        torch.testing.assert_close(model(tokens, past_key_values=cache).logits, first)
    assert all(isinstance(each, MaterializedLayer) for each in cache.layers)
    assert all(each.clusters[0].part.window.mass is None for each in cache.layers)  # nobody is there to score


@pytest.mark.parametrize(
    ("head", "told"),
    [
        (Head(sink=4, window=Window(a=64, b=0.0)), "KV head 1 sees a window"),
        (Head(sink=4, window=Window(a=64, b=0.0), stride=Stride(every=2, phase=0)), "KV head 1 sees a window"),
        (Head(topk=TopK(k=64)), "KV head 1 searches for far tokens"),
    ],
)
def test_heads_that_do_not_attend_to_everything_are_refused(head: Head, told: str) -> None:
    config = build_model("llama").config
    empty = AttentionPlan.empty(config)
    layers = (*empty.layers[:2], with_heads(empty.layers[2], {1: head}))
    plan = dataclasses.replace(empty, layers=layers, search=SEARCH)
    PlanCache(config, plan)
    with pytest.raises(InputError, match=f"layer 2: {told}.*compress_plan"):
        PlanCache(config, plan, materialize=True)


def test_what_can_not_be_kept_is_refused() -> None:
    own, stream = twin(layer()), Stream()
    _, key, value = stream(90)
    with pytest.raises(ValueError, match="no gradients"):
        own.update(key.requires_grad_(True), value)
    key = key.detach()
    key[0, 1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match="aren't finite"):
        own.update(key, value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensors_are_of_the_models_type(dtype: torch.dtype) -> None:
    own, stream = twin(layer()), Stream()
    for count in (90, 1, 9):
        keys, values = own.update(*(states.to(dtype) for states in stream(count)[1:]))
        assert keys.dtype == values.dtype == dtype
