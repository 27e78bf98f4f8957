"""Killed at any moment, the same command goes on and ends with the same bytes."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from compress.calibrate.errors import InputError
from compress.cli.main import main
from runs import InterruptedRunError, Log, arguments, digest, options, quick
from safetensors.torch import load_file, save_file

from compress import work
from compress.events import Event, LayerDone, LayerStarted, Message, ModuleDone, StageDone, StageStarted
from compress.options import RunOptions
from compress.pipeline import run
from compress.runtime import load
from compress.work import WorkFolder, differences

Tiny = Callable[[str], Path]
pytestmark = pytest.mark.usefixtures("_no_page")
SETS = ("weights.lm_head_bits=8",)


@pytest.fixture(scope="module")
def expected(tiny: Tiny, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The weights of a run that nothing disturbs."""
    return digest(quick(tiny("llama"), "rsq", tmp_path_factory.mktemp("whole") / "out", text, *SETS).out)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def is_layer(kind: type, index: int) -> Callable[[Event], bool]:
    return lambda event: type(event) is kind and event.index == index  # type: ignore[union-attr]


STOPS: dict[str, Callable[[Event], bool]] = {
    **{f"LayerStarted {index}": is_layer(LayerStarted, index) for index in range(3)},
    "LayerDone 2": is_layer(LayerDone, 2),
    "in the middle of layer 1": lambda event: isinstance(event, ModuleDone) and event.name.endswith("1.mlp.up_proj"),
    "before the first layer": lambda event: event == StageStarted("weights", 3),
    "after the last layer": lambda event: isinstance(event, StageDone) and event.name == "weights",
    "artifact begun": lambda event: event == StageStarted("artifact"),
    "reloaded": lambda event: isinstance(event, Message) and event.text.startswith("reloaded"),
}


@pytest.mark.parametrize("stop", STOPS)
def test_an_interrupted_run_goes_on(
    tiny: Tiny, tmp_path: Path, text: Path, expected: dict[str, str], stop: str
) -> None:
    out, log = tmp_path / "out", Log()
    with pytest.raises(InterruptedRunError):
        quick(tiny("llama"), "rsq", out, text, *SETS, log=Log(STOPS[stop]))
    assert not out.exists()
    done = (
        json.loads((tmp_path / "out.partial" / "state.json").read_text())["stages"].get("weights", {}).get("layers", 0)
    )
    result = quick(tiny("llama"), "rsq", out, text, *SETS, log=log)
    assert digest(out) == expected
    assert [event.index for event in log.of(LayerStarted)] == list(range(done, 3))
    assert any("resumed" in event.text for event in log.of(Message)) == (done > 0)
    assert len(result.report["weights"]["modules"]) == 21
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    load(out)


