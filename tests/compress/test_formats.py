"""Several checkpoint formats from one run: layout, report, loading, resuming, and what is refused before any work."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compress.calibrate.errors import InputError
from models import build_model, build_tokenizer, save_tiny
from runs import InterruptedRunError, Log, check, decoded, distance, logits, quick, rebuilt
from torch import Tensor

from compress.artifact import gguf, gptq
from compress.artifact.inspect import inspect
from compress.events import Event, StageStarted
from compress.options import RunOptions
from compress.pipeline import RunResult
from compress.planning import plan
from compress.runtime import load

pytestmark = pytest.mark.usefixtures("_no_page")
Tiny = Callable[[str], Path]
FORMATS = ("compressed-tensors", "gptq", "gguf")
FITTING = ("weights.group_size=32", "weights.bits=4")


def exported(model: Path, out: Path, text: Path, formats: tuple[str, ...], *sets: str, **others: Any) -> RunResult:
    return quick(model, "rtn", out, text, *FITTING, f"export.formats={json.dumps(formats)}", *sets, **others)


@pytest.fixture(scope="module")
def result(tiny: Tiny, text: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A finished artifact in all formats; copy it before you change it."""
    out = tmp_path_factory.mktemp("formats") / "out"
    return exported(tiny("llama"), out, text, FORMATS, "weights.rotation=hadamard")


def test_the_first_format_is_the_artifact_and_the_others_lie_in_it(result: RunResult) -> None:
    check(result)
    out, artifact = result.out, result.report["artifact"]
    assert artifact["format"] == "compressed-tensors"
    assert {name: facts["path"] for name, facts in artifact["formats"].items()} == {
        "compressed-tensors": ".",
        "gptq": "gptq",
        "gguf": "gguf",
    }
    assert [path.name for path in (out / "gguf").iterdir()] == ["model.gguf"]
    assert (out / "gptq" / "tokenizer.json").read_bytes() == (out / "tokenizer.json").read_bytes()
    assert not list(out.rglob("gptq-0*"))
    for facts in artifact["formats"].values():
        files = [out / name for name in facts["files"]]
        weights = sum(path.stat().st_size for path in files if path.suffix in (".safetensors", ".gguf"))
        assert facts["weight_bytes"] == weights
        assert facts["bits_per_weight"] == round(weights * 8 / result.report["model"]["parameters"], 4)
    later = {"report.json", "report.html", "README.md"}
    assert set(artifact["files"]) == {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()} - later
    found = result.report["reload_check"]["formats"]
    assert set(found) == set(FORMATS)
    assert all(each["weights_identical"] and each["relative_difference"] < 0.01 for each in found.values())
    assert result.report["weights"]["dtype"] == "float16"


def test_inspection_finds_damage_in_every_format(result: RunResult, tmp_path: Path) -> None:
    out = shutil.copytree(result.out, tmp_path / "out")
    assert inspect(out).damaged == []
    assert f"gguf: {(out / 'gguf' / 'model.gguf').stat().st_size / 1e6:.1f} MB" in "\n".join(inspect(out).lines())
    data = bytearray((out / "gguf" / "model.gguf").read_bytes())
    data[-1] ^= 1
    (out / "gguf" / "model.gguf").write_bytes(data)
    (out / "gptq" / "config.json").unlink()
    assert inspect(out).damaged == ["gguf/model.gguf", "gptq/config.json"]
    load(out)  # what isn't loaded may be damaged, or not there


@pytest.mark.parametrize("first", ["gptq", "gguf"])
def test_any_format_can_be_the_first_and_only(
    tiny: Tiny, result: RunResult, tmp_path: Path, text: Path, first: str
) -> None:
    made = exported(tiny("llama"), tmp_path / "out", text, (first,), "weights.rotation=hadamard")
    assert made.report["artifact"]["format"] == first
    model, tokenizer = load(made.out)
    assert distance(logits(model), logits(rebuilt(result.out))) < 1e-5
    assert tokenizer("in a hen").input_ids == build_tokenizer()("in a hen").input_ids
    found = inspect(made.out)
    assert found.weight_bytes == made.report["artifact"]["weight_bytes"] > 0
    assert ("W4A16-G32 on" in "\n".join(found.lines())) == (first == "gptq")
    assert found.damaged == []


