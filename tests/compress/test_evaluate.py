"""Scoring models, alone and side by side."""

import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from compress.calibrate.errors import InputError
from compress.cli.main import main
from compress.evalsuite.longcontext import store
from models import build_tokenizer, save_tiny
from runs import quick, refused
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from compress import eval_inputs
from compress.artifact import export
from compress.eval_inputs import HUB_TEXT, EvalText, check_eval, open_eval_text, prepare_eval, settings_of
from compress.evaluate import evaluate
from compress.heads.sinks import sink_rate
from compress.model import ModelView
from compress.options import EvalOptions
from compress.schema import Eval

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

    monkeypatch.setattr(eval_inputs, "open_text", opened)
    monkeypatch.setattr(eval_inputs, "hub_problem", lambda: "there is no network")
    found = open_eval_text("auto", "eval.text")
    assert found == EvalText("pydoc", "from pydoc (not WikiText-2, since there is no network)", "a\n\nb")
    monkeypatch.setattr(eval_inputs, "hub_problem", lambda: None)
    assert open_eval_text("auto", "eval.haystack") == EvalText(HUB_TEXT, f"from {HUB_TEXT}", "a\n\nb")
    assert open_eval_text("own.txt", "eval.text") == EvalText("own.txt", "from own.txt", "a\n\nb")
    assert asked == [("pydoc", "eval.text"), (HUB_TEXT, "eval.haystack"), ("own.txt", "eval.text")]


def test_texts_are_checked_only_where_they_are_read() -> None:
    nowhere = Eval(text="nowhere.txt", haystack="neither.txt")
    check_eval(Eval(), ["perplexity", "passkey"], 8192)
    check_eval(Eval(text="nowhere.txt", haystack="repeat"), ["passkey"], 8192)
    check_eval(Eval(haystack="nowhere.txt"), ["perplexity"], 8192)
    with pytest.raises(InputError, match=r"eval\.text.*nowhere"):
        check_eval(nowhere, ["divergence"], None)
    with pytest.raises(InputError, match=r"eval\.haystack.*neither"):
        check_eval(nowhere, ["passkey"], 8192)


def test_recipe_and_command_line_mean_the_same() -> None:
    assert settings_of(Eval()) == settings_of(EvalOptions())
    chosen = settings_of(EvalOptions(lengths=(64, 32, 64), stride=8, task_path=Path("t"), apply_chat_template=True))
    assert (chosen.lengths, chosen.stride, chosen.task_path, chosen.apply_chat_template) == ((64, 32), 8, "t", True)


# Divergence and long context


