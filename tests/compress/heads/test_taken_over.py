"""Streaming heads and KV bits on an artifact that has a plan already, and a budget of bits beside streaming heads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compress.calibrate.errors import InputError
from models import save_tiny
from runs import Log

from compress.events import Message
from compress.kv import copying
from compress.kv import stage as kv_stage
from compress.pipeline import RunResult, plan, run
from compress.plan import AttentionPlan, read_plan
from compress.plan_compile import predict_bytes
from compress.runtime import load

HEADS: dict[str, Any] = {
    "score": "echo", "lengths": [384], "items": 1, "sink": 16, "recent": 64, "budget_tokens": 1024,
}  # fmt: skip
KV: dict[str, Any] = {"first_flush": 16, "flush": 8, "window_min": 4, "sinks": 2}
SPARSE: dict[str, Any] = {"sink": 16, "window": 64, "k": 64, "dense_layers": 0, "measure_tokens": 256}

pytestmark = pytest.mark.usefixtures("_no_page")


def made(model: Path, out: Path, log: Log | None = None, **sections: Any) -> RunResult:
    return run(str(model), {"name": "test", **sections}, out=out, on_event=log)


def planned(out: Path) -> AttentionPlan:
    found = read_plan(out)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("model") / "model", max_position_embeddings=2048)


@pytest.fixture(scope="module", params=["packed", "dense"])
def start(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a plan: its own weights, or packed ones."""
    if request.param == "dense":
        return model
    return made(model, tmp_path_factory.mktemp("w") / "w", weights={"method": "rtn", "group_size": 8}).out