def test_an_interrupted_export_ends_in_the_same_files(
    tiny: Tiny, result: RunResult, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = ("weights.rotation=hadamard",)

    def begun(event: Event) -> bool:
        return event == StageStarted("artifact")

    with pytest.raises(InterruptedRunError):
        exported(tiny("llama"), tmp_path / "out", text, FORMATS, *sets, log=Log(begun))

    def killed(codes: Tensor, scale: Tensor) -> Tensor:
        raise InterruptedRunError

    with monkeypatch.context() as patch:
        patch.setattr(gguf, "to_q4_0", killed)
        with pytest.raises(InterruptedRunError):
            exported(tiny("llama"), tmp_path / "out", text, FORMATS, *sets)
    assert (tmp_path / "out.partial" / "artifact" / "gguf" / "model.gguf").exists()
    again = exported(tiny("llama"), tmp_path / "out", text, FORMATS, *sets)
    assert again.report["artifact"]["files"] == result.report["artifact"]["files"]


@pytest.mark.parametrize(("name", "module", "function"), [("gguf", gguf, "to_q4_0"), ("gptq", gptq, "to_gptq_words")])
def test_a_wrong_format_is_never_published(
    tiny: Tiny, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: Any, function: str
) -> None:
    real = getattr(module, function)

    def wrong(*arguments: Tensor) -> Tensor:
        made: Tensor = real(*arguments)
        made[-1, -1] ^= 1
        return made

    monkeypatch.setattr(module, function, wrong)
    with pytest.raises(RuntimeError, match=rf"artifact/{name} was reloaded and 21 tensors aren't what was written"):
        exported(tiny("llama"), tmp_path / "out", text, ("compressed-tensors", name))
    assert not (tmp_path / "out").exists()


REFUSED: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "gptq 3 bits": (("export.formats=gptq", "weights.bits=3"), ["take 4 and 8 bits", "q_proj 3", "weights.bits=4"]),
    "gptq 2 bits": (("export.formats=gptq", "weights.bits=2"), ["take 4 and 8 bits", "leave gptq out"]),
    "gptq mixed": (("export.formats=gptq", "weights.overrides={'down_proj': 8}"), ["one width", "weights.overrides"]),
    "gptq head": (("export.formats=gptq", "weights.lm_head_bits=8", "weights.untie=yes"), ["weights.lm_head_bits=16"]),
    "gptq v1 zero": (("export.formats=gptq", "weights.symmetric=false"), ["zero point 0", "gptq_version=2"]),
    "gptq dtype": (
        ("export.formats=gptq", "export.dtype=bfloat16"),
        ["scales of gptq", "auto, float16"],
    ),
    "gguf group": (("export.formats=gguf", "weights.group_size=16"), ["group_size is 16", "weights.group_size=32"]),
    "gguf 3 bits": (("export.formats=gguf", "weights.bits=3"), ["hold 4 and 8 bits", "set weights.bits=4"]),
    "gguf override": (("export.formats=gguf", "weights.overrides={'down_proj': 2}"), ["down_proj 2", "to 4 or 8 bits"]),
    "gguf asym": (("export.formats=gguf", "weights.symmetric=false"), ["no zero points", "weights.symmetric=true"]),
    "gguf dtype": (("export.formats=[gptq, gguf]", "export.dtype=float32"), ["scales of gptq and gguf are float16"]),
    "twice": (("export.formats=[gptq, gptq]",), ["export.formats", "twice"]),
    "unknown": (("export.formats=ggml",), ["export.formats", "compressed-tensors, gptq, gguf"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_format_cannot_hold_is_refused_at_once(tiny: Tiny, case: str) -> None:
    sets, words = REFUSED[case]
    with pytest.raises(InputError) as refused:
        plan(str(tiny("llama")), "rtn", RunOptions(set=("eval=null", *FITTING, *sets)))
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"intermediate_size": 100}, ["100 outputs of model.layers.0.mlp.gate_proj", "whole 32-bit words"]),
        ({"hidden_size": 100, "num_attention_heads": 10, "head_dim": 10}, ["100 inputs of model.layers.0.self_attn"]),
    ],
)
def test_words_that_are_not_filled(tmp_path: Path, changes: dict[str, int], words: list[str]) -> None:
    build_model("llama", **changes).save_pretrained(tmp_path)
    sets = ("eval=null", "weights.group_size=-1", "export.formats=gptq")
    with pytest.raises(InputError) as refused:
        plan(str(tmp_path), "rtn", RunOptions(set=sets))
    for word in words:
        assert word in str(refused.value)


ROPE = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "yarn", **ROPE},
        {"rope_type": "dynamic", **ROPE},
        {"rope_type": "llama3", **ROPE, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ],
)
def test_a_rope_that_gguf_does_not_describe(tmp_path: Path, rope: dict[str, Any]) -> None:
    build_model("llama", rope_parameters=rope).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=rf"RoPE scaling \(.*{rope['rope_type']}.*leave gguf out"):
        plan(str(tmp_path), "rtn", RunOptions(set=("eval=null", *FITTING, "export.formats=gguf")))


def test_the_plan_tells_what_the_formats_decide(tmp_path: Path) -> None:
    save_tiny("mistral", tmp_path, hidden_size=64, intermediate_size=96, head_dim=32, sliding_window=8)
    one = plan(str(tmp_path), "rtn", RunOptions(set=("eval=null", *FITTING)))
    all_three = plan(str(tmp_path), "rtn", RunOptions(set=("eval=null", *FITTING, f"export.formats={list(FORMATS)}")))
    notes = "\n".join(all_three.notes())
    assert "export.dtype auto -> float16: the type of scales in gptq and gguf" in notes
    assert "gguf: 8 tokens of context instead of 512" in notes
    assert not any("float16" in note or "gguf" in note for note in one.notes())
    assert all_three.disk_bytes > one.disk_bytes + all_three.artifact_bytes


def test_a_later_format_of_compressed_tensors(tiny: Tiny, result: RunResult, tmp_path: Path, text: Path) -> None:
    formats = ("gguf", "compressed-tensors")
    made = exported(tiny("llama"), tmp_path / "out", text, formats, "weights.rotation=hadamard")
    mine, others = decoded(made.out / "compressed-tensors"), decoded(result.out)
    assert mine.keys() == others.keys()
    assert all(torch.equal(mine[name], others[name]) for name in mine)
