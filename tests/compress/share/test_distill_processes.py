"""A distillation in two processes is that of one with the same batch."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compress.calibrate.errors import InputError

from compress.events import Event, LayerDone, Message, StepDone
from compress.model import open_model
from compress.plan import Share
from compress.share import trainer_worker
from compress.share.distill_settings import Distillation
from compress.share.modules import share_layers
from compress.share.trainer import Task, train
from compress.share.trainer_launch import decoded, distil, encoded, read_order, write_order

SHARES = {1: Share("attn", 0, (0, 1, 2, 3, 4, 5))}
SETTINGS = Distillation(minutes=None, steps=6, batch=4, at_once=2, length=16, lr=3e-3, check=0.5, dtype="float32")


def build_task(model: Path) -> Task:
    teacher = open_model(str(model)).load_dense()
    student = copy.deepcopy(teacher)
    share_layers(student, SHARES)
    with torch.no_grad():
        student.model.layers[1].self_attn.o_proj.weight.mul_(0.9)  # as a refit would have changed it
    ids = torch.randint(0, 300, (34, 16), generator=torch.Generator().manual_seed(5))
    return Task(student, teacher, SHARES, ids, seed=3)


@pytest.fixture
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.usefixtures("_one_thread")
def test_two_processes_are_one_with_twice_the_batch(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    model, told = tiny("llama"), []
    one = train(build_task(model), replace(SETTINGS, at_once=4), tmp_path / "one", lambda event: None)
    two = distil(build_task(model), replace(SETTINGS, processes=2), tmp_path / "two", told.append, str(model))
    steps = [event for event in told if isinstance(event, StepDone)]
    assert [event.index for event in steps] == list(range(6))
    for first, second in zip(one.report["history"], two.report["history"], strict=True):
        for key in ("kl", "perplexity", *(["loss", "hidden", "soft", "hard"] if first["step"] else [])):
            assert second[key] == pytest.approx(first[key], rel=1e-4), key
    for name, parameter in one.parameters.items():
        torch.testing.assert_close(two.parameters[name], parameter, rtol=1e-3, atol=1e-4, msg=name)


def test_a_worker_says_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["trainer_worker", str(tmp_path)])
    assert trainer_worker.main() == 2
    assert capsys.readouterr().err == f"FOLDER={tmp_path}: there is no order.json in it; begin with compress run\n"


def test_a_worker_tells_in_words(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny("llama")
    task = build_task(model)
    write_order(task, SETTINGS, tmp_path, str(model))
    monkeypatch.setattr("sys.argv", ["trainer_worker", str(tmp_path)])
    assert trainer_worker.main() == 0
    assert "6/6  loss" in capsys.readouterr().out
    assert train(task, SETTINGS, tmp_path, lambda event: None).report["steps"] == 6


def test_an_order_is_read_as_it_was_written(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    task = build_task(tiny("llama"))
    write_order(task, SETTINGS, tmp_path, "model")
    order = read_order(tmp_path)
    assert (order.model, order.shares, order.settings, order.seed) == ("model", SHARES, SETTINGS, 3)
    assert torch.equal(order.ids, task.ids)
    assert list(order.start) == ["model.layers.1.self_attn.o_proj.weight"]


def test_a_process_that_fails_is_told(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = build_task(tiny("llama"))
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(InputError, match="a process of the distillation failed"):
        distil(task, replace(SETTINGS, processes=2), tmp_path, lambda event: None, str(tmp_path / "missing"))


def test_events_go_through_lines() -> None:
    events: list[Event] = [Message("a\nb", "warning"), StepDone(3, 7, 0.5, "loss 1"), LayerDone(1, 2, 0.1)]
    assert [decoded(encoded(event)) for event in events] == events
    assert decoded("W1123 torch.distributed: a warning") is None
    assert decoded('{"event": "Path"}') is None
