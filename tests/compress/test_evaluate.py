"""Scoring models, alone and side by side."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from compress.calibrate.errors import InputError
from compress.cli.main import main
from runs import quick
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress import evaluate as module
from compress.evaluate import HUB_TEXT, EvalText, check_eval, eval_text, evaluate
from compress.options import EvalOptions

Tiny = Callable[[str], Path]


@pytest.fixture(scope="module")
def artifact(tiny: Tiny, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quick(tiny("llama"), "gptq", tmp_path_factory.mktemp("evaluate") / "out", text).out


def options(text: Path, **others: object) -> EvalOptions:
    return EvalOptions(text=str(text), window=32, windows=4, **others)  # type: ignore[arg-type]


def perplexity(model: Path, text: Path) -> float:
    """Of the first four windows of 32 tokens, by transformers alone."""
    ids = AutoTokenizer.from_pretrained(model)(text.read_text(), return_tensors="pt").input_ids[0, : 4 * 32].view(4, 32)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(ids).logits
    return math.exp(float(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())))


def test_an_artifact_beside_its_original(tiny: Tiny, artifact: Path, text: Path) -> None:
    outcome = evaluate(str(artifact), ["perplexity"], options(text, baseline=str(tiny("llama"))))
    (row,) = outcome.rows
    assert row.before.value == pytest.approx(perplexity(tiny("llama"), text), rel=1e-4)
    assert row.after.value == pytest.approx(perplexity(artifact, text), rel=1e-4)
    assert row.before.value != row.after.value
    assert outcome.baseline is not None
    found = json.loads(json.dumps(outcome.to_json()))
    assert found["rows"][0]["ratio"] == pytest.approx(row.after.value / row.before.value)
    assert found["rows"][0]["delta"] == pytest.approx(row.after.value - row.before.value)
    lines = outcome.lines()
    assert str(text) in lines[0]
    assert any("perplexity@32" in line for line in lines)


def test_one_model_alone(tiny: Tiny, text: Path) -> None:
    outcome = evaluate(str(tiny("llama.gguf")), ["perplexity"], options(text))
    assert outcome.baseline is None
    assert outcome.rows == []
    assert outcome.scores.metrics[0].value == pytest.approx(perplexity(tiny("llama"), text), rel=1e-4)
    assert outcome.to_json()["baseline"] is None
    assert outcome.lines()[1] == "| task | metric | value |"


def test_the_command(artifact: Path, text: Path) -> None:
    line = ["eval", str(artifact), "--tasks", "perplexity", "--text", str(text), "--window", "32", "--windows", "4"]
    result = CliRunner().invoke(main, [*line, "--json"])
    assert result.exit_code == 0, result.output
    value = json.loads(result.stdout)["scores"]["metrics"][0]["value"]
    assert value == pytest.approx(perplexity(artifact, text), rel=1e-4)


@pytest.mark.parametrize(
    ("tasks", "source", "message"),
    [
        ([], None, "names no task"),
        (["perplexityy"], None, "perplexityy"),
        (["perplexity"], "nowhere.txt", r"eval\.text.*nowhere\.txt"),
    ],
)
def test_bad_input(tiny: Tiny, tasks: list[str], source: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(str(tiny("llama")), tasks, EvalOptions(text=source or "pydoc"))


def test_a_text_shorter_than_a_window(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a hen")
    with pytest.raises(InputError, match="token"):
        evaluate(str(tiny("llama")), ["perplexity"], options(tmp_path / "short.txt"))


def test_the_default_text_names_why_it_is_not_wikitext(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def opened(spec: str, option: str) -> EvalText:
        asked.append((spec, option))
        return type("Source", (), {"name": spec, "origin": f"from {spec}", "documents": ["a", "b"]})()

    monkeypatch.setattr(module, "open_text", opened)
    monkeypatch.setattr(module, "hub_problem", lambda: "there is no network")
    found = eval_text("auto", ["perplexity", "piqa"])
    assert found == EvalText("pydoc", "from pydoc (not WikiText-2, since there is no network)", "a\n\nb")
    monkeypatch.setattr(module, "hub_problem", lambda: None)
    assert eval_text("auto", ["perplexity"]) == EvalText(HUB_TEXT, f"from {HUB_TEXT}", "a\n\nb")
    assert eval_text("own.txt", ["perplexity"]) == EvalText("own.txt", "from own.txt", "a\n\nb")
    assert eval_text("auto", ["piqa"]) is None
    assert {option for _, option in asked} == {"eval.text"}
    assert len(asked) == 3


def test_the_text_is_checked_only_where_it_is_read() -> None:
    check_eval(["piqa"], None, "nowhere.txt")
    check_eval(["perplexity"], None, "auto")
    with pytest.raises(InputError, match=r"eval\.text"):
        check_eval(["perplexity"], None, "nowhere.txt")
