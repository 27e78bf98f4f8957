"""The stage ``heads``: what it refuses and predicts, its artifact, resuming, and KV bits behind it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compress.calibrate.errors import InputError
from models import save_tiny
from runs import InterruptedRunError, Log

import compress.plan as plan_module
from compress.events import Message, StageStarted, StepDone
from compress.heads import profiling
from compress.heads.profile import read_profile
from compress.heads.scores import NAMES
from compress.options import RunOptions
from compress.pipeline import RunResult, plan, run
from compress.plan import AttentionPlan, read_plan
from compress.recipe import Recipe
from compress.schema.heads import BLOCK, ScoreName
from compress.schema.heads import Heads as Section

Tiny = Callable[[str], Path]
SHORT: dict[str, Any] = {"lengths": [384], "items": 1, "sink": 16, "recent": 64, "budget_tokens": 500}
DUO: dict[str, Any] = {"method": "duo", "score": "echo", "prompts": "passkey", "steps": 5, "items": 2}

pytestmark = pytest.mark.usefixtures("_no_page")


def recipe(**heads: Any) -> dict[str, Any]:
    return {"name": "test", "heads": {**SHORT, **heads}}


def refusal(model: Path, **heads: Any) -> str:
    with pytest.raises(InputError) as caught:
        plan(str(model), recipe(**heads))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def compressed(
    model: Path, out: Path, log: Log | None = None, more: dict[str, Any] | None = None, **heads: Any
) -> RunResult:
    return run(str(model), {**recipe(**heads), **(more or {})}, out=out, on_event=log)


def kept(found: AttentionPlan) -> list[tuple[int, int]]:
    return [(n, k) for n, layer in enumerate(found.layers) for k, head in enumerate(layer.heads) if head.kind == "full"]


# What is known before


def test_every_score_of_the_section_is_one_that_can_be_taken() -> None:
    assert set(ScoreName.__args__) == {*NAMES, "blend", "influence", "gauss_newton"}


def test_windows_of_the_section_are_blocks_of_the_plan() -> None:
    assert plan_module.BLOCK == BLOCK


def test_a_model_of_sliding_layers_is_refused(tiny: Tiny) -> None:
    assert "sliding window" in refusal(tiny("mistral"))


def test_sliding_layers_beside_others_are_told(tiny: Tiny) -> None:
    lines = plan(str(tiny("qwen2")), recipe()).lines()
    assert any("2 layers have sliding windows" in line for line in lines)
    assert any("of 2 KV heads keep every token" in line for line in lines)


@pytest.mark.parametrize(("key", "value"), [("budget_tokens", 600), ("lengths", [384, 600])])
def test_lengths_beyond_the_model_are_refused(tiny: Tiny, key: str, value: Any) -> None:
    text = refusal(tiny("llama"), **{key: value})
    assert f"heads.{key}" in text
    assert "at most 512" in text


def test_a_budget_below_what_sinks_and_windows_take_names_the_nearest(tiny: Tiny) -> None:
    text = refusal(tiny("llama"), retention=0.1)
    assert "16.0%" in text  # 80 of 500 tokens
    assert "from 0.16" in text
    assert plan(str(tiny("llama")), recipe(retention=0.16)).estimates["heads"].facts["full_heads"] == 0


def test_prompts_that_no_window_cuts_are_refused(tiny: Tiny) -> None:
    assert "heads can't be told apart" in refusal(tiny("llama"), lengths=[80])


def test_windows_that_hold_the_whole_budget_are_refused(tiny: Tiny) -> None:
    assert "heads.recent" in refusal(tiny("llama"), budget_tokens=80)


def test_unknown_scores_name_the_nearest(tiny: Tiny) -> None:
    text = refusal(tiny("llama"), score="retreival")
    assert "did you mean 'retrieval'?" in text
    assert "heads.score" in text


def test_a_window_of_part_of_a_block_is_refused(tiny: Tiny) -> None:
    assert "multiples of 64" in refusal(tiny("llama"), recent=100)


def test_the_plan_tells_the_bytes(tiny: Tiny) -> None:
    found = plan(str(tiny("llama")), recipe())
    (line,) = [line for line in found.lines() if "2,048 tokens" in line]
    assert all(f"{length} tokens" in line for length in ("4,096", "8,192"))
    facts = found.to_json()["stages"]["heads"]
    each = 4 * 16
    assert facts["full_heads"] == 2
    assert facts["bytes"]["4096"]["dense"] == 6 * 4096 * each
    assert facts["bytes"]["4096"]["stored"] == (2 * 4096 + 4 * 80) * each


# Runs


@pytest.fixture(scope="module")
def looking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose heads differ in how far they look: the queries of some are small."""
    folder = tmp_path_factory.mktemp("heads") / "model"
    return save_tiny("llama", folder, num_attention_heads=6, num_key_value_heads=2)


