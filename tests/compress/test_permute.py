"""Heads in another order: the model says the same, and a plan follows it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compress.calibrate.errors import InputError
from models import build_model
from runs import quick
from torch import Tensor
from transformers import PreTrainedModel

import compress
from compress.kv.attention import NAME
from compress.plan import AttentionPlan, Source, Window, read_plan
from compress.plan_order import side_by_side
from compress.plan_writer import PlanWriter, Rule
from compress.runtime.linear import PackedLinear
from compress.runtime.loading import find
from compress.runtime.permute import permute_heads
from compress.runtime.plan_cache import PlanCache


def ids(length: int) -> Tensor:
    return torch.randint(3, 300, (2, length), generator=torch.Generator().manual_seed(length))


def planned(model: PreTrainedModel) -> AttentionPlan:
    """Every other KV head streams, and all layers are ordered by that."""
    writer = PlanWriter(AttentionPlan.empty(model.config), Source("duo"))
    kv_heads = writer.finish().fingerprint.kv_heads
    for layer in range(model.config.num_hidden_layers):
        for head in range(0, kv_heads, 2):
            writer.see(layer, head, Rule(4, Window(a=64, b=0.0)))
    return side_by_side(writer.finish(), {}, 1)


def logits(model: PreTrainedModel, plan: AttentionPlan | None = None) -> Tensor:
    cache = None if plan is None else PlanCache(model.config, plan)
    with torch.no_grad():
        parts = [model(part, past_key_values=cache, use_cache=cache is not None).logits for part in [ids(100)]]
        if cache is not None:
            parts += [model(ids(n), past_key_values=cache).logits for n in (1, 1, 9)]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("name", ["llama", "llama_untied", "qwen3"])
def test_a_model_says_the_same_in_any_order(name: str) -> None:
    """Biases on q, k, v and o; one and several query heads a KV head; norms of queries and keys."""
    changes = {"num_key_value_heads": 2} if name == "qwen3" else {}
    model = build_model(name, **changes)
    model.set_attn_implementation(NAME)
    expected, plan = logits(model), planned(model)
    windowed = logits(model, plan)
    weight = model.model.layers[0].self_attn.q_proj.weight.clone()
    now = permute_heads(model, plan)
    assert not torch.equal(model.model.layers[0].self_attn.q_proj.weight, weight)
    assert all(layer.perm is None for layer in now.layers)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(model, now), windowed, atol=1e-5, rtol=1e-5)
    assert [head.window.full for head in now.layers[0].heads] == sorted(
        [head.window.full for head in now.layers[0].heads], reverse=True
    )
    back = replace(
        now, layers=tuple(replace(n, perm=_inverse(o.perm)) for n, o in zip(now.layers, plan.layers, strict=True))
    )
    permute_heads(model, back)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, weight)


def _inverse(order: tuple[int, ...] | None) -> tuple[int, ...] | None:
    return None if order is None else tuple(order.index(head) for head in range(len(order)))


@pytest.mark.parametrize("group", [8, -1])
def test_packed_layers_are_permuted_where_groups_allow_it(
    tiny: Callable[[str], Path], tmp_path: Path, text: Path, group: int
) -> None:
    """Columns of o_proj belong to groups: of one head's channels, or of all."""
    out = quick(tiny("llama"), "rtn", tmp_path / "out", text, f"weights.group_size={group}").out
    model, _ = compress.load(out)
    model.set_attn_implementation(NAME)
    assert isinstance(model.model.layers[0].self_attn.o_proj, PackedLinear)
    expected, plan = logits(model), planned(model)
    windowed = logits(model, plan)
    now = permute_heads(model, plan)
    assert all(layer.perm is None for layer in now.layers)
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(model, now), windowed, atol=1e-4, rtol=1e-4)


def test_groups_across_heads_cannot_be_put_into_another_order(
    tiny: Callable[[str], Path], tmp_path: Path, text: Path
) -> None:
    out = quick(tiny("llama"), "rtn", tmp_path / "out", text, "weights.group_size=32").out  # 48 channels a KV head
    model, _ = compress.load(out)
    codes = model.model.layers[0].self_attn.q_proj.codes.clone()
    with pytest.raises(InputError, match="layer 0: the heads of this model"):
        permute_heads(model, planned(model))
    assert torch.equal(model.model.layers[0].self_attn.q_proj.codes, codes)


@pytest.mark.parametrize("packed", [True, False])
def test_an_artifact_is_loaded_with_its_heads_in_order(
    tiny: Callable[[str], Path], tmp_path: Path, text: Path, packed: bool
) -> None:
    """Its own cache, and one made of its file for the checkpoint's order, give the same."""
    sets = [f"heads.{key}" for key in ("score=induction", "lengths=384", "sink=16", "recent=64", "budget_tokens=500")]
    sets += ["heads.prompts=passkey", "heads.items=1", "heads.retention=0.6", "weights.group_size=8"]
    out = quick(tiny("llama"), "rtn", tmp_path / "out", text, "heads=heads", *sets).out
    plan = read_plan(out)
    assert plan is not None
    assert any(layer.perm == (1, 0) for layer in plan.layers)
    plain, _ = compress.load(out, packed=packed, kv=False)
    plain.set_attn_implementation(NAME)
    model, _ = compress.load(out, packed=packed)
    found = find(out)
    assert found.cache is not None
    with torch.no_grad():
        expected = plain(ids(200), past_key_values=PlanCache(plain.config, plan)).logits
        for cache in (None, found.cache(), PlanCache(model.config, plan)):
            torch.testing.assert_close(model(ids(200), past_key_values=cache).logits, expected, atol=1e-4, rtol=1e-4)
