"""Heads that search by SEA's estimators, through a whole model, its cache and its artifact."""

import json
import shutil
from collections.abc import Sequence
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
from compress.events import StepDone
from compress.fingerprint import fingerprint_of
from compress.kv.attention import NAME
from compress.kv.searched import SearchedPart
from compress.pipeline import plan as planned_run
from compress.pipeline import run
from compress.plan import AttentionPlan, Search, Source, TopK, read_plan
from compress.plan_writer import PlanWriter
from compress.recipe import Recipe
from compress.runtime.plan_cache import PlanCache
from compress.sparse.finder import finder
from compress.sparse.sea import LOOKED_AT, Estimator, Shape
from compress.sparse.sea_file import FILE, Header, Learned
from compress.sparse.sea_fit import shape_of
from compress.sparse.sea_page import sea_page
from compress.taken_over import taken_over

SEARCH = Search(sink=4, window=64, block_q=16, block_k=8, refresh=(8, 4, 3), gate=0)
LENGTH = 260


def random_learned(config: Any, shape: Shape, heads: dict[int, tuple[int, ...]]) -> Learned:
    """Estimators as they are drawn, which guess something different for every head and row."""
    tensors = {}
    for layer, own in heads.items():
        generator = torch.Generator().manual_seed(layer)
        for name, tensor in Estimator(shape.of(len(own)), layer).state_dict().items():
            tensors[f"layers.{layer}.{name}"] = tensor + 0.3 * torch.randn(tensor.shape, generator=generator)
    return Learned(Header(fingerprint_of(config), shape, heads, {}), tensors)


def planned(k: int = 64, heads: Sequence[int] | None = None, length: int = 1024) -> tuple[PreTrainedModel, Any]:
    """A model and a plan whose layers from the second on search."""
    model = build_model("llama", max_position_embeddings=1024)
    model.set_attn_implementation(NAME)
    writer = PlanWriter(AttentionPlan.empty(model.config), Source("sea"))
    writer.search(SEARCH)
    chosen = {}
    for layer in range(1, model.config.num_hidden_layers):
        chosen[layer] = tuple(range(model.config.num_key_value_heads) if heads is None else heads)
        for head in chosen[layer]:
            writer.topk(layer, head, TopK(k=k, policy="sea"))
    learned = random_learned(model.config, shape_of(model, length, width=32), chosen)
    return model, replace(writer.finish(), estimators=learned)


def cached(model: PreTrainedModel, plan: AttentionPlan, gate: int = 0) -> PlanCache:
    """A cache whose parts search beyond ``gate`` tokens, however few they attend."""
    cache = PlanCache(model.config, plan)
    for part in parts(cache):
        part.finder = replace(part.finder, gate=gate)  # type: ignore[type-var]
    return cache


def parts(cache: PlanCache) -> list[SearchedPart]:
    found = [cluster.part for layer in cache.layers[1:] for cluster in layer.clusters]
    return [part for part in found if isinstance(part, SearchedPart)]


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(5, 90, shape, generator=torch.Generator().manual_seed(seed))


def written(model: PreTrainedModel, cache: PlanCache, count: int, seed: int = 0) -> Tensor:
    """Logits of so many tokens, one by one."""
    ids = tokens(1, count, seed=seed + 50)
    return torch.cat([model(ids[:, n : n + 1], past_key_values=cache).logits for n in range(count)], 1)


@torch.no_grad()
def test_a_list_of_everything_is_dense_attention() -> None:
    model, plan = planned(k=1024)
    ids = tokens(1, LENGTH)
    expected = model(ids).logits
    cache = cached(model, plan)
    got = [model(ids[:, part], past_key_values=cache).logits for part in (slice(0, 170), slice(170, 231))]
    got += [model(ids[:, n : n + 1], past_key_values=cache).logits for n in range(231, LENGTH)]
    torch.testing.assert_close(torch.cat(got, 1), expected, atol=2e-5, rtol=2e-4)


@torch.no_grad()
def test_short_lists_leave_something_out() -> None:
    model, plan = planned()
    ids = tokens(1, LENGTH)
    got = model(ids, past_key_values=cached(model, plan)).logits
    assert not torch.allclose(got[:, -1], model(ids).logits[:, -1], atol=1e-4)