def test_the_heads_with_the_highest_scores_keep_everything(looking: Path, tmp_path: Path) -> None:
    log = Log()
    found = compressed(looking, tmp_path / "out", log, score="echo")
    plan_of, profile = read_plan(tmp_path / "out"), read_profile(tmp_path / "out")
    assert plan_of is not None
    best = [(layer, head) for layer, head, _ in profile.ranking("echo")[:2]]
    assert sorted(kept(plan_of)) == sorted(best)
    assert plan_of.scores == {"echo": profile.scores["echo"]}
    assert plan_of.sources[0].method == "echo"
    assert plan_of.sources[0].dataset_hash == profile.items == found.report["heads"]["prompts"]
    assert plan_of.budget == {"metric": "kv_bytes", "retention": 0.5, "tokens": 500}
    section = found.report["heads"]
    assert section["retention"] == section["bytes"]["500"]["stored"] / section["bytes"]["500"]["dense"] == 0.44
    assert sum(row["full"] for row in section["layers"]) == 2
    assert "head_profile.json" in found.report["artifact"]["files"]
    assert any(line.startswith("heads") and "2 full, 4 streaming" in line for line in found.summary)
    assert json.loads(json.dumps(section)) == section


@pytest.mark.parametrize("score", ["gauss_newton", "influence", "blend"])
def test_a_score_by_prompts_goes_on_behind_the_last_prompt(looking: Path, tmp_path: Path, score: str) -> None:
    heads = {"score": score, "prompts": "passkey", "items": 3}
    compressed(looking, tmp_path / "whole", **heads)
    with pytest.raises(InterruptedRunError):
        compressed(looking, tmp_path / "cut", Log(stop=lambda event: isinstance(event, StepDone)), **heads)
    again = Log()
    compressed(looking, tmp_path / "cut", again, **heads)
    assert [event.index for event in again.of(StepDone)] == [1, 2]
    one, other = (read_profile(tmp_path / name) for name in ("whole", "cut"))
    assert one.scores == other.scores
    assert min(map(min, one.scores[score])) > 0


def test_the_default_profiles_both_kinds_of_prompts(looking: Path, tmp_path: Path) -> None:
    log = Log()
    found = compressed(looking, tmp_path / "out", log)
    assert len(log.of(StepDone)) == 2
    (started,) = [event for event in log.of(StageStarted) if event.name == "heads"]
    assert (started.total, started.unit) == (2, "prompts")
    assert found.report["heads"]["summary"].startswith("blend: KV heads 2 full, 4 streaming")
    plan_of, profile = read_plan(tmp_path / "out"), read_profile(tmp_path / "out")
    assert plan_of is not None
    assert sorted(kept(plan_of)) == sorted((layer, head) for layer, head, _ in profile.ranking("blend")[:2])


def test_spans_keep_to_the_budget(looking: Path, tmp_path: Path) -> None:
    found = compressed(looking, tmp_path / "out", method="moa", lengths=[320, 448], prompts="passkey")
    assert found.report["heads"]["retention"] <= 0.5
    assert found.summary[2].startswith("heads    moa: KV heads")
    plan_of = read_plan(tmp_path / "out")
    assert plan_of is not None
    assert [source.method for source in plan_of.sources] == ["moa"]


