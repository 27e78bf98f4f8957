"""Artifacts of one original, measured together: the original once, everything on the same items, all of it kept."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from compress.calibrate.errors import InputError
from compress.cli.main import main
from runs import Log, quick

from compress import bench as bench_module
from compress.evaluate import evaluate
from compress.events import Message
from compress.kv.growing import STEP
from compress.options import BenchOptions, EvalOptions, RunOptions
from compress.pipeline import run
from compress.prove import prove

Tiny = Callable[[str], Path]
WORDS = """\
task: words
dataset_path: json
dataset_kwargs: {data_files: {validation: words.jsonl}}
validation_split: validation
output_type: loglikelihood
doc_to_text: "{{text}}"
doc_to_target: "{{end}}"
metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}]
metadata: {version: 1.0}
"""
QUICK = BenchOptions(prompt_tokens=8, new_tokens=2, rounds=1, lengths=(6,))


@pytest.fixture(scope="module")
def original(tiny: Tiny) -> Path:
    return tiny("llama")


@pytest.fixture(scope="module")
def artifacts(original: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("prove")
    four = quick(original, "rtn", folder / "w4", text, "weights.bits=4").out
    return four, quick(original, "rtn", folder / "w2", text, "weights.bits=2").out


@pytest.fixture
def copies(artifacts: tuple[Path, Path], tmp_path: Path) -> list[Path]:
    return [shutil.copytree(folder, tmp_path / folder.name) for folder in artifacts]


@pytest.fixture
def scoring(text: Path) -> EvalOptions:
    return EvalOptions(text=str(text), window=32, windows=4)


def report(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "report.json").read_text())
    return found


def test_the_original_is_scored_once_and_every_report_holds_its_figures(
    copies: list[Path], scoring: EvalOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, before = Log(), [report(folder) for folder in copies]
    comparison = prove(copies, ["perplexity", "divergence"], scoring, None, log)
    said = [event.text.rsplit(" in ", 1)[0] for event in log.of(Message)]
    assert said == ["scored original", "scored w4", "scored w2"]
    assert comparison.names == ("w4", "w2")
    four, two = (report(folder) for folder in copies)
    assert four["eval"]["before"] == two["eval"]["before"]  # type: ignore[index]
    assert four["eval"]["divergence"]["mean_kl"] < two["eval"]["divergence"]["mean_kl"]  # type: ignore[index]
    assert four["eval"]["settings"]["windows"] == 4  # type: ignore[index]
    for old, new, folder in zip(before, (four, two), copies, strict=True):
        assert {**new, "eval": None} == {**old, "eval": None}
        perplexity = new["eval"]["rows"][0]["after"]  # type: ignore[index]
        assert f"{perplexity:.2f}"[:3] in (folder / "report.html").read_text()
        assert "perplexity@32" in (folder / "README.md").read_text()


def test_a_card_that_was_edited_stays(copies: list[Path], scoring: EvalOptions) -> None:
    edited, other = (folder / "README.md" for folder in copies)
    edited.write_text(edited.read_text() + "\nMine.\n")
    before = edited.read_text(), other.read_text()
    prove(copies, ["perplexity"], scoring)
    assert edited.read_text() == before[0]
    assert other.read_text() != before[1]


def test_efficiency_is_measured_for_every_artifact(copies: list[Path], scoring: EvalOptions) -> None:
    prove(copies, [], scoring, QUICK)
    for folder in copies:
        section = report(folder)["efficiency"]
        assert section["model"] == folder.name  # type: ignore[index]
        first = section["kv"][0]  # type: ignore[index]
        assert first["ratio"] == STEP / first["length"]  # room for more tokens is counted


@pytest.mark.usefixtures("_no_page")
def test_a_packed_cache_is_at_work_as_in_compress_eval(
    original: Path, copies: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    (tmp_path / "words.yaml").write_text(WORDS)
    rows = [{"text": " ".join(f"the {n * k}" for k in range(1, 12)), "end": f" hen {n} in a"} for n in range(4)]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = ("eval=null", "kv.first_flush=8", "kv.flush=8", "kv.window_min=4", "kv.sinks=2")
    planned = run(str(original), "zipcache-plus", out=tmp_path / "kv", options=RunOptions(set=sets)).out
    scoring = EvalOptions(task_path=tmp_path, baseline=str(original))
    prove([copies[0], planned], ["words"], scoring)
    (row,) = report(planned)["eval"]["rows"]  # type: ignore[index]
    assert row["after"] == pytest.approx(evaluate(str(planned), ["words"], scoring).rows[0].after.value)
    assert row["after"] != pytest.approx(row["before"], rel=1e-4)


def test_one_artifact_is_enough_and_an_original_that_moved_is_named(
    copies: list[Path], original: Path, scoring: EvalOptions, tmp_path: Path
) -> None:
    moved = shutil.copytree(original, tmp_path / "moved")
    found = report(copies[0])
    found["model"]["source"] = str(tmp_path / "gone")  # type: ignore[index]
    (copies[0] / "report.json").write_text(json.dumps(found))
    with pytest.raises(InputError, match=r"the original that .* can't be opened"):
        prove(copies[:1], ["perplexity"], scoring)
    options = EvalOptions(text=scoring.text, window=32, windows=4, baseline=str(moved))
    assert prove(copies[:1], ["perplexity"], options).names == ("w4",)


def test_the_command_prints_a_table_and_writes_a_page(copies: list[Path], text: Path, tmp_path: Path) -> None:
    line = ["prove", *map(str, copies), "--no-bench", "--tasks", "perplexity", "--text", str(text)]
    page = tmp_path / "page.html"
    result = CliRunner().invoke(main, [*line, "--window", "32", "--windows", "2", "--html", str(page)])
    assert result.exit_code == 0, (result.output, result.exception)
    assert "Perplexity" in result.stdout
    assert "w4" in page.read_text()
    assert "w2" in page.read_text()


def test_what_cannot_work_is_refused_before_a_model_is_loaded(
    copies: list[Path], tiny: Tiny, text: Path, scoring: EvalOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = quick(tiny("llama_untied"), "rtn", tmp_path / "other", text).out
    monkeypatch.setattr("compress.prove.score_all", lambda *_, **__: pytest.fail("models were loaded"))
    monkeypatch.setattr(bench_module, "Turns", lambda *_: pytest.fail("models were loaded"))
    for folders, tasks, benched, message in (
        ([copies[0], other], ["perplexity"], None, "other: wasn't made of .*llama; name its original"),
        ([copies[0], copies[0]], ["perplexity"], None, "is named twice"),
        ([tmp_path], ["perplexity"], None, "holds no report.json"),
        (copies, [], None, "there is nothing to measure"),
        (copies, ["perplexit"], QUICK, "perplexit"),
        (copies, ["passkey"], QUICK, "beyond the model's context of 512"),
    ):
        with pytest.raises(InputError, match=message):
            prove(folders, tasks, scoring, benched)
