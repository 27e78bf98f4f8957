import gc
from pathlib import Path

import pytest

from compress import pipeline, planning, report_page


@pytest.fixture(scope="session", autouse=True)
def _young_heap() -> None:
    """A run collects garbage now and then, which takes long where every library is loaded."""
    assert pipeline  # imported before the heap is frozen
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _speed_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan measures this machine for a tenth of a second, the same every time."""
    monkeypatch.setattr(planning, "_flops_per_second", lambda device: 1e10)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with about 3,500 tokens of text without two equal windows."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(" ".join(f"the {index * 7919 % 1000} in a hen" for index in range(300)))
    return path


@pytest.fixture
def _no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs leave out ``report.html``, which takes as long as all the rest of a tiny run."""
    monkeypatch.setattr(report_page, "rebuild_page", lambda folder: None)