@torch.no_grad()
def test_padding_changes_nothing() -> None:
    model, plan = planned()
    ids = tokens(1, LENGTH)
    alone = cached(model, plan)
    own = [model(ids, past_key_values=alone).logits[:, -1]]
    own += [model(tokens(1, 1, seed=n), past_key_values=alone).logits[:, -1] for n in range(12)]
    batch = torch.cat([torch.cat([torch.zeros(1, 33, dtype=torch.int64), ids], 1), tokens(1, LENGTH + 33, seed=7)])
    mask = torch.ones_like(batch)
    mask[0, :33] = 0
    both = cached(model, plan)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    found = [model(batch, attention_mask=mask, position_ids=places, past_key_values=both).logits[:1, -1]]
    for n in range(12):
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], 1)
        step, places = tokens(1, 1, seed=n).expand(2, 1), (mask.cumsum(1) - 1)[:, -1:]
        found.append(model(step, attention_mask=mask, position_ids=places, past_key_values=both).logits[:1, -1])
    torch.testing.assert_close(torch.stack(found), torch.stack(own), atol=2e-5, rtol=2e-4)


@torch.no_grad()
def test_lists_do_not_depend_on_how_the_text_came() -> None:
    """At once, as two chunks, or token by token across the gate: the lists of the tokens behind it are the same."""
    model, plan = planned()
    ids, lists = tokens(1, LENGTH), []
    singly = (LENGTH - 20, *range(LENGTH - 19, LENGTH + 1))
    for gate, cuts in ((0, (LENGTH,)), (0, (150, LENGTH)), (LENGTH - 15, singly)):
        cache, first = cached(model, plan, gate), 0
        for cut in cuts:
            model(ids[:, first:cut], past_key_values=cache)
            first = cut
        (part, *_), new = parts(cache), tokens(1, 1, seed=3)
        part.finder = replace(part.finder, gate=0)
        cache.reorder_cache(torch.tensor([0]))  # what was found is forgotten, queries aren't
        model(new, past_key_values=cache)  # the first layer that searches has the same keys, however the text came
        assert part.counts.tolist() == [LENGTH + 1]
        lists.append(part._found.blocks.starts[..., : int(part._found.blocks.counts.max())])
    assert torch.equal(lists[0], lists[1])
    assert torch.equal(lists[0], lists[2])


@torch.no_grad()
def test_a_kept_state_finds_what_a_fresh_one_finds() -> None:
    model, plan = planned()
    cache = cached(model, plan)
    model(tokens(1, LENGTH), past_key_values=cache)
    part = parts(cache)[0]
    for n in range(7):
        before = part._queries
        model(tokens(1, 1, seed=n), past_key_values=cache)
    assert part._found.state.step == 0  # tokens 0, 3 and 6 have lists of their own
    known = torch.cat([before, part._queries[:, :, -1:]], 2)
    held, ends = (part.near.keys, part.near.values), torch.tensor([LENGTH + 7])
    fresh = part.finder.token(known, *held, ends, None)
    assert torch.equal(fresh.blocks.counts, part._found.blocks.counts)
    assert torch.equal(fresh.blocks.starts, part._found.blocks.starts)
    for ours, theirs in zip(fresh.state.rows.parts(), part._found.state.rows.parts(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_list_the_window_and_the_sinks_show_no_token_twice_and_lose_none_between() -> None:
    model, plan = planned()
    cache = cached(model, plan)
    model(tokens(1, LENGTH), past_key_values=cache)
    written(model, cache, 1)
    part = parts(cache)[0]
    found = part._found
    assert found.near.item() <= LENGTH + 1 - SEARCH.window
    ends = found.blocks.starts + found.blocks.block_k
    listed = torch.arange(found.blocks.most) < found.blocks.counts[..., None]
    assert int(ends[listed].max()) <= found.near.item()
    assert int(found.blocks.starts[listed].min()) >= SEARCH.sink
    blocks = part.finder.prompt(*_read(part, LENGTH + 1), LENGTH + 1)
    seen = blocks.visible(LENGTH + 1, LENGTH + 1)
    assert not seen.triu(1).any()
    assert seen[..., : SEARCH.sink].tril().sum() == torch.ones(LENGTH + 1, SEARCH.sink).tril().sum() * len(seen[0])


def _read(part: SearchedPart, length: int) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(1, 6, length, 16, generator=torch.Generator().manual_seed(3))
    return q, part.near.keys[:, :, :length], part.near.values[:, :, :length]


@torch.no_grad()
def test_behind_a_crop_everything_is_attended_until_queries_are_known() -> None:
    model, plan = planned()
    ids, cache = tokens(1, LENGTH), cached(model, plan)
    model(ids, past_key_values=cache)
    cache.crop(-5)
    part = parts(cache)[0]
    assert part._queries is None
    for n in range(LOOKED_AT):
        model(tokens(1, 1, seed=n), past_key_values=cache)
        assert part._found is None
    model(tokens(1, 1), past_key_values=cache)
    assert part._found is not None


@torch.no_grad()
def test_reordered_sequences_take_their_queries_along() -> None:
    model, plan = planned()
    cache = cached(model, plan)
    model(tokens(2, LENGTH), past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 1]))
    same = model(tokens(1, 1, seed=9).expand(2, 1), past_key_values=cache).logits
    torch.testing.assert_close(same[0], same[1])
    assert parts(cache)[0]._found is not None
    total = cache.nbytes()
    assert total.allocated > total.stored == total.payload


