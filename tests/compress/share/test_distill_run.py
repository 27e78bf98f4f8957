"""A run whose recipe asks for a distillation."""

from collections.abc import Callable
from pathlib import Path

import pytest
from runs import InterruptedRunError, Log, refused, stored

import compress
from compress.events import Event, Message, StepDone
from compress.options import RunOptions
from compress.pipeline import run

RECIPE = """
name: distilled
calibration: {{source: {text}, samples: 8, seq_len: 160}}
share:
  pairs: [[2, 1]]
  check_windows: 4
  distill: true
  distill_minutes: null
  distill_steps: 10
  distill_batch: 2
  distill_length: 32
"""


@pytest.fixture
def recipe(text: Path, tmp_path: Path) -> Path:
    file = tmp_path / "distilled.yaml"
    file.write_text(RECIPE.format(text=text))
    return file


def sets(*more: str) -> RunOptions:
    return RunOptions(set=("eval=null", *more))


@pytest.mark.usefixtures("_no_page")
def test_a_run_that_was_interrupted_goes_on(tiny: Callable[[str], Path], recipe: Path, tmp_path: Path) -> None:
    def stop(event: Event) -> bool:
        return isinstance(event, StepDone) and event.total == 10 and event.index == 4

    model, options = str(tiny("llama")), sets()
    log = Log()
    whole = run(model, str(recipe), out=tmp_path / "whole", options=options, on_event=log)
    found = whole.report["share"]["distillation"]
    assert (found["steps"], found["tokens"], found["windows"]["learnt"]) == (10, 640, 19)
    assert "calibration text, 20 windows of 32 tokens" in found["text"]
    assert any("distillation: 10 steps" in event.text for event in log.of(Message))
    with pytest.raises(InterruptedRunError):
        run(model, str(recipe), out=tmp_path / "parts", options=options, on_event=Log(stop))
    run(model, str(recipe), out=tmp_path / "parts", options=options)
    one, other = stored(tmp_path / "whole"), stored(tmp_path / "parts")
    assert one.keys() == other.keys()
    assert all((one[name] == other[name]).all() for name in one)
    shared, _ = compress.load(str(tmp_path / "whole"))
    assert shared is not None


def test_too_small_a_text_is_found_before_anything_is_loaded(
    tiny: Callable[[str], Path], recipe: Path, tmp_path: Path
) -> None:
    line = ["run", "--model", str(tiny("llama")), "--recipe", str(recipe), "--out", str(tmp_path / "out")]
    told = refused(*line, "--set", "eval=null", "--set", "share.distill_steps=200")
    assert "share.distill_steps=200" in told
    assert "19 windows of the text" in told
    assert not (tmp_path / "out.partial").exists()
