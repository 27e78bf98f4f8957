"""Threads that treat samples side by side."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from compress.calibrate.workers import Workers, one_thread


def test_results_come_in_the_order_of_the_items() -> None:
    second_done = threading.Event()

    def work(item: int) -> int:
        if item == 0:
            assert second_done.wait(10)
        if item == 1:
            second_done.set()
        return item * item

    with Workers(2) as workers:
        assert list(workers.map(work, range(20))) == [item * item for item in range(20)]


def test_only_a_few_results_are_in_memory() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for item in range(100):
            taken += 1
            yield item

    with Workers(2) as workers:
        for done, _ in enumerate(workers.map(lambda item: item, items())):
            assert taken <= done + 4


def test_each_worker_runs_on_one_thread_without_gradients() -> None:
    before = torch.get_num_threads()
    with Workers(2) as workers:
        threads = list(workers.map(lambda _: torch.get_num_threads(), range(4)))
        assert threads == [1] * 4
        weight = torch.ones(2, requires_grad=True)
        assert not any(result.requires_grad for result in workers.map(lambda _: weight * 2, range(2)))
    assert torch.get_num_threads() == before
    assert torch.is_grad_enabled()


def test_a_failure_comes_out_and_the_rest_is_dropped() -> None:
    seen = []

    def work(item: int) -> None:
        seen.append(item)
        if item == 3:
            raise KeyError(item)

    with Workers(1) as workers:
        with pytest.raises(KeyError, match="3"):
            list(workers.map(work, range(1000)))
        assert list(workers.map(abs, [-5])) == [5]
    assert max(seen) < 10


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()

    def fail() -> None:
        with one_thread():
            assert torch.get_num_threads() == 1
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.get_num_threads() == before


def test_threads_made_later_are_not_bound_by_it() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with Workers(1) as workers:
            list(workers.map(abs, [1]))
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(before)