@torch.no_grad()
def test_beyond_the_estimators_length_everything_is_attended() -> None:
    model, plan = planned(length=LENGTH - 10)
    ids = tokens(1, LENGTH)
    torch.testing.assert_close(
        model(ids, past_key_values=cached(model, plan)).logits, model(ids).logits, atol=2e-5, rtol=2e-4
    )


@torch.no_grad()
def test_estimators_of_some_heads_leave_the_others_dense() -> None:
    model, plan = planned(k=1024, heads=(1,))
    ids = tokens(1, LENGTH)
    got = model(ids, past_key_values=cached(model, plan)).logits
    torch.testing.assert_close(got, model(ids).logits, atol=2e-5, rtol=2e-4)


@torch.no_grad()
def test_layers_take_the_lists_of_another() -> None:
    from compress.plan import Share

    model, plan = planned()
    learned: Learned = plan.estimators
    heads = {1: learned.header.heads[1]}
    layers = list(plan.layers)
    layers[2] = replace(layers[2], share=Share("mask", 1))
    sharing = replace(
        plan, layers=tuple(layers), estimators=replace(learned, header=replace(learned.header, heads=heads))
    )
    cache = cached(model, sharing)
    model(tokens(1, LENGTH), past_key_values=cache)
    written(model, cache, 2)
    first, second = parts(cache)[:2]
    assert second._found.blocks is first._found.blocks


def test_a_plan_without_its_estimators_is_refused() -> None:
    model, plan = planned()
    with pytest.raises(InputError, match=r"sea.safetensors beside it wasn't read"):
        PlanCache(model.config, replace(plan, estimators=None))
    fewer = replace(plan.estimators, header=replace(plan.estimators.header, heads={1: (0,)}))
    with pytest.raises(InputError, match=r"layer 1 has estimators of KV heads \[0\], and \[0, 1\] search"):
        PlanCache(model.config, replace(plan, estimators=fewer))


def test_a_state_is_resumed_from_keys_values_and_few_queries() -> None:
    shape = Shape(heads=4, kv_heads=2, head_dim=8, length=320, width=16, divisor=1)
    estimator, generator = Estimator(shape).requires_grad_(False), torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 90, 8, generator=generator) for heads in (4, 2, 2))
    whole = estimator(q, k, v).state
    for known in (LOOKED_AT, 20, 90):
        for ours, theirs in zip(estimator.resumed(q[:, :, -known:], k, v).parts(), whole.parts(), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="7 queries of 90 tokens"):
        estimator.resumed(q[:, :, -7:], k, v)


def test_stretched_positions_are_those_of_a_longer_text() -> None:
    shape = Shape(heads=4, kv_heads=2, head_dim=8, length=181, width=16, divisor=1)
    estimator, generator = Estimator(shape).requires_grad_(False), torch.Generator().manual_seed(0)
    assert torch.equal(estimator._positions(torch.arange(4)[None] * 2.0), estimator.positions[None, 0:8:2])
    q, k, v = (torch.randn(1, heads, 91, 8, generator=generator) for heads in (4, 2, 2))
    assert not torch.allclose(estimator(q, k, v, stretch=2.0).logits, estimator(q, k, v).logits, atol=1e-3)
    with pytest.raises(ValueError, match="at most 181 tokens"):
        estimator(q, k, v, stretch=2.1)


# The run

SHORT: dict[str, Any] = {
    "method": "sea", "k": 64, "sink": 16, "window": 64, "dense_layers": 1, "gate": 200, "measure_tokens": 384,
    "copying_heads": 0.0, "sea_steps": 6, "sea_width": 32, "sea_held_out": 1,
}  # fmt: skip


