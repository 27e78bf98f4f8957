"""The trainer of the distillation: it helps, it goes on where it was killed, it stops in time and keeps the best."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compress.calibrate.errors import InputError
from models import build_model
from torch import Tensor

from compress.events import Event, Message, StageDone, StageStarted, StepDone
from compress.plan import Share
from compress.share import trainer
from compress.share.distill_settings import Distillation
from compress.share.distill_state import STATE
from compress.share.modules import share_layers
from compress.share.trainer import Task, train
from compress.share.trainer_budget import Budget

SHARES = {2: Share("attn", 1)}
QUICK = Distillation(
    minutes=None, steps=12, batch=4, at_once=2, length=16, lr=3e-3, hard=0.1, check=0.25, dtype="float32"
)


def build_task(seed: int = 0) -> Task:
    teacher = build_model("llama", num_hidden_layers=4)
    student = copy.deepcopy(teacher)
    share_layers(student, SHARES)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():  # layers of a random model are much alike
        output = student.model.layers[2].self_attn.o_proj.weight
        output += 2 * output.std() * torch.randn(output.shape, generator=generator)
    ids = torch.randint(0, 300, (34, 16), generator=torch.Generator().manual_seed(seed))
    return Task(student, teacher, SHARES, ids)


@pytest.fixture
def task() -> Task:
    return build_task()


class Heard:
    """A ``tell`` that keeps what it is told, and fails where it is asked to."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.events: list[Event] = []
        self.stop_after = stop_after

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, StepDone) and event.index + 1 == self.stop_after:
            raise KeyboardInterrupt

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def weights(task: Task) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in task.student.named_parameters()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("trained", ["consumers", "all"])
def test_it_helps(task: Task, tmp_path: Path, trained: Any) -> None:
    before, heard = weights(task), Heard()
    lr = 3e-3 if trained == "consumers" else 1e-3
    out = train(task, replace(QUICK, trained=trained, lr=lr), tmp_path, heard)
    history = out.report["history"]
    assert out.report["best"]["kl"] < 0.9 * history[0]["kl"]
    assert history[-1]["loss"] < history[1]["loss"]
    changed = {name for name, now in weights(task).items() if not torch.equal(before[name], now)}
    assert changed == set(out.parameters)
    assert all(torch.equal(dict(task.student.named_parameters())[name], now) for name, now in out.parameters.items())
    assert (out.report["steps"], out.report["tokens"]) == (12, 12 * 4 * 16)
    assert heard.of(StageStarted) == [StageStarted("distillation", 12, "steps")]
    assert [event.index for event in heard.of(StepDone)] == list(range(12))
    assert len(heard.of(StageDone)) == 1
    assert [row["step"] for row in history] == [0, 3, 6, 9, 12]


def test_the_second_stage_learns_the_text(task: Task, tmp_path: Path) -> None:
    repeated = replace(task, ids=task.ids[:1].repeat(34, 1))
    out = train(repeated, replace(QUICK, next_share=0.5), tmp_path, Heard())
    stages = [row["stage"] for row in out.report["history"]]
    assert stages == [1, 1, 1, 2, 2, 2]
    first, last = [row for row in out.report["history"] if row["stage"] == 2][:: stages.count(2) - 1]
    assert last["perplexity"] < 0.8 * first["perplexity"]
    assert out.report["best"]["stage"] == 2


def test_an_interrupted_run_ends_with_the_same_weights(task: Task, tmp_path: Path) -> None:
    settings = replace(QUICK, keep_steps=2, next_share=0.4)
    whole = train(task, settings, tmp_path / "whole", Heard())
    for stop in (1, 5, 9):  # in stage 1 before anything but the start is kept, in it, and in stage 2
        torch.manual_seed(stop)
        with pytest.raises(KeyboardInterrupt):
            train(build_task(), settings, tmp_path / "parts", Heard(stop))
    heard, again = Heard(), build_task()
    parts = train(again, settings, tmp_path / "parts", heard)
    assert heard.of(StepDone)[0].index in (7, 8)  # kept after every second step
    assert_same(dict(whole.parameters), dict(parts.parameters))
    strip = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]  # noqa: E731
    assert strip(whole.report["history"]) == strip(parts.report["history"])


SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = {paths!r}
import compress.share
from test_distill_trainer import QUICK, build_task
from dataclasses import replace
from compress.share.trainer import train
train(build_task(), replace(QUICK, steps=60, keep_steps=3), Path({folder!r}), lambda event: None)
"""


def test_a_killed_process_loses_only_the_steps_since(task: Task, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    settings = replace(QUICK, steps=60, keep_steps=3)
    here = Path(__file__).parent
    script = SCRIPT.format(paths=[str(here), str(here.parents[1])], folder=str(folder))
    with subprocess.Popen([sys.executable, "-c", script]) as process:
        deadline = time.monotonic() + 120
        while _steps(folder) < 9:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    kept = _steps(folder)
    assert 9 <= kept < 60
    heard = Heard()
    parts = train(task, settings, folder, heard)
    assert heard.of(StepDone)[0].index == kept
    whole = train(build_task(), settings, tmp_path / "whole", Heard())
    assert_same(dict(whole.parameters), dict(parts.parameters))


def _steps(folder: Path) -> int:
    file = folder / STATE
    return json.loads(file.read_text())["progress"]["step"] if file.exists() else 0


def test_a_finished_run_only_hands_over(task: Task, tmp_path: Path) -> None:
    first = train(task, QUICK, tmp_path, Heard())
    heard = Heard()
    again = train(build_task(), QUICK, tmp_path, heard)
    assert not heard.of(StepDone)
    assert_same(dict(first.parameters), dict(again.parameters))
    assert sorted(path.name.split("-")[0] for path in tmp_path.glob("*.safetensors")) == ["best"]


def test_another_run_isnt_gone_on_with(task: Task, tmp_path: Path) -> None:
    train(task, QUICK, tmp_path, Heard())
    with pytest.raises(InputError, match=r"settings\.lr was 0\.003, now 0\.001"):
        train(build_task(), replace(QUICK, lr=1e-3), tmp_path, Heard())
    with pytest.raises(InputError, match="windows"):
        train(build_task(seed=1), QUICK, tmp_path, Heard())


def test_a_loss_that_isnt_finite_stops_and_keeps_the_best(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = trainer.Pair.forward, 0

    def broken(self: trainer.Pair, ids: Tensor, terms: Any) -> Tensor:
        nonlocal calls
        calls += torch.is_grad_enabled()
        return real(self, ids, terms) * (float("nan") if calls > 14 else 1.0)  # two calls a step

    monkeypatch.setattr(trainer.Pair, "forward", broken)
    heard = Heard()
    out = train(task, QUICK, tmp_path, heard)
    assert out.report["ended"] == "the loss of step 8 isn't finite, so training stopped there"
    assert out.report["best"]["step"] == 6
    assert "the weights of step 6 are kept" in out.report["summary"]
    assert [event.level for event in heard.of(Message)][-1] == "warning"
    assert all(torch.isfinite(parameter).all() for parameter in task.student.parameters())
    again = Heard()
    assert train(build_task(), QUICK, tmp_path, again).report == out.report
    assert not again.of(StepDone)


def test_a_diverging_run_stops_and_keeps_the_best(task: Task, tmp_path: Path) -> None:
    before = weights(task)
    out = train(task, replace(QUICK, lr=1.0, worst=1.5), tmp_path, Heard())
    assert "more than 1.5 times the best" in out.report["ended"]
    assert out.report["steps"] == 3
    assert "it didn't help" in out.report["summary"]
    assert_same(before, weights(task))


def test_two_runs_dont_share_a_folder(task: Task, tmp_path: Path) -> None:
    def tell(event: Event) -> None:
        if isinstance(event, StepDone) and event.index == 0:
            with pytest.raises(InputError, match="another run trains there"):
                train(build_task(), QUICK, tmp_path, Heard())

    train(task, QUICK, tmp_path, tell)


def test_without_shared_layers_there_is_nothing_to_do(task: Task, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to distil"):
        train(replace(task, shares={2: Share("mask", 1)}), QUICK, tmp_path, Heard())


def test_time_is_a_budget_too(task: Task, tmp_path: Path) -> None:
    heard = Heard()
    began = time.monotonic()
    out = train(task, replace(QUICK, minutes=0.02, steps=None, passes=10_000), tmp_path, heard)
    assert 1.2 <= out.report["seconds"] < 10
    assert time.monotonic() - began < 20
    assert heard.of(StageStarted) == [StageStarted("distillation", 100, "percent")]
    assert heard.of(StepDone)[-1].index == 99
    assert out.report["steps"] == len(heard.of(StepDone))


def test_the_rate_rises_and_falls_in_each_stage() -> None:
    budget = Budget(replace(QUICK, steps=200, next_share=0.5, lr=1.0, passes=1000), windows=34)
    rates = [budget.rate(step, 0.0) for step in range(200)]
    assert rates[0] == pytest.approx(0.2, rel=0.01)
    assert max(rates) == pytest.approx(rates[4], rel=0.01)
    assert rates[99] < 0.06
    assert rates[100:] == pytest.approx(rates[:100], rel=1e-6)
    timed = Budget(replace(QUICK, steps=None, minutes=1.0, passes=1000), windows=34)
    assert timed.rate(0, 0.0) > 0
    assert timed.rate(10, 59.0) < 0.1 * timed.rate(10, 6.0)
