"""Processes that hold an object each."""

import multiprocessing
import os
import signal
from collections.abc import Iterator

import light
import pytest
from compress.calibrate.errors import InputError

from compress.worker import Owner, Turns, Worker

OWNER = Owner("ARTIFACT", "out/m", "most likely memory ran out: buy some")


@pytest.fixture
def worker() -> Iterator[Worker]:
    found = Worker(light.make, OWNER)
    yield found
    found.stop()


def test_the_object_is_made_once_elsewhere_and_kept(worker: Worker) -> None:
    maker, answerer = worker.ask(light.pid)
    assert maker == answerer != os.getpid()
    worker.ask(light.keep, "a", 7)
    assert worker.ask(light.get, "a") == 7
    assert worker.ask(light.pid) == (maker, answerer)
    assert worker.ask(light.interrupted) == "still here"  # Ctrl-C reaches every process of a terminal
    worker.stop()
    assert not multiprocessing.active_children()
    worker.stop()
    assert worker.ask(light.get, "a") is None
    assert worker.ask(light.pid) != (maker, answerer)


@pytest.mark.parametrize(("number", "name"), [(signal.SIGKILL, "killed"), (signal.SIGSEGV, "segmentation fault")])
def test_a_killed_process_is_told_in_one_line(worker: Worker, number: int, name: str) -> None:
    with pytest.raises(InputError) as caught:
        worker.ask(light.die, number)
    assert str(caught.value) == (
        f"ARTIFACT=out/m: its process was ended by signal {int(number)} ({name}); most likely memory ran out: buy some"
    )


def test_a_process_killed_between_two_questions(worker: Worker) -> None:
    number = worker.ask(light.pid)[1]
    os.kill(number, signal.SIGKILL)
    with pytest.raises(InputError, match="ended by signal 9"):
        worker.ask(light.pid)


def test_faults_of_ours_stay_visible(worker: Worker, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="exit code 1; its error is above"):
        worker.ask(light.fail)
    assert "ZeroDivisionError: a fault of ours" in capfd.readouterr().err
    worker.stop()
    with pytest.raises(RuntimeError, match="exit code 3"):
        worker.ask(light.leave)


def test_bad_input_comes_back_as_such(worker: Worker) -> None:
    with pytest.raises(InputError, match=r"^--lengths=9: is too long$"):
        worker.ask(light.bad_option)
    assert worker.ask(light.get, "a") is None  # it goes on
    refusing = Worker(light.refuse, OWNER)
    with pytest.raises(InputError, match=r"^ARTIFACT=x: is no model; allowed: models; name one$"):
        refusing.ask(light.pid)
    refusing.stop()


def test_what_cannot_be_sent_is_refused_at_once() -> None:
    with pytest.raises(InputError, match=r"^ARTIFACT=out/m: can't be sent to a process of its own \(.*partial"):
        Worker(lambda: {}, OWNER)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("alone", [False, True])
def test_turns(alone: bool) -> None:
    workers = {name: Worker(light.make, OWNER) for name in "ab"}
    with Turns(workers, alone) as turns:
        assert len(multiprocessing.active_children()) == (0 if alone else 2)
        first = turns.ask("a", light.pid)
        turns.ask("b", light.keep, "x", 1)
        assert len(multiprocessing.active_children()) == (1 if alone else 2)
        assert turns.ask("b", light.get, "x") == 1
        assert (turns.ask("a", light.pid) == first) is not alone
        turns.alone = True
        assert turns.ask("b", light.get, "x") == (None if alone else 1)
        assert len(multiprocessing.active_children()) == 1
    assert not multiprocessing.active_children()