def test_gates_go_on_where_they_were(looking: Path, tmp_path: Path) -> None:
    whole = compressed(looking, tmp_path / "whole", **DUO)
    log = Log(stop=lambda event: isinstance(event, StepDone) and event.index == 2)
    with pytest.raises(InterruptedRunError):
        compressed(looking, tmp_path / "cut", log, **DUO)
    again = Log()
    found = compressed(looking, tmp_path / "cut", again, **DUO)
    assert [event.index for event in again.of(StepDone)] == [3, 4]
    one, other = (read_profile(tmp_path / name) for name in ("whole", "cut"))
    assert one.scores == other.scores
    assert list(one.scores) == ["echo", "gates"]
    assert one.items == other.items
    assert one.items == read_plan(tmp_path / "cut").sources[0].dataset_hash
    assert found.report["heads"]["losses"] == whole.report["heads"]["losses"]
    assert len(found.report["heads"]["losses"]) == 5
    assert found.report["heads"]["target"] == pytest.approx(2 / 6)
    assert read_plan(tmp_path / "whole") == read_plan(tmp_path / "cut")


def test_what_is_measured_is_not_measured_again(looking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was stopped behind the stage doesn't even load the model for it."""
    log = Log(stop=lambda event: event == StageStarted("artifact"))
    with pytest.raises(InterruptedRunError):
        compressed(looking, tmp_path / "out", log, **DUO)
    monkeypatch.setattr(profiling.Subject, "model", property(lambda _: pytest.fail("the model is loaded")))
    compressed(looking, tmp_path / "out", **DUO)
    assert list(read_profile(tmp_path / "out").scores) == ["echo", "gates"]


def test_heads_of_an_artifact_are_profiled_and_its_weights_taken_over(tiny: Tiny, tmp_path: Path) -> None:
    options = RunOptions(set=("eval=null", "weights.group_size=8"))
    run(str(tiny("llama")), "rtn", out=tmp_path / "rtn", options=options)
    found = compressed(tmp_path / "rtn", tmp_path / "out", score="echo")
    before, after = (tmp_path / name / "model.safetensors" for name in ("rtn", "out"))
    assert before.read_bytes() == after.read_bytes()
    dense = compressed(tiny("llama"), tmp_path / "dense", score="echo")
    assert dense.report["heads"]["summary"] == found.report["heads"]["summary"]
    one, other = (read_profile(tmp_path / name).scores["echo"] for name in ("out", "dense"))
    assert one != other  # of the weights as they are stored


def test_weights_heads_and_kv_bits_in_one_run(tmp_path: Path) -> None:
    """Heads are profiled behind the weights; KV bits go to the heads that keep many tokens."""
    model = save_tiny("llama", tmp_path / "model", max_position_embeddings=2048)
    more = {
        "weights": {"method": "rtn", "group_size": 8},
        "kv": {"first_flush": 16, "flush": 8, "window_min": 4, "sinks": 2},
    }
    log = Log()
    found = compressed(model, tmp_path / "out", log, more, score="echo", budget_tokens=1024)
    plan_of = read_plan(tmp_path / "out")
    assert plan_of is not None
    assert [source.method for source in plan_of.sources] == ["echo", "zipcache"]
    packed = [(n, k) for n, layer in enumerate(plan_of.layers) for k, head in enumerate(layer.heads) if head.kv]
    assert packed == kept(plan_of)
    assert len(packed) == 2
    sizes = found.report["kv"]["bytes"]["4096"]
    assert sizes["stored"] < found.report["heads"]["bytes"]["4096"]["stored"] < sizes["dense"]


def test_equal_scores_are_told(looking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "score", lambda name, model, tokenizer, settings: torch.ones(3, 2))
    log = Log()
    compressed(looking, tmp_path / "out", log, score="echo")
    (told,) = [event for event in log.of(Message) if event.level == "warning"]
    assert "equal" in told.text


def test_a_section_has_the_defaults_of_its_recipe() -> None:
    assert Recipe.load({"heads": {}}).heads == Section()
