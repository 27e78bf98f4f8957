"""Sharing beside everything else: quantized weights, streaming heads, packed caches, searches; times; the server."""

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from compress.evalsuite.report import render
from models import save_tiny

from compress.families import FAMILIES
from compress.kv.attention import NAME as PLANNED
from compress.pipeline import RunResult, run
from compress.plan import read_plan
from compress.runtime import load
from compress.runtime.plan_cache import PlanCache
from compress.share import sharing, timing
from compress.share.timing import decode_times
from compress.share.trial import Trial

WORDS = ("one", "two", "three", "four", "five", "a", "the", "and", "of", "to", "in", "that", "it", "was")
OTHERS: dict[str, dict[str, Any]] = {
    "weights": {"weights": {"method": "rtn", "group_size": 8}},
    "heads": {"heads": {"lengths": [384], "items": 1, "sink": 16, "recent": 64, "budget_tokens": 500, "score": "echo"}},
    "kv": {"kv": {"first_flush": 32, "flush": 16, "window_min": 16, "copying_heads": 0.0}},
    "sparse": {
        "sparse": {
            "k": 64,
            "sink": 16,
            "window": 64,
            "dense_layers": 0,
            "measure_tokens": 0,
            "gate": 150,
            "copying_heads": 0.0,
        }
    },
}
OTHERS["all"] = {**OTHERS["weights"], **OTHERS["heads"], **OTHERS["kv"]}


@pytest.fixture(autouse=True, scope="module")
def _quickly() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.report_page.render", lambda report, title: "")
        patch.setattr(sharing, "WINDOWS", 2)
        patch.setattr(timing, "TURNS", 2)
        yield


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("deep") / "deep", num_hidden_layers=6)


def made(model: Path, out: Path, more: dict[str, Any] | None = None, **share: Any) -> RunResult:
    text = out.parent / "text.txt"
    text.write_text(" ".join(Random(0).choices(WORDS, k=2000)))
    section = {"check_windows": 2, "protect": 0.0, "pairs": [[3, 2]], **share}
    calibration = {"samples": 6, "seq_len": 144, "source": str(text)}
    return run(str(model), {"name": "test", "calibration": calibration, "share": section, **(more or {})}, out=out)


@pytest.fixture(scope="module")
def alone(deep: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return made(deep, tmp_path_factory.mktemp("alone") / "out")


@torch.no_grad()
@pytest.mark.parametrize("other", OTHERS)
def test_sharing_goes_first_and_the_others_leave_its_layers_alone(deep: Path, tmp_path: Path, other: str) -> None:
    out = made(deep, tmp_path / "out", OTHERS[other]).out
    found = read_plan(out)
    assert [index for index, layer in enumerate(found.layers) if layer.share] == [3]
    for index in (2, 3):
        assert all(head.kind == "full" and head.kv is None and head.topk is None for head in found.layers[index].heads)
    rest = [head for index, layer in enumerate(found.layers) if index not in (2, 3) for head in layer.heads]
    if other in ("heads", "all"):
        assert any(head.kind == "stream" for head in rest)
    if other in ("kv", "all"):
        assert any(head.kv is not None for head in rest)
    if other == "sparse":
        assert all(head.topk is not None for head in rest)
    model, _ = load(out)
    ids = torch.randint(5, 90, (1, 260), generator=torch.Generator().manual_seed(0))
    cache = PlanCache(model.config, model.attention_plan)
    whole = model(ids, past_key_values=PlanCache(model.config, model.attention_plan)).logits[:, -1]
    model(ids[:, :-1], past_key_values=cache)
    step = model(ids[:, -1:], past_key_values=cache).logits[:, -1]
    if other in ("weights", "heads"):  # what packs and searches treats a prompt otherwise than a new token
        torch.testing.assert_close(step, whole, atol=2e-4, rtol=2e-3)
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 264)
    if other in ("weights", "all"):
        assert not hasattr(model.base_model.layers[3].get_submodule(FAMILIES["llama"].attention), "q_proj")


def test_what_is_saved_is_measured_and_told(alone: RunResult) -> None:
    told = alone.report["share"]
    decode = told["decode"]
    assert decode["tokens"] == 144
    assert decode["dense_ms"] > 0
    assert decode["shared_ms"] > 0
    assert 1 - decode["shared_bytes"] / decode["dense_bytes"] == pytest.approx(told["cache_share"], abs=0.02)
    assert f"a token in {decode['shared_ms']:.1f} ms instead of {decode['dense_ms']:.1f}" in told["summary"]
    page = render(alone.report, "out")
    assert f"{decode['dense_ms']:.1f} ms" in page
    assert f"{told['dropped_parameters']:,} weights" in page


def test_timing_leaves_the_model_dense(deep: Path) -> None:
    from compress.plan import Share

    model, _ = load(deep)
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        before = model(ids).logits
    trial, was = Trial(model), model.config._attn_implementation
    found = decode_times(trial, {3: Share("attn", 2), 5: Share("kv", 4)}, {}, 64)
    assert found["shared_bytes"] < found["dense_bytes"]
    assert model.config._attn_implementation == was != PLANNED
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
