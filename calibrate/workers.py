"""Samples side by side: one thread a processor, and within a thread no threads.

A layer's pieces are small tensors. Splitting each operation over the processors makes them wait for each other
thousands of times a second, and on a machine that does something else too, every wait costs a time slice. So whole
samples are given out instead. Each is computed by one thread alone, which also makes results independent of how many
there are.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """A pool of threads for tensor work; use it as a context manager.

    Args:
        count: threads; by default as many as PyTorch would use for one operation.
    """

    def __init__(self, count: int | None = None) -> None:
        self._threads = torch.get_num_threads()
        self.count = count or self._threads
        self._pool = ThreadPoolExecutor(self.count, thread_name_prefix="compress", initializer=_single)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads)  # threads made later inherit what was set last

    def map(
        self, function: Callable[[Item], Result], items: Iterable[Item], ahead: int | None = None
    ) -> Iterator[Result]:
        """Results in the order of the items, without gradients.

        Args:
            function: called in a worker.
            items: its arguments.
            ahead: so many results, and one more, may be in memory; by default as many as there are threads.
        """
        ahead = self.count if ahead is None else ahead
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(self._pool.submit(_without_gradients, function, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch operations of the calling thread run on it alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _single() -> None:
    torch.set_num_threads(1)


@torch.no_grad()
def _without_gradients(function: Callable[[Item], Result], item: Item) -> Result:
    return function(item)
