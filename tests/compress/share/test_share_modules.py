"""Layers that share attention, against a plain forward pass that computes every probability."""

import copy
from typing import Any

import pytest
import torch
from models import build_model
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from compress.kv.growing import GrowingCache
from compress.plan import Share
from compress.share.modules import share_layers

FAMILIES = ("llama", "llama_untied", "qwen2", "qwen3")
LAYERS = 5


def tiny(name: str, **changes: Any) -> Any:
    kinds = {"layer_types": ["full_attention"] * LAYERS} if name.startswith("qwen") else {}
    return build_model(name, num_hidden_layers=LAYERS, **kinds, **changes).eval()


def queries_and_keys(attention: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    shape = (*hidden.shape[:2], -1, attention.head_dim)
    q, k = attention.q_proj(hidden).view(shape), attention.k_proj(hidden).view(shape)
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    return apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)


def plainly(model: Any, ids: Tensor, shares: dict[int, Share]) -> Tensor:
    """Logits of the dense model's weights with shared probabilities, or keys and values, head by head."""
    decoder = model.model
    hidden = decoder.embed_tokens(ids)
    cos, sin = decoder.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    held: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    for index, layer in enumerate(decoder.layers):
        own, share = layer.self_attn, shares.get(index)
        normed = layer.input_layernorm(hidden)
        q, k = queries_and_keys(own, normed, cos, sin)
        v = own.v_proj(normed).view(*normed.shape[:2], -1, own.head_dim).transpose(1, 2)
        if share is not None and share.mode == "kv":
            _, k, v = held[share.source]
        group = q.shape[1] // k.shape[1]
        scores = q @ k.repeat_interleave(group, 1).transpose(2, 3) * own.scaling
        weights = scores.masked_fill(~causal, -torch.inf).softmax(-1)
        if share is not None and share.mode == "attn":
            heads = range(q.shape[1]) if share.head_map is None else share.head_map
            weights = torch.stack([held[share.source][0][:, head] for head in heads], 1)
        held[index] = weights, k, v
        mixed = (weights @ v.repeat_interleave(group, 1)).transpose(1, 2).flatten(2)
        hidden = hidden + own.o_proj(mixed)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(decoder.norm(hidden))


def shares_of(model: Any, mode: str, mapped: bool = False) -> dict[int, Share]:
    heads = model.config.num_attention_heads
    head_map = tuple((3 * head + 1) % heads // 2 for head in range(heads)) if mapped else None  # many to one
    return {3: Share(mode, 1, head_map), 4: Share(mode, 1)}


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(4, 300, (2, 21), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("mode", "mapped"), [("attn", False), ("attn", True), ("kv", False)])
def test_shared_layers_are_what_their_definition_says(name: str, mode: str, mapped: bool, ids: Tensor) -> None:
    model = tiny(name)
    shares = shares_of(model, mode, mapped)
    with torch.no_grad():
        wanted, dense = plainly(model, ids, shares), model(ids).logits
        share_layers(model, shares)
        found = model(ids, use_cache=False).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert (wanted - dense).abs().max() > 1e-2  # sharing does something


def test_a_layer_that_shares_with_its_own_likeness_changes_nothing(ids: Tensor) -> None:
    model = tiny("llama")
    model.model.layers[2].load_state_dict(model.model.layers[1].state_dict())
    for module in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
        nn.init.zeros_(module.weight)  # layer 1 adds nothing, so that layer 2 sees what layer 1 saw
    with torch.no_grad():
        dense = model(ids).logits
        share_layers(model, {2: Share("attn", 1)})
        torch.testing.assert_close(model(ids).logits, dense, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["attn", "kv"])
@pytest.mark.parametrize("cache", [DynamicCache, GrowingCache])
def test_chunks_and_tokens_through_a_cache_are_the_whole_text(mode: str, cache: Any, ids: Tensor) -> None:
    model = tiny("llama")
    share_layers(model, shares_of(model, mode, mapped=mode == "attn"))
    past = cache(config=model.config) if cache is DynamicCache else cache(model.config)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        parts = [model(part, past_key_values=past).logits for part in ids.split([9, 6, 1, 1, 4], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)
    consumer = past.layers[3]
    assert not consumer.is_initialized or consumer.keys.shape[-1] == (0 if cache is GrowingCache else 1)


@pytest.mark.parametrize("mode", ["attn", "kv"])
@pytest.mark.parametrize("beams", [1, 2])
def test_padded_batches_generate_what_each_sequence_generates(mode: str, beams: int, ids: Tensor) -> None:
    model = tiny("llama")
    share_layers(model, shares_of(model, mode))
    padding = torch.zeros(1, 4, dtype=ids.dtype)
    short, long = ids[:1, :9], ids[1:, :13]
    batch = torch.cat([torch.cat([padding, short], 1), long])
    mask = torch.ones_like(batch)
    mask[0, :4] = 0
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": beams}
    both = model.generate(batch, attention_mask=mask, **options)[:, 13:]
    alone = [model.generate(one, **options)[:, one.shape[1] :] for one in (short, long)]
    assert both.tolist() == torch.cat(alone).tolist()


@pytest.mark.parametrize("mode", ["attn", "kv"])
def test_gradients_go_through_the_owner(mode: str, ids: Tensor) -> None:
    model = tiny("llama_untied")
    plain = copy.deepcopy(model)
    shares = shares_of(model, mode, mapped=mode == "attn")
    share_layers(model, shares)
    model(ids, use_cache=False).logits.square().sum().backward()
    plainly(plain, ids, shares).square().sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    wanted = {name: parameter.grad for name, parameter in plain.named_parameters()}
    assert found.keys() < wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], atol=2e-3, rtol=2e-3, msg=name)


def test_a_copy_shares_by_itself(ids: Tensor) -> None:
    model = tiny("llama")
    share_layers(model, shares_of(model, "attn"))
    other = copy.deepcopy(model)
    assert other.model.layers[1].self_attn.echo is other.model.layers[3].self_attn.echo
    assert other.model.layers[1].self_attn.echo is not model.model.layers[1].self_attn.echo
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, model(ids).logits)
        assert not model.model.layers[1].self_attn.echo._led  # activations are let go


@pytest.mark.parametrize(
    ("shares", "told"),
    [
        ({7: Share("attn", 1)}, "isn't there"),
        ({2: Share("attn", 2)}, "isn't before it"),
        ({2: Share("attn", 3)}, "isn't before it"),
        ({2: Share("kv", 1), 3: Share("attn", 2)}, "a chain"),
        ({2: Share("attn", 1, (0, 1))}, "the model has 6"),
        ({2: Share("attn", 1, (0, 1, 2, 3, 4, 6))}, "the model has 6"),
    ],
)
def test_what_cannot_be_shared_is_refused_and_nothing_changed(shares: dict[int, Share], told: str, ids: Tensor) -> None:
    model = tiny("llama")
    with torch.no_grad():
        before = model(ids).logits
        with pytest.raises(ValueError, match=told):
            share_layers(model, shares)
        assert torch.equal(model(ids).logits, before)


def test_sliding_layers_and_second_times_are_refused(ids: Tensor) -> None:
    model = build_model("mistral").eval()
    with pytest.raises(ValueError, match="different windows"):
        share_layers(model, {2: Share("attn", 1)})
    model = tiny("llama")
    share_layers(model, {2: Share("attn", 1)})
    with pytest.raises(ValueError, match="can't be shared again"):
        share_layers(model, {2: Share("attn", 1)})
