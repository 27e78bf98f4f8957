"""KV heads that search among packed keys: what they read, what they attend, what they hold, and their artifact."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compress.calibrate.errors import InputError
from models import build_model, save_tiny
from torch import Tensor
from transformers import PreTrainedModel

import compress
from compress.kv.attention import NAME
from compress.kv.packed import PackedFormat, PackedPart
from compress.kv.packed_keys import PackedKeys
from compress.kv.part import Call
from compress.kv.rotation import Rotation
from compress.kv.searched_packed import SearchedPackedPart
from compress.kv.window import Tokens
from compress.pipeline import run
from compress.plan import AttentionPlan, KVBits, Packing, Search, Source, TopK, read_plan
from compress.plan_writer import PlanWriter
from compress.runtime.plan_cache import PlanCache
from compress.sparse import hip
from compress.sparse.finder import finder, hip_settings

WIDTH, GROUP, KV_HEADS = 16, 3, 2
PACKING = Packing(sinks=4, window_min=16, flush=16, first_flush=32, seed=1)
BITS = KVBits(ratio=0.3)
SEARCH = Search(sink=12, window=64, block_q=16, block_k=8, pool=4, refresh=(8, 4, 2), gate=0)
POLICIES = ("hip", "quest", "block_mean")
SCHEMES = {
    "rotated": PACKING,
    "plain": replace(PACKING, rotate=False, center=False, key_cst=False),
    "by channel": replace(Packing.faithful(), first_flush=32),
    "no sinks, int16": replace(PACKING, sinks=0, window_bits=16),
}
SCALING = WIDTH**-0.5


def drawn(length: int, batch: int = 1, seed: int = 0) -> tuple[Tensor, Tokens]:
    """Queries of all heads, and tokens whose keys have some structure."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, KV_HEADS * GROUP, length, WIDTH, generator=generator)
    k, v = (torch.randn(batch, KV_HEADS, length, WIDTH, generator=generator) for _ in range(2))
    return q, Tokens(k + 2 * torch.randn(1, KV_HEADS, 1, WIDTH, generator=generator), v)


def parts(
    policy: Any = "hip", k: int = 64, packing: Packing = PACKING, bits: KVBits = BITS
) -> tuple[SearchedPackedPart, PackedPart]:
    """A part that searches, and one that attends everything, of the same format."""
    rotation = Rotation(WIDTH) if packing.rotate else None
    format = PackedFormat(packing, bits, 0, rotation)
    return SearchedPackedPart(format, finder(TopK(k, policy), SEARCH, 80), SEARCH.sink), PackedPart(format)


def fed(part: PackedPart, length: int, batch: int = 1, first: Tensor | None = None) -> Tensor:
    """A prompt at once; its output."""
    q, new = drawn(length, batch)
    part.begin(new.keys)
    first = torch.zeros(batch, dtype=torch.int64) if first is None else first
    return part.chunk(q, new, Call(SCALING, first, alone=True))


