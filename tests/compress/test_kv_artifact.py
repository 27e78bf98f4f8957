"""Artifacts with an attention plan: written, taken over, loaded, shown, refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from compress.calibrate.errors import InputError
from compress.cli.main import main
from runs import digest, distance, logits, quick, refused
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from compress.artifact.inspect import inspect
from compress.kv.attention import NAME
from compress.kv.growing import GrowingCache
from compress.options import RunOptions
from compress.pipeline import RunResult, run
from compress.recipe import Recipe
from compress.runtime import load
from compress.runtime.plan_cache import PlanCache

Tiny = Callable[[str], Path]
PLAN = "attention_plan.json"
SETS = ("eval=null", "kv.first_flush=8", "kv.flush=8", "kv.window_min=4", "kv.sinks=2")

pytestmark = pytest.mark.usefixtures("_no_page")


def packed_cache(model: Path, out: Path, *sets: str, recipe: str = "zipcache-plus") -> RunResult:
    return run(str(model), recipe, out=out, options=RunOptions(set=(*SETS, *sets)))


@pytest.fixture(scope="module")
def dense(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The llama's own weights and a plan."""
    return packed_cache(tiny("llama"), tmp_path_factory.mktemp("kv") / "dense").out


@pytest.fixture(scope="module")
def weights(tiny: Tiny, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed weights alone."""
    return quick(tiny("llama"), "rsq", tmp_path_factory.mktemp("kv") / "w", text, "weights.bits=4").out


@pytest.fixture(scope="module")
def carried(weights: Path) -> Path:
    """The same with a plan."""
    return packed_cache(weights, weights.with_name("w-kv")).out


def report_of(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def answer(model: PreTrainedModel, **kwargs: object) -> tuple[list[int], object]:
    ids = torch.arange(3, 43)[None]
    found = model.generate(ids, max_new_tokens=12, do_sample=False, return_dict_in_generate=True, **kwargs)
    return found.sequences[0].tolist(), found.past_key_values


# What is written


def test_the_models_own_weights_load_in_plain_transformers(tiny: Tiny, dense: Path) -> None:
    original = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    plain = AutoModelForCausalLM.from_pretrained(dense)
    assert torch.equal(logits(plain.eval()), logits(original.eval()))
    assert "quantization_config" not in json.loads((dense / "config.json").read_text())
    assert not list(dense.parent.glob("*.partial"))


@pytest.mark.parametrize("name", ["qwen3", "llama.gguf"])
def test_other_families_and_files(tiny: Tiny, tmp_path: Path, name: str) -> None:
    out = packed_cache(tiny(name), tmp_path / "out").out
    original = AutoModelForCausalLM.from_pretrained(tiny(name.removesuffix(".gguf"))).eval()
    assert (
        distance(logits(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()), logits(original)) < 0.02
    )


def test_the_report_names_plan_and_sizes(dense: Path) -> None:
    report = report_of(dense)
    assert PLAN in report["artifact"]["files"]
    assert {"dense", "allocated"} <= set(report["kv"]["bytes"]["4096"])
    assert report["reload_check"]["weights_identical"]
    assert Recipe.load(str(dense / "recipe.yaml")).kv == Recipe.load("zipcache-plus", SETS).kv
    assert "weights" not in report


def test_inspect_and_card_tell_of_the_cache(dense: Path) -> None:
    (line,) = [line for line in inspect(dense).lines() if "KV cache" in line]
    assert "bytes a token" in line
    assert "4,096 tokens" in line
    card = (dense / "README.md").read_text()
    assert PLAN in card
    assert "kv=False" in card
    assert "compressed-tensors>=" not in card


def test_the_same_run_again_returns_at_once_and_another_is_refused(tiny: Tiny, dense: Path) -> None:
    stamp = (dense / PLAN).stat().st_mtime_ns
    packed_cache(tiny("llama"), dense)
    assert (dense / PLAN).stat().st_mtime_ns == stamp
    with pytest.raises(InputError, match=r"kv\.ratio"):
        packed_cache(tiny("llama"), dense, "kv.ratio=0.5")


def test_a_damaged_plan_is_refused(dense: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(dense, tmp_path / "copy")
    (copied / PLAN).write_text((copied / PLAN).read_text().replace("2", "4", 1))
    with pytest.raises(InputError, match=f"{PLAN} changed"):
        load(copied)


# Weights that are taken over


def test_packed_weights_are_taken_over_byte_for_byte(weights: Path, carried: Path) -> None:
    assert digest(carried) == digest(weights)
    for name in ("config.json", "tokenizer.json"):
        assert (carried / name).read_bytes() == (weights / name).read_bytes()
    before, after = report_of(weights), report_of(carried)
    assert after["weights"] == before["weights"]
    assert after["carried"]["name"] == "rsq"
    assert after["artifact"]["weight_bytes"] == before["artifact"]["weight_bytes"]
    assert after["artifact"]["bits_per_weight"] == before["artifact"]["bits_per_weight"]
    assert after["reload_check"]["weights_identical"]
    assert "recipe rsq" in (carried / "README.md").read_text()
    plain, former = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (carried, weights))
    assert torch.equal(logits(plain), logits(former))


@pytest.mark.parametrize("sets", [("export.formats=[gguf]",), ("export.dtype=bfloat16",)])
def test_packed_weights_are_not_written_otherwise(weights: Path, tmp_path: Path, sets: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="taken over as they are"):
        packed_cache(weights, tmp_path / "out", *sets)


def test_packed_weights_are_not_quantized_again(weights: Path, tmp_path: Path, text: Path) -> None:
    with pytest.raises(InputError, match="quantized already"):
        quick(weights, "rtn", tmp_path / "out", text, "kv=zipcache")


def test_damaged_weights_are_not_taken_over(weights: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(weights, tmp_path / "copy")
    content = bytearray((copied / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copied / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"model\.safetensors changed"):
        packed_cache(copied, tmp_path / "out")


def test_scores_are_those_of_the_packed_cache(tiny: Tiny, tmp_path: Path, text: Path) -> None:
    recipe = {"base": "zipcache-plus", "eval": {"text": str(text), "window": 64, "windows": 2, "kv_chunk": 8}}
    section = run(str(tiny("llama")), recipe, out=tmp_path / "out", options=RunOptions(set=SETS[1:])).report["eval"]
    rows = {row["metric"].partition("@")[0]: row for row in section["rows"]}
    assert rows["perplexity"]["before"] != rows["perplexity"]["after"]
    assert section["divergence"]["mean_kl"] > 1e-6
    assert "fill the KV cache" in section["note"]


def test_weights_and_cache_in_one_run(tiny: Tiny, tmp_path: Path, text: Path, weights: Path) -> None:
    out = quick(tiny("llama"), "rsq", tmp_path / "out", text, "weights.bits=4", "kv=zipcache-plus", *SETS).out
    assert (out / PLAN).is_file()
    assert digest(out) == digest(weights)


# Loading


@pytest.mark.parametrize(("which", "packed"), [("dense", True), ("carried", True), ("carried", False)])
def test_a_loaded_artifact_answers_with_its_plan(which: str, packed: bool, request: pytest.FixtureRequest) -> None:
    model, _ = load(request.getfixturevalue(which), packed=packed)
    assert model.config._attn_implementation == NAME
    tokens, past = answer(model)
    assert isinstance(past, PlanCache)
    assert past.nbytes().payload < 0.6 * 16 / 8 * 51 * 3 * 2 * 2 * 16
    again, _ = answer(model, past_key_values=PlanCache(model.config, model.attention_plan))
    assert again == tokens
    with torch.no_grad():
        assert isinstance(model(torch.arange(8)[None], use_cache=True).past_key_values, PlanCache)


@pytest.mark.parametrize(("which", "packed"), [("dense", True), ("carried", True), ("carried", False)])
def test_without_its_plan_it_is_what_it_was(which: str, packed: bool, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(which)
    model, _ = load(folder, packed=packed, kv=False)
    former = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens, past = answer(model)
    assert isinstance(past, DynamicCache)
    assert tokens == answer(former)[0]


def test_without_a_cache_the_plan_changes_nothing(dense: Path) -> None:
    model, plain = load(dense)[0], load(dense, kv=False)[0]
    assert distance(logits(model), logits(plain)) < 1e-5
    ids = torch.arange(3, 43)[None]
    given = model.generate(ids, max_new_tokens=6, do_sample=False, past_key_values=GrowingCache(model.config))
    assert given.tolist() == plain.generate(ids, max_new_tokens=6, do_sample=False).tolist()


def test_a_dense_model_with_a_plan_is_saved_under_its_own_name(dense: Path, tmp_path: Path) -> None:
    model, _ = load(dense)
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_the_plan_of_another_model_is_refused_with_both_fingerprints(tiny: Tiny, dense: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(tiny("qwen3"), tmp_path / "other")
    shutil.copyfile(dense / PLAN, copied / PLAN)
    with pytest.raises(InputError, match="another model"):
        load(copied)


def test_generate_with_and_without(dense: Path) -> None:
    for flag in ("--kv", "--no-kv"):
        line = ["generate", str(dense), "--prompt", "in a hen", "--max-new-tokens", "4", flag]
        result = CliRunner().invoke(main, line)
        assert result.exit_code == 0, result.output


def test_the_command_line_refuses_heads_that_cannot_be_packed(tiny: Tiny, tmp_path: Path) -> None:
    line = ["run", "--model", str(tiny("llama_untied")), "--recipe", "zipcache", "--out", str(tmp_path / "out")]
    assert "heads of 12" in refused(*line)
