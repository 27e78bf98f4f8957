"""The stage ``share``: what it refuses and predicts, its artifact and report, and going on with it."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from compress.calibrate.errors import InputError
from compress.evalsuite.report import render
from models import save_tiny
from runs import InterruptedRunError, Log
from share_cases import TWIN

from compress.events import Message, StepDone
from compress.options import RunOptions
from compress.pipeline import RunResult, plan, run
from compress.plan import Share, read_plan
from compress.recipe import Recipe
from compress.runtime import load
from compress.schema import Sharing
from compress.share import sharing, stage
from compress.share.distill_settings import Distillation

Tiny = Callable[[str], Path]
QUICK = {"check_windows": 2, "search_windows": 4, "protect": 0.0}
SIZES = {"samples": 8, "seq_len": 144}
WORDS = ("one", "two", "three", "four", "five", "a", "the", "and", "of", "to", "in", "that", "it", "was")


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("deep") / "deep", num_hidden_layers=7)


@pytest.fixture(autouse=True, scope="module")
def _quickly() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.report_page.render", lambda report, title: "")
        patch.setattr(sharing, "WINDOWS", 2)
        yield


def recipe(model: Path, **share: Any) -> dict[str, Any]:
    text = model.parent / "text.txt"
    if not text.exists():
        text.write_text(" ".join(Random(0).choices(WORDS, k=2000)))
    return {"name": "test", "calibration": {**SIZES, "source": str(text)}, "share": {**QUICK, **share}}


def refusal(model: Path, sets: tuple[str, ...] = (), **share: Any) -> str:
    with pytest.raises(InputError) as caught:
        plan(str(model), recipe(model, **share), RunOptions(set=sets))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def shared(
    model: Path, out: Path, log: Log | None = None, more: dict[str, Any] | None = None, **share: Any
) -> RunResult:
    return run(str(model), {**recipe(model, **share), **(more or {})}, out=out, on_event=log)


# What is known before


def test_every_setting_of_the_distillation_has_a_key(tmp_path: Path) -> None:
    keys = {name.removeprefix("distill_") for name in Sharing.model_fields if name.startswith("distill_")}
    assert keys <= {field.name for field in fields(Distillation)}
    section = Recipe.load(recipe(tmp_path / "model", distill_steps=3, distill_lr=0.5)).share
    assert section is not None
    made = stage.distillation(section)
    assert isinstance(made, Distillation)
    assert (made.steps, made.lr) == (3, 0.5)


@pytest.mark.parametrize(
    ("pairs", "told"),
    [
        ([[4, 3], [5, 4]], "chain"),
        ([[3, 2], [4, 3]], "chain"),
        ([[2, 4]], "isn't before"),
        ([[4, 2], [4, 3]], "two layers"),
        ([[9, 2]], "layers 0 to 6"),
        ([[1, 0]], "allowed"),
    ],
)
def test_pairs_that_cannot_be_are_refused(deep: Path, pairs: Any, told: str) -> None:
    text = refusal(deep, pairs=pairs)
    assert told in text
    assert "share.pairs" in text


def test_layers_of_different_windows_are_refused(tmp_path: Path) -> None:
    model = save_tiny("qwen2", tmp_path / "model", num_hidden_layers=6, max_window_layers=4)
    assert "sliding window" in refusal(model, pairs=[[4, 3]])
    assert "sliding window" in refusal(model, pairs=[[5, 4]])
    assert plan(str(model), recipe(model, pairs=[[3, 2]])).estimates["share"].facts["layers"] == 1


@pytest.mark.parametrize(
    ("sets", "told"),
    [
        (("calibration.samples=2",), "share.check_windows=2"),
        (("calibration.seq_len=100",), "calibration.seq_len=100"),
        (("calibration.samples=3",), "calibration.samples=3"),  # 144 tokens for 96 inputs
        (("share.search_windows=1",), "share.search_windows=1"),
        (("share.last=5",), "no layer"),
        (("export.formats=[gguf]",), "export.formats"),
        (("share.method=kvsharer", "share.refit=values"), "share.refit"),
        (("calibration=null",), "calibration text"),
        (("share.distill=true",), "share.distill_"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_heavy(deep: Path, sets: tuple[str, ...], told: str) -> None:
    assert told in refusal(deep, sets)


def test_a_plan_tells_what_will_happen(deep: Path) -> None:
    estimate = plan(str(deep), recipe(deep, ratio=0.3)).estimates["share"]
    assert "at most 2 of 7 layers take attention" in estimate.lines[0]
    assert estimate.flops > 0
    assert plan(str(deep), recipe(deep, method="kvsharer")).estimates["share"].facts["mode"] == "kv"


# What comes out


def test_an_artifact_whose_layers_share(deep: Path, tmp_path: Path) -> None:
    result = shared(deep, tmp_path / "out", choose="blocks", block=2)
    kept = read_plan(result.out)
    assert kept is not None
    found = {index: layer.share for index, layer in enumerate(kept.layers) if layer.share}
    assert [(layer, share.source) for layer, share in found.items()] == [(3, 2)]
    assert all(share.mode == "attn" and share.head_map is not None for share in found.values())
    told = result.report["share"]
    assert "1 of 7 layers take attention of an earlier one" in told["summary"]
    assert told["dropped_parameters"] == (96 + 32) * 96
    assert told["cache_share"] == pytest.approx(1 / 14, abs=1e-4)
    assert told["layers"][0]["error_after"] < told["layers"][0]["error_before"]
    perplexities = told["held_out"]["perplexity"]
    assert set(perplexities) == {"dense", "copied", "fitted"}
    model, _ = load(result.out)
    assert model.num_parameters() == result.report["model"]["parameters"] - told["dropped_parameters"]
    assert any(line.startswith("share ") for line in result.summary)
    assert not list(result.out.glob("share-*"))


def test_the_artifact_is_as_good_as_was_told(saved: Callable[[Any], Path], twins: Any, tmp_path: Path) -> None:
    source = saved(twins)
    result = shared(source, tmp_path / "out", pairs=[[3, 2]])
    assert result.report["share"]["layers"][0]["head_map"] == list(TWIN)
    ids = torch.randint(3, 35, (1, 40))
    model, _ = load(result.out)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, twins(ids).logits, rtol=1e-3, atol=1e-3)


def test_a_search_that_finds_nothing_leaves_the_model_alone(deep: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("compress.share.workbench.Workbench.attempt", lambda *_: (9.0, 0.5, 0.4))
    log = Log()
    result = shared(deep, tmp_path / "out", log, budget=0.01)
    told = result.report["share"]
    assert "no layer shares: none fits the budget of 1.0%" in told["summary"]
    assert any(event.level == "warning" and "no layer shares" in event.text for event in log.of(Message))
    assert len(told["search"]["measured"]) == 2  # layers 3 and 4
    assert "layers" not in told
    model, _ = load(result.out)
    assert model.num_parameters() == result.report["model"]["parameters"]
    assert result.ok


@pytest.mark.parametrize("share", [{"budget": None, "ratio": 0.2}, {"method": "kvsharer", "threshold": -1.0}])
def test_searches_end_in_an_artifact(deep: Path, tmp_path: Path, share: dict[str, Any]) -> None:
    told = shared(deep, tmp_path / "out", **share).report["share"]
    assert told["layers"]
    assert told["search" if told["mode"] == "attn" else "tried"]


def test_layers_with_heads_that_copy_take_nothing(deep: Path, tmp_path: Path) -> None:
    told = shared(deep, tmp_path / "out", budget=None, ratio=1.0, protect=0.2, last=0).report["share"]
    assert told["protected"]
    assert not {pair["layer"] for pair in told["layers"]} & set(told["protected"])


# Going on


def stopped(model: Path, out: Path, stop: Callable[[Any], bool], **share: Any) -> None:
    with pytest.raises(InterruptedRunError):
        shared(model, out, Log(stop), **share)


SEARCHED: dict[str, Any] = {"budget": None, "ratio": 0.3}


@pytest.fixture(scope="module")
def whole(deep: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return shared(deep, tmp_path_factory.mktemp("whole") / "out", **SEARCHED)


@pytest.mark.parametrize("where", ["similarity", "with layer", "fitted", "reloaded"])
def test_an_interrupted_run_goes_on(deep: Path, tmp_path: Path, whole: RunResult, where: str) -> None:
    def stop(event: Any) -> bool:
        return isinstance(event, Message | StepDone) and where in (
            event.told if isinstance(event, StepDone) else event.text
        )

    stopped(deep, tmp_path / "out", stop, **SEARCHED)
    log = Log()
    again = shared(deep, tmp_path / "out", log, **SEARCHED)
    assert read_plan(again.out) == read_plan(whole.out)
    tried = [event for event in log.of(Message) if "with layer" in event.text]
    assert len(tried) < len(whole.report["share"]["search"]["measured"]) or where == "similarity"
    left, right = (load(result.out)[0].state_dict() for result in (again, whole))
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], rtol=1e-4, atol=1e-5)


def test_another_recipe_does_not_go_on(deep: Path, tmp_path: Path) -> None:
    stopped(deep, tmp_path / "out", lambda event: isinstance(event, StepDone), ratio=0.2)
    with pytest.raises(InputError, match=re.escape("share.ratio was 0.2, now 0.3")):
        shared(deep, tmp_path / "out", ratio=0.3)


# What is told


def test_the_page_draws_layers_and_lists_pairs(whole: RunResult) -> None:
    report = whole.report
    page = render(report, "out")
    assert "Layers that share attention" in page
    assert "Cosine between attention probabilities of two layers" in page
    assert "All layers that were tried" in page
    assert f"layer {report['share']['layers'][0]['layer']}" in page
    json.dumps(report)


def test_a_share_is_written_with_its_writer(deep: Path, tmp_path: Path) -> None:
    kept = read_plan(shared(deep, tmp_path / "out", method="kvsharer", pairs=[[4, 2]]).out)
    assert kept is not None
    assert kept.writers["share"] == "kvsharer"
    assert kept.layers[4].share == Share("kv", 2)
