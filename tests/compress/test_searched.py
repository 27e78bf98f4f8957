"""Heads that search for far tokens, through a whole model and its cache."""

import dataclasses
from typing import Any

import pytest
import torch
from models import build_model
from transformers import PreTrainedModel

from compress.kv.attention import NAME
from compress.kv.searched import SearchedPart
from compress.plan import AttentionPlan, Search, Source, TopK
from compress.plan_writer import PlanWriter
from compress.runtime.plan_cache import PlanCache

SEARCH = Search(sink=4, window=64, block_q=16, block_k=8, pool=4, refresh=(8, 4, 2), gate=0)
POLICIES = ("hip", "quest", "block_mean")
LENGTH = 260


def planned(policy: Any, k: int = 64, heads: tuple[int, ...] | None = None, search: Search = SEARCH) -> tuple[Any, Any]:
    """A model and a plan whose layers from the second on search."""
    model = build_model("llama", max_position_embeddings=1024)
    model.set_attn_implementation(NAME)
    writer = PlanWriter(AttentionPlan.empty(model.config), Source(policy))
    writer.search(search)
    for layer in range(1, model.config.num_hidden_layers):
        for head in range(model.config.num_key_value_heads) if heads is None else heads:
            writer.topk(layer, head, TopK(k=k, policy=policy))
    return model, writer.finish()


def cached(model: PreTrainedModel, plan: AttentionPlan, gate: int | None = None) -> PlanCache:
    """A cache whose parts search beyond ``gate`` tokens, however few they attend."""
    cache = PlanCache(model.config, plan)
    for layer in cache.layers[1:]:
        for part in (cluster.part for cluster in layer.clusters):
            if isinstance(part, SearchedPart) and gate is not None:
                part.finder = dataclasses.replace(part.finder, gate=gate)  # type: ignore[type-var]
    return cache


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(5, 90, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_a_list_of_everything_is_dense_attention(policy: str) -> None:
    """Prompt, chunked prompt and decoding: every token is seen once, through sink, list or window."""
    model, plan = planned(policy, k=512)
    ids = tokens(1, LENGTH)
    expected = model(ids).logits
    cache = cached(model, plan, gate=0)
    got = [model(ids[:, part], past_key_values=cache).logits for part in (slice(0, 170), slice(170, 231))]
    got += [model(ids[:, n : n + 1], past_key_values=cache).logits for n in range(231, LENGTH)]
    torch.testing.assert_close(torch.cat(got, 1), expected, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_padding_changes_nothing(policy: str) -> None:
    model, plan = planned(policy)
    ids = tokens(1, LENGTH)
    alone, own = cached(model, plan), []
    own.append(model(ids, past_key_values=alone).logits[:, -1])
    own += [model(tokens(1, 1, seed=n), past_key_values=alone).logits[:, -1] for n in range(12)]
    batch = torch.cat([torch.cat([torch.zeros(1, 33, dtype=torch.int64), ids], 1), tokens(1, LENGTH + 33, seed=7)])
    mask = torch.ones_like(batch)
    mask[0, :33] = 0
    both = cached(model, plan)
    places = (mask.cumsum(1) - 1).clamp(min=0)  # quest's bounds of channels depend on them
    found = [model(batch, attention_mask=mask, position_ids=places, past_key_values=both).logits[:1, -1]]
    for n in range(12):
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], 1)
        step = tokens(1, 1, seed=n).expand(2, 1)
        places = (mask.cumsum(1) - 1)[:, -1:]
        found.append(model(step, attention_mask=mask, position_ids=places, past_key_values=both).logits[:1, -1])
    torch.testing.assert_close(torch.stack(found), torch.stack(own), atol=2e-5, rtol=2e-4)


@torch.no_grad()
def test_up_to_the_gate_the_model_is_as_it_is() -> None:
    model, plan = planned("hip", search=dataclasses.replace(SEARCH, gate=LENGTH))
    ids = tokens(1, LENGTH)
    assert torch.equal(model(ids, past_key_values=cached(model, plan)).logits, model(ids).logits)
    longer = torch.cat([ids, tokens(1, 60, seed=2)], 1)
    assert not torch.allclose(
        model(longer, past_key_values=cached(model, plan)).logits, model(longer).logits, atol=1e-4
    )


@torch.no_grad()
def test_heads_that_search_beside_heads_that_do_not() -> None:
    """A layer whose second KV head is dense gives that head's output unchanged."""
    model, plan = planned("hip", k=512, heads=(0,))
    ids = tokens(2, LENGTH)
    cache = cached(model, plan, gate=0)
    got = (
        model(ids[:, :-1], past_key_values=cache).logits[:, -1],
        model(ids[:, -1:], past_key_values=cache).logits[:, -1],
    )
    expected = model(ids).logits[:, -2:].unbind(1)
    torch.testing.assert_close(torch.stack(got), torch.stack(expected), atol=2e-5, rtol=2e-4)


@torch.no_grad()
def test_a_list_is_kept_between_searches_and_found_anew_when_tokens_change() -> None:
    model, plan = planned("hip")
    cache = cached(model, plan)
    model(tokens(2, LENGTH), past_key_values=cache)
    part = cache.layers[1].clusters[0].part
    lists = []
    for n in range(6):
        model(tokens(2, 1, seed=n), past_key_values=cache)
        lists.append(part._found.blocks.starts)
    assert lists[1] is lists[0]
    assert lists[2] is not lists[1]
    assert lists[3] is lists[2]
    before = cache.layers[1].get_seq_length()
    cache.crop(-3)
    assert part._found is None
    assert cache.layers[1].get_seq_length() == before - 3
    model(tokens(2, 1), past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 1]))
    same = model(tokens(1, 1, seed=9).expand(2, 1), past_key_values=cache).logits
    torch.testing.assert_close(same[0], same[1])


@torch.no_grad()
def test_generates_in_beams_and_counts_its_copies() -> None:
    model, plan = planned("hip")
    cache = cached(model, plan)
    model.generate(tokens(1, LENGTH), past_key_values=cache, num_beams=2, max_new_tokens=6, do_sample=False)
    total = cache.nbytes()
    assert total.allocated > total.stored == total.payload
