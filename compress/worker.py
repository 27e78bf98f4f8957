"""Processes that make one object each, such as a loaded model, and apply functions to it: its memory is its own."""

import multiprocessing
import pickle
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from compress.calibrate.errors import InputError

T = TypeVar("T")

_LEAVE_SECONDS = 10.0  # for an idle process to notice that nobody asks any more, and to tidy up


@dataclass(frozen=True)
class Owner:
    """Whom an error of a worker concerns.

    Attributes:
        option: the command-line option that named the object.
        value: its value.
        advice: what to do when the system kills the process.
    """

    option: str
    value: str
    advice: str


class Worker:
    """Holds an object in a process of its own, started when it is first asked something; stop it when done.

    Args:
        make: makes the object; a function or object that pickle can send. A fresh interpreter imports its module, so
            a script that uses a worker needs ``if __name__ == "__main__"``, as with ``multiprocessing``.
        owner: for errors.

    Raises:
        InputError: pickle can't send ``make``.
    """

    def __init__(self, make: Callable[[], Any], owner: Owner) -> None:
        try:
            pickle.dumps(make)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            fix = "use a function of a module, with functools.partial for its arguments"
            problem = f"can't be sent to a process of its own ({error})"
            raise InputError(owner.option, owner.value, problem, fix=fix) from error
        self._make = make
        self._owner = owner
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None
        self._busy = False  # still so after an interrupt, when waiting for the answer would be pointless

    def ask(self, function: Callable[..., T], *arguments: Any) -> T:
        """Apply a function to the object, as ``function(object, *arguments)``, and wait for the result.

        Raises:
            InputError: as the function or the making of the object; the process was killed.
            RuntimeError: the process ended with another error, which it has printed.
        """
        self.start()
        assert self._pipe is not None
        self._busy = True
        try:
            self._pipe.send((function, arguments))
            answer = self._pipe.recv()
        except (EOFError, ConnectionError) as error:
            raise self._death() from error
        self._busy = False
        if isinstance(answer, InputError):
            raise answer.under(self._owner.option) if answer.option == "--model" else answer
        result: T = answer
        return result

    def start(self) -> None:
        """Start the process, which imports what it needs; the object is made at the first question."""
        if self._process is not None:
            return
        context = multiprocessing.get_context("spawn")  # a fork would bring the parent's memory and locked threads
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._make), daemon=True)
        self._process.start()
        theirs.close()  # the process has its own; with ours open its end would go unnoticed

    def stop(self) -> None:
        """End the process; the next question starts another."""
        if self._process is not None and self._pipe is not None:
            self._pipe.close()
            self._process.join(0 if self._busy else _LEAVE_SECONDS)
            self._process.kill()
            self._process.join()
        self._process = self._pipe = None
        self._busy = False

    def _death(self) -> Exception:
        assert self._process is not None
        self._process.join()
        code = self._process.exitcode or 0
        if code >= 0:
            return RuntimeError(f"the process of {self._owner.value} ended with exit code {code}; its error is above")
        name = signal.strsignal(-code) or "unknown"
        problem = f"its process was ended by signal {-code} ({name.lower()})"
        return InputError(self._owner.option, self._owner.value, problem, fix=self._owner.advice)


class Turns:
    """Several workers that take turns; use it as a context manager, which ends them all.

    Args:
        workers: by name.
        alone: only the worker whose turn it is holds its object; it can be set at any time.
    """

    def __init__(self, workers: Mapping[str, Worker], alone: bool) -> None:
        self.alone = alone
        self._workers = dict(workers)

    def __enter__(self) -> "Turns":
        if not self.alone:
            for worker in self._workers.values():
                worker.start()
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers.values():
            worker.stop()

    def ask(self, name: str, function: Callable[..., T], *arguments: Any) -> T:
        """Ask one of the workers, see :meth:`Worker.ask`."""
        if self.alone:
            for other, worker in self._workers.items():
                if other != name:
                    worker.stop()
        return self._workers[name].ask(function, *arguments)


def _serve(pipe: Connection, make: Callable[[], Any]) -> None:
    """The process's life: one answer to every question, until the asker is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the asker's business, who then ends this process
    made: list[Any] = []
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            made = made or [make()]
            answer = function(made[0], *arguments)
        except InputError as error:
            answer = error
        pipe.send(answer)
