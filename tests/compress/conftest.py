import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub import TOKEN, Hub, serving
from huggingface_hub import constants

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
    monkeypatch.setattr(report_page, "write_page", lambda folder, report, name: folder / report_page.PAGE)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The stand-in, as the Hub that huggingface_hub talks to, with somebody logged in."""
    with serving() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server