def recipe(**sparse: Any) -> dict[str, Any]:
    text = {"source": "pydoc", "samples": 3, "seq_len": 64}
    return {"name": "test", "calibration": text, "sparse": {**SHORT, **sparse}}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def artifact(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sea") / "out"
    run(str(llama), recipe(copying_heads=0.2), out=out)
    return out


def test_the_artifact_has_its_estimators_and_shows_them(artifact: Path) -> None:
    report = json.loads((artifact / "report.json").read_text())["sparse"]
    searching = [
        [number for number, head in enumerate(layer.heads) if head.topk is not None]
        for layer in read_plan(artifact).layers
    ]
    fitted = {found["layer"]: found["heads"] for found in report["estimators"]}
    assert fitted == {layer: heads for layer, heads in enumerate(searching) if heads}
    assert sum(map(len, searching)) == report["heads"] < 2 * (len(searching) - 1)
    assert all(found["after"] <= found["before"] and found["grid"] <= found["before"] for found in report["estimators"])
    assert [own["layer"] for own in report["layers"]] == list(fitted)
    page = (artifact / "estimated_attention.html").read_text()
    assert page.count("<svg") >= 2
    assert "nats a row" in page


@torch.no_grad()
def test_the_artifact_searches_by_its_estimators(artifact: Path, llama: Path) -> None:
    model, _ = compress.load(artifact)
    dense, _ = compress.load(llama)
    ids = tokens(1, 420)
    learned: Learned = model.attention_plan.estimators
    assert learned.layers == tuple(model.attention_plan.estimators.header.heads)
    got, expected = model(ids).logits, dense(ids).logits
    torch.testing.assert_close(got[:, :60], expected[:, :60], atol=2e-5, rtol=2e-4)  # sink and window
    assert not torch.allclose(got[:, -1], expected[:, -1], atol=1e-4)
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 424)
    topk = TopK(64, "sea")
    policy = finder(topk, replace(model.attention_plan.search, gate=0), 0, learned.estimator(learned.layers[0]))
    assert policy.earlier >= LOOKED_AT


def test_an_artifact_without_its_file_is_damaged(artifact: Path, tmp_path: Path) -> None:
    shutil.copytree(artifact, tmp_path / "copy")
    (tmp_path / "copy" / FILE).unlink()
    with pytest.raises(InputError, match=r"sea\.safetensors"):
        compress.load(tmp_path / "copy")


def test_estimators_are_taken_over_with_the_plan(artifact: Path) -> None:
    model, _ = compress.load(artifact)
    kept = taken_over(artifact, Recipe.load({"act": {}}), model.config)
    assert kept.plan is not None
    assert kept.plan.estimators.layers == model.attention_plan.estimators.layers
    assert artifact / FILE in kept.files
    replaced = taken_over(artifact, Recipe.load({"sparse": SHORT | {"method": "hip"}}), model.config)
    assert replaced.plan is None
    assert not replaced.files


def test_an_interrupted_fit_goes_on_where_it_was(llama: Path, artifact: Path, tmp_path: Path) -> None:
    steps: list[StepDone] = []

    def stop(event: Any) -> None:
        if isinstance(event, StepDone):
            steps.append(event)
            if len(steps) == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(str(llama), recipe(copying_heads=0.2), out=tmp_path / "out", on_event=stop)
    run(str(llama), recipe(copying_heads=0.2), out=tmp_path / "out", on_event=stop)
    assert [step.index for step in steps] == [0, 1]
    ours, theirs = (Learned.load(path / FILE, compress.load(path)[0].config) for path in (tmp_path / "out", artifact))
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert all(torch.equal(ours.tensors[name], theirs.tensors[name]) for name in ours.tensors)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"calibration": {"source": "pydoc", "samples": 1, "seq_len": 64}}, r"calibration\.samples=1.*more than 1"),
        ({"calibration": {"source": "pydoc", "samples": 3, "seq_len": 9000}}, r"calibration\.seq_len=9000.*at most"),
        ({"calibration": None}, "no section 'calibration'"),
        ({"kv": {}}, "packs them"),
    ],
)
def test_what_cannot_be_is_refused(llama: Path, changed: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        planned_run(str(llama), {key: value for key, value in (recipe() | changed).items() if value is not None})


def test_the_page_tells_how_good_estimators_are(artifact: Path) -> None:
    model, _ = compress.load(artifact)
    page = sea_page(model.attention_plan.estimators, [], 64)
    assert "KL divergence, nats a row, on held-out text" in page
    assert "mean map" in page