def test_a_crash_before_every_write(
    tiny: Tiny, tmp_path: Path, text: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attempt n dies when it is about to put its n-th finished file in place."""
    real, left = work._settle, 0

    def settle(part: Path, target: Path) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise InterruptedRunError
        real(part, target)

    monkeypatch.setattr(work, "_settle", settle)
    for attempt in range(40):
        left = attempt
        try:
            quick(tiny("llama"), "rsq", tmp_path / "out", text, *SETS)
        except InterruptedRunError:
            continue
        break
    assert attempt >= 5
    assert digest(tmp_path / "out") == expected
    load(tmp_path / "out")


def test_a_crash_between_report_and_publication(
    tiny: Tiny, tmp_path: Path, text: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def publish(_: WorkFolder) -> None:
        raise InterruptedRunError

    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "publish", publish)
        with pytest.raises(InterruptedRunError):
            quick(tiny("llama"), "rsq", tmp_path / "out", text, *SETS)
    quick(tiny("llama"), "rsq", tmp_path / "out", text, *SETS)
    assert digest(tmp_path / "out") == expected
    load(tmp_path / "out")  # no file is taken for a damaged one


@pytest.mark.parametrize("scored", [True, False])
def test_a_crash_after_publication(tiny: Tiny, tmp_path: Path, text: Path, scored: bool) -> None:
    recipe: dict[str, Any] = {
        "base": "rtn",
        "eval": {"text": str(text), "window": 32, "windows": 2} if scored else None,
    }
    chosen = RunOptions(set=("weights.group_size=8",))

    def stop(event: Event) -> bool:
        published = isinstance(event, StageDone) and event.name == "artifact"
        return event == StageStarted("eval") if scored else published

    with pytest.raises(InterruptedRunError):
        run(str(tiny("llama")), recipe, out=tmp_path / "out", options=chosen, on_event=Log(stop))
    before = digest(tmp_path / "out")
    result = run(str(tiny("llama")), recipe, out=tmp_path / "out", options=chosen)
    assert digest(tmp_path / "out") == before
    assert ("eval" in result.report) == scored
    assert any(line.startswith("time") for line in result.summary)


def test_the_time_is_that_of_all_processes(begun: tuple[Path, Path, Path]) -> None:
    model, text, out = begun
    file = out.with_name("out.partial") / "state.json"
    state = json.loads(file.read_text())
    assert 0 < state["seconds"] < 100
    file.write_text(json.dumps(state | {"seconds": 1000.0}))
    with pytest.raises(InterruptedRunError):  # the second process is stopped, too
        quick(model, "rsq", out, text, log=Log(STOPS["LayerStarted 2"]))
    assert 1000 < json.loads(file.read_text())["seconds"] < 1100
    with pytest.raises(InterruptedRunError):  # the third after publication
        quick(model, "rsq", out, text, log=Log(lambda event: isinstance(event, StageDone) and event.name == "artifact"))
    report = json.loads((out / "report.json").read_text())
    assert report["seconds"] is None
    assert 1000 < report["seconds_so_far"] < 1100
    result = quick(model, "rsq", out, text)
    assert report["seconds_so_far"] <= result.report["seconds"] < 1100
    assert "seconds_so_far" not in json.loads((out / "report.json").read_text())


KILLED = """
import os, signal, sys
from pathlib import Path
import compress
sys.path.append(sys.argv[1])
import runs
from compress import work
real = work.save_file
def killed(tensors, path, **kwargs):
    real(tensors, path, **kwargs)
    if "layer-00001" in path.name:
        os.kill(os.getpid(), signal.SIGKILL)
work.save_file = killed
runs.quick(Path(sys.argv[2]), "rsq", Path(sys.argv[3]), Path(sys.argv[4]), *sys.argv[5:])
"""


def test_a_killed_process_leaves_what_the_next_one_needs(
    tiny: Tiny, tmp_path: Path, text: Path, expected: dict[str, str]
) -> None:
    tests = str(Path(__file__).parents[1])
    places = [tests, str(tiny("llama")), str(tmp_path / "out"), str(text), *SETS]
    done = subprocess.run([sys.executable, "-c", KILLED, *places], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert (tmp_path / "out.partial" / "layer-00001.safetensors.part").exists()
    log = Log()
    quick(tiny("llama"), "rsq", tmp_path / "out", text, *SETS, log=log)
    assert [event.index for event in log.of(LayerStarted)] == [1, 2]
    assert digest(tmp_path / "out") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def begun(tiny: Tiny, tmp_path: Path, text: Path) -> tuple[Path, Path, Path]:
    """A model, a text and an output folder of their own, with a run that stopped in its second layer."""
    model = shutil.copytree(tiny("llama"), tmp_path / "model")
    own_text = Path(shutil.copy(text, tmp_path / "text.txt"))
    with pytest.raises(InterruptedRunError):
        quick(model, "rsq", tmp_path / "out", own_text, log=Log(STOPS["LayerStarted 1"]))
    return model, own_text, tmp_path / "out"


def change_model(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("recipe", ["weights.bits was 3, now 4"]),
        ("seed", ["calibration.seed was 0, now 1"]),
        ("text", ["calibration.digest was"]),
        ("model", ["model.model.safetensors was"]),
    ],
)
def test_a_changed_run_refuses_to_go_on_and_says_why(
    begun: tuple[Path, Path, Path], change: str, words: list[str]
) -> None:
    model, text, out = begun
    partial = out.with_name("out.partial")
    before = everything(partial)
    sets = {"recipe": ("weights.bits=4",), "seed": ("calibration.seed=1",)}.get(change, ())
    if change == "text":
        text.write_text(text.read_text().replace("hen", "hat"))
    if change == "model":
        change_model(model)
    line = arguments(model, "rsq", out, options("rsq", text, *sets))
    result = CliRunner().invoke(main, line)
    assert result.exit_code == 2
    told = result.stderr.splitlines()[-1]
    for word in [*words, "--fresh"]:
        assert word in told
    assert everything(partial) == before
    fresh = CliRunner().invoke(main, [*line, "--fresh"])
    assert fresh.exit_code == 0, fresh.output
    whole = quick(model, "rsq", out.with_name("whole"), text, *sets)
    assert digest(out) == digest(whole.out)


def test_fresh_forgets_what_was_done(begun: tuple[Path, Path, Path]) -> None:
    model, text, out = begun
    log = Log()
    run(str(model), "rsq", out=out, options=options("rsq", text, resume=False), on_event=log)
    assert [event.index for event in log.of(LayerStarted)] == [0, 1, 2]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"fingerprint": 3'])
def test_an_unreadable_state_is_told(begun: tuple[Path, Path, Path], content: str) -> None:
    model, text, out = begun
    (out.with_name("out.partial") / "state.json").write_text(content)
    with pytest.raises(InputError, match=r"state\.json: can't be read; start over with --fresh"):
        quick(model, "rsq", out, text)


def test_a_finished_artifact_is_returned_at_once(tiny: Tiny, tmp_path: Path, text: Path) -> None:
    first = quick(tiny("llama"), "rtn", tmp_path / "out", text)
    before, log = everything(first.out), Log()
    again = quick(tiny("llama"), "rtn", tmp_path / "out", text, log=log)
    assert not log.of(StageStarted)
    assert any("complete already" in event.text for event in log.of(Message))
    assert again.report == json.loads(json.dumps(first.report, default=str))
    assert again.summary == first.summary
    assert everything(first.out) == before
    assert not list(tmp_path.glob("*.partial"))


def test_another_artifact_is_refused_and_untouched(tiny: Tiny, tmp_path: Path, text: Path) -> None:
    out = quick(tiny("llama"), "rtn", tmp_path / "out", text).out
    before = everything(out)
    with pytest.raises(InputError, match=r"holds another artifact.*weights\.bits was 4, now 8.*another folder"):
        quick(tiny("llama"), "rtn", out, text, "weights.bits=8")
    assert everything(out) == before


def test_two_runs_at_once_are_refused(tiny: Tiny, tmp_path: Path, text: Path) -> None:
    told = []

    def second(event: Event) -> None:
        if is_layer(LayerStarted, 1)(event):
            with pytest.raises(InputError, match="another run is writing there") as caught:
                quick(tiny("llama"), "rtn", tmp_path / "out", text)
            told.append(str(caught.value))

    result = run(str(tiny("llama")), "rtn", out=tmp_path / "out", options=options("rtn", text), on_event=second)
    assert len(told) == 1
    load(result.out)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": {"b": 1}}, {"a": {"b": 2}}, ["a.b was 1, now 2"]),
        ({"a": 1}, {}, ["a was 1, now absent"]),
        ({}, {"a": "x" * 50}, ["a was absent, now xxxxxxxxxxxx…"]),
        (dict.fromkeys("abcdefg", 0), dict.fromkeys("abcdefg", 1), ["and 3 more"]),
    ],
)
def test_differences(old: dict[str, Any], new: dict[str, Any], expected: list[str]) -> None:
    found = differences(old, new)
    assert len(found) <= 5
    assert found[-len(expected) :] == expected if expected else not found
