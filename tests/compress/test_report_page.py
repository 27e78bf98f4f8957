"""``report.html`` of a run, and artifacts side by side."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from compress.cli.main import main
from runs import Log, quick, refused

from compress.comparison import compare_artifacts
from compress.events import Message
from compress.report_page import rebuild_page


@pytest.fixture(scope="module")
def artifacts(tiny: Callable[[str], Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two artifacts of one model, at 4 and at 2 bits, with folders of the same name."""
    root = tmp_path_factory.mktemp("artifacts")
    folders = root / "four" / "art", root / "two" / "art"
    for folder, bits in zip(folders, (4, 2), strict=True):
        folder.parent.mkdir()
        quick(tiny("llama"), "rsq", folder, text, f"weights.bits={bits}")
    return folders


def test_a_run_writes_its_page_and_the_command_writes_it_again(artifacts: tuple[Path, Path]) -> None:
    page = artifacts[0] / "report.html"
    first = page.read_text(encoding="utf-8")
    assert "<title>art: compression report</title>" in first
    assert "layer 2 · " in first
    page.unlink()
    result = CliRunner().invoke(main, ["report", str(artifacts[0])])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(page)
    assert page.read_text(encoding="utf-8") == first
    assert rebuild_page(artifacts[0]) == page


@pytest.mark.parametrize("edited", [True, False])
def test_a_repeated_run_keeps_a_card_that_was_edited(
    tiny: Callable[[str], Path], text: Path, tmp_path: Path, edited: bool
) -> None:
    out = quick(tiny("llama"), "rtn", tmp_path / "out", text).out
    card, log = out / "README.md", Log()
    written = card.read_text() + ("\nThanks to Ada.\n" if edited else "")
    card.write_text(written)
    scored = (f"eval.text={text}", "eval.window=32", "eval.windows=2")
    result = quick(tiny("llama"), "rtn", out, text, *scored, log=log)
    told = [event.text for event in log.of(Message) if "edited by hand" in event.text]
    assert told == ([f"{card} was edited by hand and is left as it is"] if edited else [])
    assert (card.read_text() == written) == edited
    assert ("| perplexity |" in card.read_text()) != edited
    assert result.report == json.loads((out / "report.json").read_text())
    assert "Perplexity" in (out / "report.html").read_text()


def test_compare_reads_what_is_stored(artifacts: tuple[Path, Path], tmp_path: Path) -> None:
    html = tmp_path / "both.html"
    result = CliRunner().invoke(main, ["compare", *map(str, artifacts), "--html", str(html)])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0].split() == ["|", "|", "original", "|", "four/art", "|", "two/art", "|"]
    assert "Relative error, worst ↓" in result.stdout
    assert "four/art · two/art" in html.read_text(encoding="utf-8")
    data = json.loads(CliRunner().invoke(main, ["compare", *map(str, artifacts), "--json"]).stdout)
    assert data["artifacts"] == ["four/art", "two/art"]
    (median,) = [row for row in data["rows"] if row["key"] == "median"]
    four, two = (entry["value"] for entry in median["entries"])
    assert two > 2 * four


def test_names_tell_artifacts_apart(artifacts: tuple[Path, Path]) -> None:
    assert compare_artifacts(artifacts).names == ("four/art", "two/art")


def test_bad_input(artifacts: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = map(str, artifacts)
    assert "needs at least two artifacts" in refused("compare", first)
    assert "is named twice" in refused("compare", first, str(artifacts[0] / ".." / "art"))
    assert "holds no report.json" in refused("compare", first, str(tmp_path))
    assert "there is no such folder" in refused("compare", first, str(tmp_path / "none"))
    assert "there is no folder" in refused("compare", first, second, "--html", str(tmp_path / "none" / "x.html"))
    assert "holds no report.json" in refused("report", str(tmp_path))
    assert "there is no such folder" in refused("report", str(tmp_path / "none"))
    (tmp_path / "report.json").write_text("{")
    assert "holds no report.json" in refused("report", str(tmp_path))
    result = CliRunner().invoke(main, ["compare"])
    assert result.exit_code == 2