@pytest.fixture(scope="module")
def heads(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(start, tmp_path_factory.mktemp("h") / "h", heads=HEADS).out


@pytest.fixture(scope="module")
def both(start: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """Both sections in one run."""
    return made(start, tmp_path_factory.mktemp("b") / "b", heads=HEADS, kv=KV)


def test_kv_bits_are_added_to_streaming_heads(heads: Path, both: RunResult, tmp_path: Path) -> None:
    """What two runs write is what one run does."""
    log = Log()
    found = made(heads, tmp_path / "out", log, kv=KV)
    one, other = planned(found.out), planned(both.out)
    assert one.layers == other.layers
    assert one.writers == other.writers == {"window": "echo", "kv": "zipcache"}
    assert [source.method for source in one.sources] == ["echo", "zipcache"]
    assert one.scores == other.scores
    assert one.budget == other.budget
    assert found.report["kv"] == both.report["kv"]
    assert found.report["heads"] == json.loads((heads / "report.json").read_text())["heads"]
    assert (found.out / "head_profile.json").read_bytes() == (heads / "head_profile.json").read_bytes()
    assert any("kept is window by echo" in event.text for event in log.of(Message))
    _, tokenizer = load(found.out)
    assert tokenizer is not None


def test_streaming_heads_are_added_to_kv_bits(start: Path, both: RunResult, tmp_path: Path) -> None:
    """The bytes that are told are those behind both; which heads are kept at 4 bits was decided without the windows."""
    made(start, tmp_path / "kv", kv={**KV, "copying_heads": 0.0})
    found = made(tmp_path / "kv", tmp_path / "out", heads=HEADS)
    plan_of = planned(found.out)
    heads = [head for layer in plan_of.layers for head in layer.heads]
    assert all((head.kv is None) == (head.kind == "stream") for head in heads)
    assert {head.kind for head in heads} == {"full", "stream"}
    sizes, config = found.report["kv"]["bytes"]["4096"], load(found.out)[0].config
    assert sizes["allocated"] == predict_bytes(plan_of, config, 4096).allocated
    assert (
        sizes["allocated"]
        < json.loads((tmp_path / "kv" / "report.json").read_text())["kv"]["bytes"]["4096"]["allocated"]
    )
    assert "times smaller" in found.report["kv"]["summary"]


def test_the_same_section_again_replaces_its_part(heads: Path, tmp_path: Path) -> None:
    found = made(heads, tmp_path / "out", heads={**HEADS, "retention": 0.75})
    assert sum(head.kind == "full" for layer in planned(found.out).layers for head in layer.heads) == 4
    assert [source.method for source in planned(found.out).sources] == ["echo"]


def test_new_weights_take_no_plan_along(model: Path, tmp_path: Path) -> None:
    made(model, tmp_path / "h", heads=HEADS)
    log = Log()
    found = made(tmp_path / "h", tmp_path / "out", log, weights={"method": "rtn", "group_size": 8})
    assert read_plan(found.out) is None
    assert any("isn't taken over" in event.text for event in log.of(Message))


@pytest.mark.parametrize(
    ("first", "then", "told"),
    [
        ({"sparse": SPARSE}, {"heads": HEADS}, "searches for far tokens, and the section heads drops them"),
        ({"sparse": SPARSE}, {"kv": {}}, r"sparse\.window=64: is less than what the packed cache keeps apart"),
        ({"kv": KV}, {"sparse": {**SPARSE, "sink": 1}}, r"sparse\.sink=1: is less than what the packed cache keeps"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_measured(
    model: Path, tmp_path: Path, first: dict[str, Any], then: dict[str, Any], told: str
) -> None:
    made(model, tmp_path / "first", **first)
    with pytest.raises(InputError, match=told):
        plan(str(tmp_path / "first"), {"name": "test", **then})


def test_a_plan_of_another_model_is_refused_with_both_fingerprints(heads: Path, tmp_path: Path) -> None:
    other = save_tiny("qwen3", tmp_path / "other")
    (other / "attention_plan.json").write_text((heads / "attention_plan.json").read_text())
    with pytest.raises(InputError, match="another model") as caught:
        plan(str(other), {"name": "test", "kv": KV})
    assert str(caught.value).count(" KV heads of ") == 2


# A budget of bits beside streaming heads


def test_a_budget_of_bits_counts_what_streaming_heads_save(
    model: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A budget that all heads together couldn't meet at 2 bits; windows at 16 bits are a part of it."""
    calibration = {"source": str(text), "samples": 2, "seq_len": 128}
    kv = {**KV, "budget": 7.0, "budget_tokens": 2000, "copying_heads": 0.0}
    with pytest.raises(InputError, match=r"kv\.budget=7"):
        plan(str(model), {"name": "test", "calibration": calibration, "kv": kv})
    seen: list[tuple[int, ...]] = []
    layer = kv_stage.Profile.layer

    def look(self: Any, index: int, candidates: Any, heads: Any) -> list[float]:
        seen.append(heads)
        return layer(self, index, candidates, heads)

    monkeypatch.setattr(kv_stage.Profile, "layer", look)
    found = made(model, tmp_path / "out", calibration=calibration, heads=HEADS, kv=kv)
    plan_of = planned(found.out)
    kept = [tuple(n for n, head in enumerate(layer.heads) if head.kind == "full") for layer in plan_of.layers]
    assert seen == kept
    config = load(found.out)[0].config
    dense = predict_bytes(AttentionPlan.empty(config), config, 2000).stored
    assert dense / predict_bytes(plan_of, config, 2000).allocated >= 7.0


def test_a_budget_of_bits_that_windows_exceed_is_told_and_the_nearest_taken(
    model: Path, tmp_path: Path, text: Path
) -> None:
    log = Log()
    calibration = {"source": str(text), "samples": 2, "seq_len": 128}
    kv = {**KV, "budget": 200.0, "budget_tokens": 2000}
    found = made(model, tmp_path / "out", log, calibration=calibration, heads=HEADS, kv=kv)
    (told,) = [event.text for event in log.of(Message) if event.level == "warning"]
    assert "kv.budget=200 can't be met" in told
    bits = {head.kv.low for layer in planned(found.out).layers for head in layer.heads if head.kv is not None}
    assert (2, 2) in bits


def test_heads_that_copy_are_looked_for_among_those_that_are_packed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "copying_scores", lambda *args: torch.arange(6.0).reshape(3, 2))
    found = made(model, tmp_path / "out", heads=HEADS, kv={**KV, "copying_heads": 0.5})
    plan_of = planned(found.out)
    full = [
        [n, k] for n, layer in enumerate(plan_of.layers) for k, head in enumerate(layer.heads) if head.kind == "full"
    ]
    assert found.report["kv"]["copying_heads"] == [max(full)]