def test_divergence_from_the_original(tiny: Tiny, artifact: Path, text: Path) -> None:
    tasks = ["perplexity", "divergence"]
    outcome = evaluate(str(artifact), tasks, options(text, baseline=str(tiny("llama")), stride=16))
    found = json.loads(json.dumps(outcome.to_json(), allow_nan=False))
    with torch.no_grad():
        p, q = (log_probabilities(path, text, 4) for path in (tiny("llama"), artifact))
    kl = (p.exp() * (p - q)).sum(-1)
    assert found["divergence"]["mean_kl"] == pytest.approx(float(kl.mean()), rel=1e-3)
    assert found["divergence"]["top1_agreement"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert (found["divergence"]["windows"], found["divergence"]["tokens"]) == (4, 31 + 3 * 16)
    assert str(text) in found["divergence"]["text"]
    assert set(found["divergence"]["greedy"]) == {"prompts", "tokens", "changed_answers", "changed_tokens"}
    assert [row["metric"] for row in found["rows"]] == ["perplexity@32/16"]
    assert outcome.scores.divergence is not None
    assert outcome.scores.divergence.sentence() in outcome.lines()
    assert outcome.lines()[-1].startswith("p: how likely")
    assert outcome.scores.divergence.sentence() in outcome.note()


def test_heads_that_rest_on_the_first_token(
    tiny: Tiny, artifact: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = str(tiny("llama"))
    # heads of random models have no sink; below this share some of them do
    monkeypatch.setattr("compress.evaluate.sink_rate", partial(sink_rate, threshold=0.05))
    found = evaluate(str(artifact), ["divergence"], options(text, baseline=original)).to_json()["sinks"]
    for which, path in (("before", tiny("llama")), ("after", artifact)):
        assert found[which] == pytest.approx(sink_percent(path, text, 0.05), abs=0.5)
        assert 0 < found[which] < 100
    assert (found["sequences"], found["tokens"], found["threshold"]) == (16, 64, 0.3)
    assert evaluate(str(artifact), ["perplexity"], options(text, baseline=original)).sinks is None
    (tmp_path / "short.txt").write_text("the hen in a barn")
    short = EvalOptions(text=str(tmp_path / "short.txt"), window=8, baseline=original)
    assert evaluate(str(artifact), ["divergence"], short).sinks is None


def sink_percent(model: Path, text: Path, threshold: float) -> float:
    """By transformers' eager attention: heads whose mean attention to the first of 64 tokens is above a threshold."""
    ids = AutoTokenizer.from_pretrained(model)(text.read_text(), return_tensors="pt").input_ids[0]
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    step = len(ids) // 16
    pieces = torch.stack([ids[i * step : i * step + 64] for i in range(16)])
    with torch.no_grad():
        seen = loaded(pieces, output_attentions=True).attentions
    return 100 * float((torch.stack(seen)[..., 0].mean(-1) > threshold).double().mean())


def log_probabilities(model: Path, text: Path, windows: int) -> torch.Tensor:
    """At the scored places of windows of 32 tokens, 16 apart, by transformers alone."""
    ids = AutoTokenizer.from_pretrained(model)(text.read_text(), return_tensors="pt").input_ids[0]
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found = []
    for index in range(windows):
        logits = loaded(ids[None, 16 * index : 16 * index + 32]).logits[0, 15 if index else 0 : -1]
        found.append(logits.double().log_softmax(-1))
    return torch.cat(found)


def test_divergence_alone(tiny: Tiny, text: Path) -> None:
    same = str(tiny("llama"))
    outcome = evaluate(same, ["divergence"], options(text, baseline=same))
    assert outcome.rows == []
    assert outcome.to_json()["divergence"]["mean_kl"] == pytest.approx(0, abs=1e-9)
    assert any("top1_agreement@32 | 1 |" in line for line in outcome.lines())


def test_a_padded_embedding_is_the_same_model(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32)
    model.resize_token_embeddings(model.config.vocab_size + 24, mean_resizing=False)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny("llama")).save_pretrained(tmp_path)
    found = evaluate(str(tmp_path), ["divergence"], options(text, baseline=str(tiny("llama")))).scores.divergence
    assert found is not None
    assert found.mean_kl == pytest.approx(0, abs=1e-6)
    assert found.top1_agreement == 1


@pytest.fixture
def _own_prompts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(store, "default_cache_dir", lambda: tmp_path / "prompts")


@pytest.mark.usefixtures("_own_prompts")
def test_needles_on_the_command_line(artifact: Path, tiny: Tiny, text: Path) -> None:
    line = ["eval", str(artifact), "--tasks", "passkey", "--baseline", str(tiny("llama")), "--lengths", "256,384"]
    result = CliRunner().invoke(main, [*line, "--depths", "2", "--haystack", str(text), "--seed", "1", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    needles = found["long_context"]
    assert (needles["lengths"], needles["depths"], needles["samples"], needles["seed"]) == ([256, 384], 2, 1, 1)
    assert str(text) in needles["haystack"]
    for side in ("before", "after"):
        assert [cell["length"] for cell in needles[side]] == [256, 256, 384, 384]
        assert all(set(cell) == {"task", "length", "depth", "score", "n"} for cell in needles[side])
    assert [row["metric"] for row in found["rows"]] == ["string_match@256", "string_match@384"]
    assert found["rows"][0]["paired"]["n"] == 2


def test_the_cache_is_the_models_and_not_the_baselines(tiny: Tiny, artifact: Path, text: Path) -> None:
    made = []

    def cache() -> DynamicCache:
        made.append(DynamicCache())
        return made[-1]

    chosen = options(text, baseline=str(tiny("llama")), kv_prompt=16)
    plain = evaluate(str(artifact), ["perplexity"], chosen)
    assert evaluate(str(artifact), ["perplexity"], chosen, cache).scores.metrics == plain.scores.metrics
    assert [one.get_seq_length() for one in made] == [32] * 4


# Bad input, before any model is loaded


@pytest.fixture
def _nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelView, "load_dense", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr(export, "load_artifact", lambda *_: pytest.fail("a model was loaded"))


@pytest.mark.usefixtures("_nothing_is_loaded", "_own_prompts")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks", "pass_key"], ["eval.tasks=pass_key", "did you mean 'passkey'?"]),
        (["--tasks", "hellaswag", "--offline"], ["eval.tasks=hellaswag", "Rowan/hellaswag", "connect to"]),
        (["--tasks", "divergence"], ["--tasks=divergence", "--baseline MODEL"]),
        (["--baseline", "OTHER"], ["--baseline=", "has another tokenizer"]),
        (["--baseline", "FEWER"], ["--baseline=", "its embedding has 40 rows, that of the model", "tokens"]),
        (["--baseline", "./nowhere"], ["--baseline=./nowhere"]),
        (["--text", "EMPTY"], ["eval.text=", "the file is empty"]),
        (["--text", "SHORT"], ["eval.window=32", "the text holds only"]),
        (["--tasks", "passkey", "--haystack", "EMPTY"], ["eval.haystack=", "the file is empty"]),
        (["--window", "513"], ["eval.window=513", "is longer than the model's context", "2 to 512"]),
        (["--tasks", "divergence", "--baseline", "SHORTER", "--window", "300"], ["eval.window=300", "2 to 256"]),
        (["--tasks", "passkey", "--lengths", "256,1024"], ["eval.lengths", "1024", "512"]),
        (["--tasks", "passkey", "--lengths", "64"], ["eval.lengths=64", "too short for passkey"]),
        (["--stride", "33"], ["eval.stride=33", "1 to 32, the window"]),
    ],
)
def test_bad_input_is_told_at_once(
    tiny: Tiny, text: Path, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("a hen")
    places = {"EMPTY": tmp_path / "empty.txt", "SHORT": tmp_path / "short.txt"}
    if "OTHER" in arguments:
        places["OTHER"] = shutil.copytree(tiny("llama"), tmp_path / "other")
        other = build_tokenizer()
        other.add_tokens(["<extra>"])
        other.save_pretrained(places["OTHER"])
    if "FEWER" in arguments:
        places["FEWER"] = save_tiny("llama", tmp_path / "fewer", vocab_size=40)
    if "SHORTER" in arguments:
        places["SHORTER"] = save_tiny("llama", tmp_path / "shorter", max_position_embeddings=256)
    given = [str(places.get(argument, argument)) for argument in arguments]
    line = refused("eval", str(tiny("llama")), "--text", str(text), "--window", "32", "--windows", "4", *given)
    for word in words:
        assert word in line


@pytest.mark.usefixtures("_nothing_is_loaded", "_own_prompts")
def test_a_chat_template_that_does_not_exist(tiny: Tiny) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(InputError, match=r"eval\.apply_chat_template=true: the model has no chat template"):
        prepare_eval(EvalOptions(apply_chat_template=True), ["piqa"], tokenizer)
