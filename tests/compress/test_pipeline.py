"""Whole runs on tiny models: what they leave behind loads in plain transformers, and is what was computed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from compress.calibrate import importance
from compress.cli.main import main
from models import CONFIGS
from runs import Log, arguments, check, decoded, digest, distance, logits, options, quick, rebuilt, refused, stored
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from compress.artifact import check as reload_check
from compress.artifact import export
from compress.bench import original
from compress.events import LayerDone, LayerStarted, ModuleDone, StageDone, StageStarted
from compress.options import RunOptions
from compress.pipeline import plan, run
from compress.recipe import Recipe

Tiny = Callable[[str], Path]


@pytest.mark.parametrize(
    ("name", "recipe"),
    [*((name, recipe) for name in CONFIGS for recipe in ("rtn", "gptq", "rsq")), ("llama.gguf", "rsq")],
)
def test_every_family_with_every_recipe(tiny: Tiny, tmp_path: Path, text: Path, name: str, recipe: str) -> None:
    result = quick(tiny(name), recipe, tmp_path / "out", text, "weights.bits=8")
    check(result)
    dense = AutoModelForCausalLM.from_pretrained(tiny(name.removesuffix(".gguf"))).eval()
    assert distance(logits(rebuilt(result.out)), logits(dense)) < 0.05  # 8 bits: the same function
    modules = result.report["weights"]["modules"]
    assert len(modules) == 21
    assert all((module["relative_error"] is None) == (recipe == "rtn") for module in modules)
    assert not result.report["weights"]["degraded"]
    assert (result.report["weights"]["rotation"]["residual"] != "none") == (recipe == "rsq")


CASES: list[tuple[str, str, tuple[str, ...]]] = [
    *(
        ("llama", "rtn", (f"weights.bits={bits}", f"weights.symmetric={symmetric}", f"weights.group_size={size}"))
        for bits in (2, 3, 4, 8)
        for symmetric, size in (("true", -1), ("false", 16))
    ),
    ("qwen2", "gptq", ("weights.bits=2", "weights.symmetric=false", "weights.group_size=-1")),
    (
        "llama",
        "rsq",
        ("weights.bits=3", "weights.symmetric=false", "weights.lm_head_bits=16", "weights.group_size=auto"),
    ),
    ("llama", "gptq", ("weights.group_size=auto", "weights.act_order=false", "weights.clip=none", "weights.sweeps=0")),
    ("llama_untied", "rsq", ("weights.overrides={'down_proj$': 8, 'self_attn': 4}",)),
    ("qwen3", "rtn", ("weights.overrides={'layers.1.mlp': 2}",)),
    ("llama", "rsq", ("weights.lm_head_bits=16", "weights.untie=auto")),
    ("llama", "rsq", ("weights.lm_head_bits=8", "weights.untie=no")),
    ("llama", "rsq", ("weights.rotation=random", "weights.untie=yes", "calibration.expansion=2")),
    ("qwen2", "gptq", ("weights.lm_head_bits=8", "weights.untie=yes")),
    ("qwen2", "rtn", ("weights.lm_head_bits=16", "weights.untie=yes")),
    ("mistral", "rtn", ("weights.lm_head_bits=8", "weights.group_size=-1")),
    ("qwen3", "rsq", ("weights.lm_head_bits=16", "export.dtype=bfloat16")),
    ("llama_untied", "rtn", ("export.dtype=float16", "weights.lm_head_bits=8")),
    *(("llama", "rsq", (f"weights.importance={strategy}",)) for strategy in importance.STRATEGIES),
]


@pytest.mark.parametrize(("name", "recipe", "sets"), CASES, ids=[" ".join((n, r, *s)) for n, r, s in CASES])
def test_settings(tiny: Tiny, tmp_path: Path, text: Path, name: str, recipe: str, sets: tuple[str, ...]) -> None:
    result = quick(tiny(name), recipe, tmp_path / "out", text, *sets)
    config = check(result)
    resolved = Recipe.load(result.report["recipe"])
    settings, weights = resolved.weights, result.report["weights"]
    assert settings is not None
    tied_before = AutoConfig.from_pretrained(tiny(name)).tie_word_embeddings
    untied = tied_before and settings.untie != "no" and (settings.untie == "yes" or settings.rotation != "none")
    assert config["tie_word_embeddings"] == (tied_before and not untied)
    assert weights["untied"] == untied
    tensors = stored(result.out)
    has_head = any(key.startswith("lm_head.") for key in tensors)
    assert has_head == (not tied_before or untied)
    assert ("lm_head.weight_packed" in tensors) == (has_head and settings.lm_head_bits == 8)
    assert any(key.endswith("zero_point") for key in tensors) == (not settings.symmetric)
    dtype = {"auto": torch.float32}.get(resolved.export.dtype) or getattr(torch, resolved.export.dtype)
    assert {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()} == {dtype}
    planned = plan(str(tiny(name)), recipe, options(recipe, text, *sets))
    assert planned.artifact_bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert planned.artifact_bytes == pytest.approx(result.report["artifact"]["weight_bytes"], rel=0.02, abs=20_000)
    assert planned.estimates["weights"].facts["group_size"] == weights["group_size"]


@pytest.mark.parametrize("recipe", ["rtn", "rsq"])
def test_a_head_of_its_own_under_a_config_that_says_tied(tiny: Tiny, tmp_path: Path, text: Path, recipe: str) -> None:
    model = shutil.copytree(tiny("llama_untied"), tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    result = quick(model, recipe, tmp_path / "out", text)
    assert check(result)["tie_word_embeddings"] is False
    assert result.report["weights"]["untied"] is False
    tensors = stored(result.out)
    planned = plan(str(model), recipe, options(recipe, text))
    assert "untied head" in planned.lines()[0]
    assert planned.artifact_bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert original(result.out).model == str(model)


def test_overrides_hold_where_they_match(tiny: Tiny, tmp_path: Path, text: Path) -> None:
    result = quick(tiny("llama"), "rtn", tmp_path / "out", text, "weights.overrides={'1.mlp.down': 8}")
    bits = {module["name"]: module["bits"] for module in result.report["weights"]["modules"]}
    assert [name for name, width in bits.items() if width == 8] == ["model.layers.1.mlp.down_proj"]


@pytest.mark.parametrize("sets", ["weights.overrides={'down_proj': 8}", "weights.lm_head_bits=8"])
def test_zero_points_and_several_widths_are_refused(tiny: Tiny, tmp_path: Path, text: Path, sets: str) -> None:
    chosen = options("rtn", text, "weights.symmetric=false", "weights.untie=yes", sets)
    assert "weights.symmetric" in refused(*arguments(tiny("llama"), "rtn", tmp_path / "out", chosen))


def test_equal_importance_is_gptq_byte_for_byte(
    tiny: Tiny, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = quick(tiny("llama"), "rsq", tmp_path / "plain", text, "weights.importance=none")
    real = quick(tiny("llama"), "rsq", tmp_path / "real", text, "weights.importance=act_norm")
    monkeypatch.setattr(importance, "act_norm", lambda x: torch.full((len(x),), 7.5))
    equal = quick(tiny("llama"), "rsq", tmp_path / "equal", text, "weights.importance=act_norm")
    assert digest(equal.out) == digest(plain.out)
    assert digest(real.out) != digest(plain.out)


def test_rtn_is_within_half_a_step_of_the_original(tiny: Tiny, tmp_path: Path, text: Path) -> None:
    result = quick(tiny("qwen3"), "rtn", tmp_path / "out", text, "weights.clip=none")
    original, tensors = stored(tiny("qwen3")), stored(result.out)
    for name, weight in decoded(result.out).items():
        if f"{name}_packed" not in tensors:
            assert torch.equal(weight, original[name]), name
            continue
        steps = tensors[f"{name}_scale"].abs().repeat_interleave(8, dim=1)
        inside = ((weight - original[name]).abs() <= 0.5001 * steps).float().mean()
        assert inside > 0.9, name  # the others lie at the end that has one level less
        assert ((weight - original[name]).abs() <= 1.0001 * steps).all(), name


def test_shards_are_the_single_file_cut(
    tiny: Tiny, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    single = quick(tiny("llama"), "gptq", tmp_path / "single", text)
    real = export.join
    monkeypatch.setattr(export, "join", lambda parts, folder, _: real(parts, folder, 60_000))
    sharded = quick(tiny("llama"), "gptq", tmp_path / "sharded", text)
    assert len(list(sharded.out.glob("model-*.safetensors"))) > 2
    check(sharded)
    one, many = stored(single.out), stored(sharded.out)
    assert one.keys() == many.keys()
    assert all(torch.equal(one[key], many[key]) for key in one)


def test_the_report_and_the_events(tiny: Tiny, tmp_path: Path, text: Path) -> None:
    log = Log()
    result = quick(tiny("llama"), "rsq", tmp_path / "out", text, log=log)
    report = result.report
    assert report["schema"] == "compress.report/1"
    assert report["model"]["family"] == "llama"
    assert report["model"]["parameters"] == sum(tensor.numel() for tensor in stored(tiny("llama")).values())
    assert report["calibration"]["source"] == str(text)
    assert report["calibration"]["samples"] == 2
    assert report["versions"]["torch"] == torch.__version__
    assert report["weights"]["rotation"] == {
        "residual": "Hadamard 12x8 (Paley I)",
        "heads": "Hadamard 16 (Sylvester)",
        "seed": 0,
    }
    assert report["seconds"] > 0
    modules = log.of(ModuleDone)
    assert [event.name for event in modules] == [module["name"] for module in report["weights"]["modules"]]
    assert all(0 < event.relative_error < 0.2 and event.damp == 0.01 and event.bits == 3 for event in modules)
    assert [event.index for event in log.of(LayerStarted)] == [event.index for event in log.of(LayerDone)] == [0, 1, 2]
    stages = ["calibration", "weights", "artifact"]
    assert [event.name for event in log.of(StageStarted)] == [event.name for event in log.of(StageDone)] == stages


def test_the_model_card(tiny: Tiny, tmp_path: Path, text: Path) -> None:
    model = shutil.copytree(tiny("llama"), tmp_path / "model")
    (model / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    card = (quick(model, "rsq", tmp_path / "out", text).out / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    facts = yaml.safe_load(front)
    assert facts["license"] == "apache-2.0"
    assert facts["library_name"] == "transformers"
    assert {"compressed-tensors", "rsq", "3-bit"} <= set(facts["tags"])
    assert "# out" in body
    assert "Hadamard 12x8" in body
    assert "None" not in card
    assert "{{" not in card


def test_scores_stand_in_report_summary_and_card(tiny: Tiny, tmp_path: Path, text: Path) -> None:
    chosen = RunOptions(set=("weights.group_size=8",), eval_tasks=("perplexity", "divergence"))
    recipe = {"base": "rtn", "eval": {"text": str(text), "window": 32, "windows": 4}}
    result = run(str(tiny("llama")), recipe, out=tmp_path / "out", options=chosen)
    evaluation = result.report["eval"]
    (row,) = evaluation["rows"]
    assert row["before"] < row["after"] < 2000
    assert row["paired"]["n"] == 4
    assert row["paired"]["improved"] + row["paired"]["worsened"] == 4
    assert evaluation["divergence"]["mean_kl"] > 0
    assert evaluation["divergence"]["tokens"] == 4 * 31
    assert evaluation["long_context"] is None
    assert json.loads((result.out / "report.json").read_text())["eval"] == json.loads(json.dumps(evaluation))
    assert len(evaluation["after"]["metrics"][0]["items"]) == 4
    assert any("perplexity" in line for line in result.summary)
    card = (result.out / "README.md").read_text()
    assert "## Results" in card
    assert result.report["eval"]["table"] in card
    assert str(text) in result.report["eval"]["note"]
    check(result)


def test_a_dry_run_writes_nothing(tiny: Tiny, tmp_path: Path, text: Path) -> None:
    out = tmp_path / "new" / "out"
    result = run(str(tiny("llama")), "rsq", out=out, options=options("rsq", text, dry_run=True))
    assert result.out == out
    assert any("Hadamard" in line for line in result.summary)
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_on_the_command_line_looks_at_out(tiny: Tiny, tmp_path: Path, text: Path) -> None:
    line = [*arguments(tiny("llama"), "rtn", tmp_path / "out", options("rtn", text)), "--dry-run"]
    result = CliRunner().invoke(main, line)
    assert result.exit_code == 0, result.output
    assert str(tmp_path / "out") in result.stdout
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()
    assert "exists and isn't an artifact" in refused(*line)


def test_a_failing_reload_check_publishes_nothing(
    tiny: Tiny, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(reload_check, "TOLERANCE", dict.fromkeys(reload_check.TOLERANCE, -1.0))
        with pytest.raises(RuntimeError, match="the artifact isn't published"):
            quick(tiny("llama"), "gptq", tmp_path / "out", text)
    assert not (tmp_path / "out").exists()
    log = Log()
    check(quick(tiny("llama"), "gptq", tmp_path / "out", text, log=log))
    assert not log.of(LayerStarted)  # the layers were not lost


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.layers.0.mlp.down_proj.weight_scale", "the first"),
        ("model.layers.2.self_attn.q_proj.bias", "q_proj.bias the first"),
        ("model.layers.1.input_layernorm.weight", "input_layernorm.weight the first"),
    ],
)
def test_a_file_that_is_not_what_was_computed_is_noticed(
    tiny: Tiny, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    real = export.join

    def damaging(parts: list[Path], folder: Path, size: int) -> dict[str, int]:
        written = real(parts, folder, size)
        tensors = load_file(folder / "model.safetensors")
        tensors[name].view(-1)[3] *= 1 + 1e-6  # far too little to be seen in the logits
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return written

    monkeypatch.setattr(export, "join", damaging)
    with pytest.raises(RuntimeError, match=f"aren't what was written.*{words}.*isn't published"):
        quick(tiny("llama_untied"), "gptq", tmp_path / "out", text)
    assert not (tmp_path / "out").exists()


def test_a_model_in_memory_that_differs_from_the_files_is_noticed(
    tiny: Tiny, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = export.join

    def damaging(parts: list[Path], folder: Path, size: int) -> dict[str, int]:
        layer = load_file(parts[1])
        layer["model.layers.0.mlp.down_proj.weight_scale"] *= 1.1
        save_file(layer, parts[1], metadata={"format": "pt"})
        return real(parts, folder, size)

    monkeypatch.setattr(export, "join", damaging)
    with pytest.raises(RuntimeError, match="logits differ from the model in memory"):
        quick(tiny("llama"), "gptq", tmp_path / "out", text)
    assert not (tmp_path / "out").exists()
