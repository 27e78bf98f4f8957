"""Fixtures of the evaluation suite: a tiny model with its tokenizer, a text, and a folder with one local task."""

import json
from pathlib import Path

import pytest
from eval_builders import TASK, NamedText, make_model, make_tokenizer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def model() -> LlamaForCausalLM:
    return make_model(vocabulary=258)


@pytest.fixture(scope="session")
def text() -> NamedText:
    return NamedText("numbers.txt", "".join(f"{n} squared is {n * n}. " for n in range(100)))


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    """``tasks/`` with the task ``sums`` over ``data/questions.jsonl``: six questions of two choices."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (tmp_path / "data").mkdir()
    questions = [
        {"question": f"What is {n} + {n}?", "choices": [str(2 * n), str(2 * n + 1)], "label": n % 2} for n in range(6)
    ]
    (tmp_path / "data" / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    (folder / "sums.yaml").write_text(TASK.format(name="sums"))
    return folder


@pytest.fixture
def dataset_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """datasets keeps its copies of the questions in a temporary folder."""
    import datasets

    folder = tmp_path_factory.mktemp("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder
