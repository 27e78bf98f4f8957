"""lm-eval's own files, read by lm-eval's own functions."""

import json
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
from compress.calibrate.errors import InputError
from compress.evalsuite.results_folder import write_results_folder
from compress.evalsuite.score import Material, score, tokenise
from compress.evalsuite.settings import EvalSettings
from eval_builders import TASK
from lm_eval.utils import get_file_task_name, get_results_filenames, get_sample_results_filenames, make_table


@pytest.fixture
def scored(model, tokenizer, text, task_folder, dataset_cache):
    """Scores of two tasks of lm-eval and one of ours, and the samples."""
    (task_folder / "more.yaml").write_text(TASK.format(name="more-sums"))
    settings = EvalSettings(window=32, windows=4, task_path=str(task_folder), limit=4)
    samples = {}
    material = Material(tokenise(text, tokenizer), on_samples=samples.update)
    return score(model, tokenizer, ["sums", "more-sums", "perplexity"], settings, material), samples


def test_the_layout_is_lm_evals(scored, tmp_path):
    scores, samples = scored
    written = write_results_folder(tmp_path / "deep" / "out", "org/model:v1", scores, samples)
    files = sorted(path.name for path in written.parent.iterdir())
    assert written.parent == tmp_path / "deep" / "out" / "org__model__v1"
    named = [f"model/{name}" for name in files]
    assert get_results_filenames(named) == [f"model/{written.name}"]
    tasks = [get_file_task_name(name) for name in get_sample_results_filenames(named)]
    assert sorted(tasks) == ["more-sums", "sums"]
    assert re.fullmatch(r"results_\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d\.\d+\.json", written.name)
    assert {name.rsplit("_", 1)[1].split(".json")[0] for name in files} == {written.stem.split("_")[1]}


def test_the_schema_is_lm_evals_with_our_figures_beside(scored, tmp_path):
    scores, samples = scored
    scores = replace(scores, harness=scores.harness | {"date": time.time() - 100})
    found = json.loads(write_results_folder(tmp_path, "out/demo", scores, samples).read_text())
    assert found["results"]["sums"] == scores.harness["results"]["sums"]
    assert found["configs"].keys() == {"sums", "more-sums"} == found["task_hashes"].keys()
    assert (found["model_name"], found["model_name_sanitized"]) == ("out/demo", "out__demo")
    assert found["config"]["model_args"] == {"pretrained": "out/demo"}
    (figure,) = (metric for metric in scores.metrics if metric.task == "perplexity")
    assert found["results"]["perplexity"] == {
        "alias": "perplexity",
        "perplexity@32,none": figure.value,
        "perplexity@32_stderr,none": figure.stderr,
    }
    assert found["higher_is_better"]["perplexity"] == {"perplexity@32": False}
    assert 100 <= float(found["total_evaluation_time_seconds"]) < 200
    table = make_table(found)
    assert re.search(r"\|sums *\| *1\|none *\| *0\|acc *\|↑ *\|", table)
    assert "|perplexity@32|↓" in table.replace(" ", "")
    assert "perplexity" not in scores.harness["results"]  # ours are unchanged


def test_every_question_with_its_answer(scored, tmp_path):
    from datasets import load_dataset

    scores, samples = scored
    place = write_results_folder(tmp_path, "demo", scores, samples).parent
    (file,) = place.glob("samples_sums_*.jsonl")
    rows = load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["doc_id"] == [0, 1, 2, 3]
    assert rows[1]["arguments"]["gen_args_0"]["arg_0"] == "Question: What is 1 + 1?\nAnswer:"
    assert rows[1]["doc"]["choices"] == ["2", "3"]
    assert sum(rows["acc"]) / 4 == scores.harness["results"]["sums"]["acc,none"]


def test_without_samples_and_without_tasks_of_lm_eval(scored, tmp_path):
    scores, _ = scored
    first = write_results_folder(tmp_path, "demo", scores)
    assert [path.name for path in first.parent.iterdir()] == [first.name]
    assert json.loads(first.read_text())["task_hashes"] == {}
    own = replace(scores, harness=None, metrics=scores.metrics[-1:])
    second = write_results_folder(tmp_path, "demo", own, chat_template="{{messages}}")
    assert first.exists()
    found = json.loads(second.read_text())
    assert list(found["results"]) == ["perplexity"]
    assert found["chat_template"] == "{{messages}}"
    assert "perplexity" in make_table(found)


def test_what_cannot_be_written_is_said(scored, tmp_path):
    Path(tmp_path / "demo").write_text("a file")
    with pytest.raises(InputError, match=r"--output=.*can't be written there"):
        write_results_folder(tmp_path, "demo", scored[0])
