"""What is found before anything is loaded, and where the text comes from."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compress.calibrate.errors import InputError

from compress.model import open_model
from compress.share.distill_settings import Distillation, check, check_processes, held_out
from compress.share.distill_text import check_text, windows

SMALL = Distillation(minutes=None, steps=10, batch=4, at_once=2, length=32)


@pytest.mark.parametrize(
    ("changes", "count", "told"),
    [
        ({}, 4, "share.distill_batch=4: a step needs 4 windows of 32 tokens, and the text gives 3"),
        ({"steps": 31, "passes": 4}, 32, "31 steps of 4 windows would go through the 30 windows of the text 4.1 times"),
        ({"steps": None, "tokens": 20_000, "passes": 4}, 32, "share.distill_tokens=20000: 156 steps"),
        ({"steps": None}, 32, "neither minutes, nor steps, nor tokens are limited"),
        ({"at_once": 3}, 32, "share.distill_at_once=3: isn't a divisor"),
        ({"hidden": 0.0, "soft": 0.0, "hard": 0.0}, 32, "no loss of the first stage"),
    ],
)
def test_what_cant_work(changes: dict[str, float], count: int, told: str) -> None:
    with pytest.raises(InputError) as error:
        check(replace(SMALL, **changes), count)
    assert told in str(error.value)


def test_what_just_works() -> None:
    check(replace(SMALL, steps=8), 5)
    check(replace(SMALL, steps=30, passes=4), 32)
    check(replace(SMALL, hidden=0.0, soft=0.0, hard=0.0, next_share=1.0), 32)


def test_held_out_windows() -> None:
    assert [held_out(count) for count in (2, 31, 32, 64, 10_000)] == [1, 1, 2, 4, 4]


def test_a_batch_is_divided_among_processes() -> None:
    check_processes(SMALL, 2)
    with pytest.raises(InputError, match="can't be divided among 3 processes"):
        check_processes(SMALL, 3)


def test_the_text_is_checked_before_it_is_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the calibration windows have 16 tokens"):
        check_text(SMALL, 100, 16)
    with pytest.raises(InputError, match="a step needs 4 windows"):
        check_text(SMALL, 1, 128)
    with pytest.raises(InputError, match=r"share.distill_source=.*no such file"):
        check_text(replace(SMALL, source=str(tmp_path / "missing.txt")), 1, 128)
    check_text(replace(SMALL, steps=8), 3, 70)


def test_windows_are_cut_from_the_calibration_text(tiny: Callable[[str], Path]) -> None:
    view = open_model(str(tiny("llama")))
    ids = torch.arange(140).view(2, 70)
    cut, told = windows(SMALL, view, ids, 0, lambda done, wanted: None)
    assert cut.tolist() == [list(range(at, at + 32)) for at in (0, 32, 70, 102)]
    assert "calibration text, 4 windows of 32 tokens" in told


def test_a_text_of_its_own(tiny: Callable[[str], Path], text: Path) -> None:
    view = open_model(str(tiny("llama")))
    settings = replace(SMALL, source=str(text), windows=6)
    found, told = windows(settings, view, torch.zeros(1, 32, dtype=torch.int64), 0, lambda done, wanted: None)
    assert found.shape == (6, 32)
    assert "calibration.txt" in told


def test_the_model_writes_it(tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.calibrate.cache.default_cache_dir", lambda: tmp_path)
    view, told = open_model(str(tiny("llama"))), []
    own = replace(SMALL, source="self", windows=5, steps=8)
    check_text(own, 1, 8)
    unused = torch.zeros(1, 8, dtype=torch.int64)
    found, origin = windows(own, view, unused, 0, lambda done, wanted: told.append((done, wanted)))
    assert found.shape == (5, 32)
    assert told[-1][1] == 160
    assert origin == "text that the model itself wrote"
