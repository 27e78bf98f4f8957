"""``compress eval`` with lm-eval's tasks: what it writes, what it loads once, what it refuses before any model."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from compress.calibrate.errors import InputError
from compress.cli.main import main
from compress.evalsuite import harness
from runs import quick, refused

from compress import eval_inputs, evaluate
from compress.artifact import export
from compress.eval_output import Output
from compress.model import ModelView

Tiny = Callable[[str], Path]

TASK = """\
task: sums
dataset_path: json
dataset_kwargs: {data_files: {validation: questions.jsonl}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: label
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""


@pytest.fixture(scope="module")
def artifact(tiny: Tiny, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quick(tiny("llama"), "rtn", tmp_path_factory.mktemp("eval-output") / "out", text).out


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tasks; datasets keeps its copies of the data elsewhere."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    place = tmp_path / "tasks"
    place.mkdir()
    rows = [{"question": f"the {n}", "choices": [" hen", f" {n}"], "label": n % 2} for n in range(6)]
    (place / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "sums.yaml").write_text(TASK)
    return place


def scored(model: Path, folder: Path, text: Path, *others: str) -> str:
    """What the command prints, of one task of lm-eval and one of ours."""
    line = ["eval", str(model), "--tasks", "sums,perplexity", "--task-path", str(folder), "--json"]
    result = CliRunner().invoke(main, [*line, "--text", str(text), "--window", "32", "--windows", "2", *others])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def test_a_folder_for_the_model_and_one_for_its_baseline(
    tiny: Tiny, artifact: Path, folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads, real = [], harness.load_tasks

    def counted(*arguments: object) -> object:
        loads.append(arguments)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(harness, "load_tasks", counted)
    monkeypatch.setattr(eval_inputs, "load_tasks", counted)
    others = ["--baseline", str(tiny("llama")), "--output", str(tmp_path / "out"), "--log-samples"]
    printed = json.loads(scored(artifact, folder, text, *others))
    assert len(loads) == 1
    for model, side in ((artifact, "scores"), (tiny("llama"), "baseline")):
        place = tmp_path / "out" / str(model).replace("/", "__")
        (results,) = place.glob("results_*.json")
        (samples,) = place.glob("samples_sums_*.jsonl")
        found = json.loads(results.read_text())
        assert found["model_name"] == str(model)
        assert found["results"]["sums"] == printed[side]["harness"]["results"]["sums"]
        values = {metric["metric"]: metric["value"] for metric in printed[side]["metrics"]}
        assert found["results"]["perplexity"]["perplexity@32,none"] == values["perplexity@32"]
        answers = [json.loads(line)["acc"] for line in samples.read_text().splitlines()]
        assert sum(answers) / 6 == values["acc"]


def test_a_file_and_a_folder_without_samples(artifact: Path, folder: Path, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    assert json.loads(scored(artifact, folder, text, "-o", str(file))) == json.loads(file.read_text())
    scored(artifact, folder, text, "-o", str(tmp_path / "found"))
    assert [path.name.split("_")[0] for path in (tmp_path / "found").glob("*/*")] == ["results"]


@pytest.mark.parametrize(
    ("path", "samples", "tasks", "message"),
    [
        ("found.json", True, "sums", "--log-samples: needs a folder"),
        ("found", True, "perplexity", "--log-samples: there is no task of lm-eval"),
        ("folder.json", False, "sums", "--output=.*folder.json: is a folder"),
        ("nowhere/found.json", False, "sums", "--output=.*: there is no folder"),
        ("text/found", False, "sums", "--output=.*text is not a folder; a file's name ends in .json"),
        ("text/found.json", False, "sums", "--output=.*text is not a folder"),
        ("text", False, "sums", "--output=.*text is not a folder"),
    ],
)
def test_a_place_that_cannot_be_written_to(tmp_path: Path, path: str, samples: bool, tasks: str, message: str) -> None:
    (tmp_path / "text").touch()
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(InputError, match=message):
        Output(tmp_path / path, samples).check([tasks])


def test_a_place_that_can(tmp_path: Path) -> None:
    for path in ("new", "new/deeper", "new.json", "."):
        Output(tmp_path / path).check(["perplexity"])
    (tmp_path / "old.json").touch()
    Output(tmp_path / "old.json").check(["sums"])
    Output(tmp_path, log_samples=True).check(["sums", "perplexity"])


@pytest.fixture
def _nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelView, "load_dense", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr(export, "load_artifact", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr(evaluate, "load_to", lambda *_: pytest.fail("a model was loaded"))


@pytest.mark.usefixtures("_nothing_is_loaded")
def test_a_broken_task_file_is_told_before_a_model_is_loaded(tiny: Tiny, folder: Path) -> None:
    (folder / "sums.yaml").write_text(TASK.replace('"{{choices}}"', '"{{options}}"'))
    line = refused("eval", str(tiny("llama")), "--tasks", "sums", "--task-path", str(folder))
    assert f"eval.tasks=sums: the task file {folder / 'sums.yaml'} does not fit its data: doc_to_choice: " in line
    assert "'options' is undefined" in line
    out = ["--output", str(folder / "sums.yaml" / "out")]
    assert "--output=" in refused("eval", str(tiny("llama")), "--tasks", "sums", "--task-path", str(folder), *out)
