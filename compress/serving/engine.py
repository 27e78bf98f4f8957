"""Requests that generate: a bounded number at a time, a bounded number waiting, each of which can be called off."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compress.generation import Piece, Task, complete
from compress.serving.errors import ApiError, server_fault

_LOG = logging.getLogger("compress.serving")
_RETRY_SECONDS = 2
Result = TypeVar("Result")


class Job:
    """The tasks of one request, on their way through a worker.

    Args:
        tasks: done one after the other; answers are numbered through.
        loop: where the pieces are wanted.
    """

    def __init__(self, tasks: Sequence[Task], loop: asyncio.AbstractEventLoop) -> None:
        self.tasks = tuple(tasks)
        self._loop = loop
        self._pieces: asyncio.Queue[Piece | None] = asyncio.Queue()
        self._cancelled = threading.Event()
        self._future: Future[None] | None = None

    def start(self, pool: ThreadPoolExecutor, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Wait in line for a worker."""
        self._future = pool.submit(self._work, model, tokenizer)
        self._future.add_done_callback(lambda _: self._tell(None))

    def cancel(self) -> None:
        """Generate nothing more; what runs ends with the token in hand."""
        self._cancelled.set()
        if self._future is not None:
            self._future.cancel()

    async def pieces(self) -> AsyncIterator[Piece]:
        """Everything that is generated, as it comes.

        Raises:
            ApiError: status 500, after a failure that is logged, or 503 if the server shuts down.
        """
        while (piece := await self._pieces.get()) is not None:
            yield piece
        assert self._future is not None
        if self._cancelled.is_set():
            raise _shutting_down()
        if error := self._future.exception():
            _LOG.error("a request failed", exc_info=error)
            raise server_fault()

    def _work(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        first = 0
        for task in self.tasks:
            if self._cancelled.is_set():
                return
            complete(model, tokenizer, task, partial(self._renumber, first), self._cancelled.is_set)
            first += task.answers

    def _renumber(self, first: int, piece: Piece) -> None:
        self._tell(replace(piece, index=first + piece.index))

    def _tell(self, piece: Piece | None) -> None:
        self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)


class Engine:
    """A model, its worker threads and the line before them. Everything but the workers runs in one event loop.

    Args:
        model: in eval mode.
        tokenizer: of the model.
        workers: requests that generate at the same time.
        queue: requests that may wait.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, workers: int, queue: int) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._slots = workers + queue
        self._taken = 0
        self._closed = False
        self._jobs: set[Job] = set()
        self._threads = torch.get_num_threads()
        own = max(1, self._threads // workers)  # threads that wait for each other's processors are slower than few
        self._pool = ThreadPoolExecutor(workers, "compress-serve", partial(torch.set_num_threads, own))
        # A tokenizer can't be told to encode by two threads at once.
        self._single = ThreadPoolExecutor(1, "compress-prepare")

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Hold a place among the requests that run and wait.

        Raises:
            ApiError: status 503, there is none left.
        """
        if self._closed:
            raise _shutting_down()
        if self._taken >= self._slots:
            raise ApiError(
                503,
                "too many requests are waiting; try again later",
                code="queue_full",
                kind="server_error",
                headers={"retry-after": str(_RETRY_SECONDS)},
            )
        self._taken += 1
        try:
            yield
        finally:
            self._taken -= 1

    async def prepare(self, function: Callable[[], Result]) -> Result:
        """Call something that takes a while and uses the tokenizer."""
        return await asyncio.get_running_loop().run_in_executor(self._single, function)

    @contextmanager
    def running(self, tasks: Sequence[Task]) -> Iterator[Job]:
        """Generate; what still runs at the end of the block is called off.

        Raises:
            ApiError: status 503, the server shuts down.
        """
        if self._closed:
            raise _shutting_down()
        job = Job(tasks, asyncio.get_running_loop())
        self._jobs.add(job)
        try:
            job.start(self._pool, self._model, self._tokenizer)
            yield job
        finally:
            self._jobs.discard(job)
            job.cancel()

    def cancel(self) -> None:
        """Call off what runs and waits, and let nothing more begin."""
        self._closed = True
        for job in tuple(self._jobs):
            job.cancel()

    def close(self) -> None:
        """Call everything off and wait for the workers; may be done twice."""
        self.cancel()
        self._single.shutdown()
        self._pool.shutdown()
        torch.set_num_threads(self._threads)  # threads made later inherit what was set last


def _shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down", kind="server_error")