def stepped(part: PackedPart, count: int, batch: int = 1, seed: int = 9) -> Tensor:
    """Outputs of so many tokens, one by one."""
    out = []
    for n in range(count):
        q, new = drawn(1, batch, seed=seed + n)
        out.append(part.step(q, new, SCALING))
    return torch.cat(out, 2)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_list_of_everything_is_the_packed_cache(policy: str, scheme: str) -> None:
    """Every token is seen once, through sinks, list, window and what waits to be packed, across several flushes."""
    searched, whole = parts(policy, 4096, SCHEMES[scheme])
    torch.testing.assert_close(fed(searched, 300), fed(whole, 300), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(stepped(searched, 40), stepped(whole, 40), atol=2e-5, rtol=1e-4)
    assert searched._found is not None


@pytest.mark.parametrize("bits", [KVBits(ratio=0.0), KVBits(ratio=1.0)])
def test_one_class_of_tokens(bits: KVBits) -> None:
    searched, whole = parts(k=4096, bits=bits)
    torch.testing.assert_close(fed(searched, 200), fed(whole, 200), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(stepped(searched, 20), stepped(whole, 20), atol=2e-5, rtol=1e-4)


def reference(part: SearchedPackedPart, before: Tokens, q: Tensor, new: Tokens) -> Tensor:
    """Exact attention of a new token over what its list, the sinks and the window show of unpacked tokens."""
    found, length = part._found, len(before)
    assert found is not None
    place = torch.arange(length)
    seen = (place < SEARCH.sink) | (place >= found.near[:, None, None])
    starts = found.blocks.starts[:, :, 0]
    listed = (place >= starts[..., None]) & (place < starts[..., None] + found.blocks.block_k)
    listed &= (torch.arange(starts.shape[2]) < found.blocks.counts[:, :, 0, None])[..., None]
    seen = torch.cat([seen | listed.any(2), torch.ones(*starts.shape[:2], 1, dtype=torch.bool)], 2)
    keys, values = (torch.cat(pair, 2) for pair in ((before.keys, new.keys), (before.values, new.values)))
    scores = q.unflatten(1, (KV_HEADS, GROUP))[..., 0, :] @ keys.transpose(-1, -2) * SCALING
    shares = scores.masked_fill(~seen[:, :, None], -torch.inf).softmax(-1)
    return (shares @ values).flatten(1, 2)[:, :, None]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_listed_is_attended_and_nothing_else(policy: str, scheme: str) -> None:
    part, _ = parts(policy, 64, SCHEMES[scheme])
    fed(part, 300)
    fresh = []
    for n in range(12):
        q, new = drawn(1, seed=20 + n)
        before, listed = part.tokens(), part._listed
        got = part.step(q, Tokens(new.keys.clone(), new.values), SCALING)
        fresh.append(part._listed is not listed)
        torch.testing.assert_close(got, reference(part, before, q, new), atol=3e-5, rtol=3e-4)
        assert int(part._found.blocks.counts.sum()) * 8 < 2 * (300 - 64)
    assert fresh[0]
    assert not all(fresh)
    assert any(fresh[1:])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_hip_chooses_what_it_chooses_among_unpacked_keys(scheme: str) -> None:
    part, _ = parts("hip", 64, SCHEMES[scheme])
    fed(part, 400)
    held, (q, new) = part.tokens(), drawn(1, seed=3)
    part.step(q, new, SCALING)
    ends = torch.tensor([401])
    keys = torch.cat([held.keys, new.keys.new_zeros(1, KV_HEADS, 1, WIDTH)], 2)
    expected = hip.refreshed(q, keys, hip_settings(TopK(64, "hip"), SEARCH), None, ends)
    assert torch.equal(part._found.blocks.counts, expected.blocks.counts)
    assert torch.equal(part._found.blocks.starts, expected.blocks.starts)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_keys_are_read_at_their_places(scheme: str) -> None:
    part, _ = parts(packing=SCHEMES[scheme])
    fed(part, 200, batch=2)
    stepped(part, 50, batch=2)
    held = part.store.tokens()
    keys = PackedKeys(part.store, 250)
    count = len(held)
    torch.testing.assert_close(keys.span(0, count), held.keys, atol=1e-6, rtol=1e-6)
    drawn_places = torch.randint(0, count, (60,), generator=torch.Generator().manual_seed(0))
    rows = torch.arange(60) % 4
    expected = held.keys.flatten(0, 1)[rows, drawn_places]
    torch.testing.assert_close(keys.read(rows * 250 + drawn_places), expected, atol=1e-6, rtol=1e-6)
    assert keys.span(count, 250).isfinite().all()


@pytest.mark.parametrize("policy", POLICIES)
def test_padding_changes_nothing(policy: str) -> None:
    """A sequence that begins later has the lists and the answers that it has alone."""
    alone, _ = parts(policy)
    q, new = drawn(260)
    alone.begin(new.keys)
    own = alone.chunk(q, Tokens(new.keys, new.values), Call(SCALING, torch.zeros(1, dtype=torch.int64), alone=True))
    both, _ = parts(policy)
    pad = torch.zeros(1, 1, 40, 1)
    joined = [
        torch.cat([torch.cat([pad.expand(1, x.shape[1], 40, WIDTH), x], 2), y], 0)
        for x, y in zip((q, new.keys, new.values), _three(drawn(300, seed=5)), strict=True)
    ]
    both.begin(joined[1])
    out = both.chunk(joined[0], Tokens(*joined[1:]), Call(SCALING, torch.tensor([40, 0]), alone=True))
    torch.testing.assert_close(out[:1, :, 40:], own, atol=2e-5, rtol=1e-4)
    for n in range(10):
        q, new = drawn(1, seed=70 + n)
        expected = alone.step(q, Tokens(new.keys.clone(), new.values), SCALING)
        q2, k2, v2 = (x.expand(2, -1, -1, -1) for x in (q, new.keys, new.values))
        got = both.step(q2, Tokens(k2.clone(), v2), SCALING)
        torch.testing.assert_close(got[:1], expected, atol=2e-5, rtol=1e-4)


def _three(made: tuple[Tensor, Tokens]) -> tuple[Tensor, Tensor, Tensor]:
    return made[0], made[1].keys, made[1].values


def test_up_to_the_gate_nothing_is_searched_for() -> None:
    searched, whole = parts()
    assert torch.equal(fed(searched, 70), fed(whole, 70))
    assert torch.equal(stepped(searched, 9), stepped(whole, 9))
    assert searched._found is None
    stepped(searched, 3)
    assert searched._found is not None


def test_a_further_chunk_attends_all_that_is_packed() -> None:
    searched, whole = parts()
    q, new = drawn(50, seed=4)
    behind, out = Call(SCALING, torch.zeros(1, dtype=torch.int64), alone=False), []
    for part in (searched, whole):
        fed(part, 300)
        stepped(part, 2)
        out.append(part.chunk(q, Tokens(new.keys.clone(), new.values), behind))
    torch.testing.assert_close(*out, atol=2e-5, rtol=1e-4)
    assert searched._found is None


def test_crops_and_other_orders_begin_a_new_search() -> None:
    part, _ = parts()
    fed(part, 300, batch=2)
    stepped(part, 3, batch=2)
    part.crop(torch.tensor([2, 2]))
    assert part._found is None
    stepped(part, 1, batch=2)
    before, (q, new) = part.tokens(), drawn(1, 2, seed=44)
    got = part.step(q, Tokens(new.keys.clone(), new.values), SCALING)
    torch.testing.assert_close(got, reference(part, before, q, new), atol=3e-5, rtol=3e-4)
    part.change(lambda held: held.index_select(0, torch.tensor([1, 1])))
    assert part._found is None
    q, new = drawn(1, seed=45)
    same = part.step(
        q.expand(2, -1, -1, -1), Tokens(new.keys.repeat(2, 1, 1, 1), new.values.repeat(2, 1, 1, 1)), SCALING
    )
    torch.testing.assert_close(same[0], same[1])


def test_codes_are_as_without_a_search() -> None:
    """But for what deeper layers would see: here keys and values are given."""
    bits = KVBits(ratio=0.0)
    searched, whole = parts(bits=bits)
    for part in (searched, whole):
        fed(part, 200)
        stepped(part, 70)
    for name, arena in whole.store.arenas.items():
        assert torch.equal(arena.keys, searched.store.arenas[name].keys)
        assert torch.equal(arena.values, searched.store.arenas[name].values)


def test_copies_and_summaries_are_counted_as_room() -> None:
    sizes = {}
    for policy in POLICIES:
        searched, whole = parts(policy)
        fed(searched, 300)
        fed(whole, 300)
        stepped(searched, 1)
        stepped(whole, 1)
        own, plain = searched.nbytes(), whole.nbytes()
        assert (own.payload, own.stored) == (plain.payload, plain.stored)
        sizes[policy] = own.allocated - plain.allocated
    copied = 2 * 64 * (2 * WIDTH // 8)  # codes of 64 tokens of two heads at 2 bits, at least
    assert sizes["hip"] > copied
    blocks = (300 - SEARCH.sink - SEARCH.window) // 8
    vector = 2 * blocks * WIDTH * 2  # of 16 bits, for every block and head
    assert sizes["block_mean"] >= copied + vector
    assert sizes["quest"] >= copied + 2 * vector


# The whole model


def planned(policy: Any, k: int) -> tuple[PreTrainedModel, AttentionPlan]:
    model = build_model("llama", max_position_embeddings=1024)
    model.set_attn_implementation(NAME)
    writer = PlanWriter(AttentionPlan.empty(model.config), Source("zipcache"))
    writer.packing(PACKING)
    for layer in range(model.config.num_hidden_layers):
        writer.kv(layer, BITS)
    writer = PlanWriter(writer.finish(), Source(policy))
    writer.search(SEARCH)
    for layer in range(1, model.config.num_hidden_layers):
        writer.topk(layer, 0, TopK(k, policy))
    return model, writer.finish()


@torch.no_grad()
def test_beams_and_both_kinds_of_heads_in_a_model() -> None:
    model, plan = planned("hip", 64)
    assert AttentionPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    ids = torch.randint(5, 90, (2, 300), generator=torch.Generator().manual_seed(0))
    cache = PlanCache(model.config, plan)
    out = model.generate(ids, past_key_values=cache, num_beams=2, max_new_tokens=8, do_sample=False)
    assert out.shape == (2, 308)
    assert [type(cluster.part) for cluster in cache.layers[1].clusters].count(SearchedPackedPart) == 1
    total = cache.nbytes()
    assert total.payload < total.stored < total.allocated


def test_what_cannot_go_together_is_refused() -> None:
    model, plan = planned("hip", 64)
    with pytest.raises(InputError, match=r"attend 12 first and 64 newest tokens, and 4 and up to 256 aren't packed"):
        PlanCache(model.config, replace(plan, packing=replace(PACKING, first_flush=256)))
    writer = PlanWriter(plan, Source("hip"))
    writer.topk(1, 0, TopK(64, "sea"))
    with pytest.raises(InputError, match=r"from all keys, and keys are packed \(topk by hip, kv by zipcache\)"):
        writer.finish()


SHORT: dict[str, Any] = {
    "sparse": {
        "k": 64, "sink": 16, "window": 64, "dense_layers": 1, "gate": 150, "measure_tokens": 0, "copying_heads": 0.3,
    },
    "kv": {"first_flush": 32, "flush": 16, "window_min": 16, "copying_heads": 0.3},
}  # fmt: skip


@torch.no_grad()
def test_an_artifact_of_both(tmp_path: Path) -> None:
    llama = save_tiny("llama", tmp_path / "llama")
    run(str(llama), {"name": "test", **SHORT}, out=tmp_path / "both")
    found = read_plan(tmp_path / "both")
    heads = [head for layer in found.layers[1:] for head in layer.heads]
    assert all(head.kv is not None for head in heads)
    assert {head.topk is None for head in heads} == {True, False}
    model, _ = compress.load(tmp_path / "both")
    ids = torch.randint(5, 90, (1, 300), generator=torch.Generator().manual_seed(0))
    assert model.generate(ids, max_new_tokens=5, do_sample=False).shape == (1, 305)


@pytest.mark.parametrize("first", ["sparse", "kv"])
def test_one_is_added_to_the_other(first: str, tmp_path: Path) -> None:
    llama, then = save_tiny("llama", tmp_path / "llama"), "kv" if first == "sparse" else "sparse"
    run(str(llama), {"name": "a", first: SHORT[first]}, out=tmp_path / "one")
    run(str(tmp_path / "one"), {"name": "b", then: SHORT[then]}, out=tmp_path / "two")
    found = read_plan(tmp_path / "two")
    assert set(found.writers) == {"topk", "kv"}
    assert any(head.topk and head.kv for layer in found.layers for head in layer.heads)
    narrow = {"kv": {}} if first == "sparse" else {"sparse": {**SHORT["sparse"], "window": 64, "sink": 1}}
    with pytest.raises(InputError, match="is less than what the packed cache keeps apart"):
        run(str(tmp_path / "one"), {"name": "b", **narrow}, out=tmp_path / "three")
