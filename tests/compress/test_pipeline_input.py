"""Bad input is told in one line with exit code 2, or falls back safely; nothing is lost."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from compress.calibrate.errors import InputError
from runs import arguments, check, options, quick, refused
from safetensors.torch import load_file, save_file

from compress import planning
from compress.pipeline import run

Tiny = Callable[[str], Path]


@pytest.mark.parametrize(
    ("recipe", "sets", "words"),
    [
        ("gptq", "weights.group_size=64", ["weights.group_size=64", "96 inputs", "q_proj", "allowed: 8, 16, 32, -1"]),
        ("gptq", "weights.group_size=33", ["the nearest is 32"]),
        ("rtn", "weights.overrides={'dwn_proj': 8}", ["weights.overrides=dwn_proj", "matches no linear layer"]),
        ("rtn", "weights.overrides={'q_proj': 8}", ["vLLM fuses different bits", "q_proj 8", "k_proj 4"]),
        ("rtn", "weights.overrides={'up_proj': 2}", ["gate_proj 4", "up_proj 2"]),
        ("rsq", "calibration.seq_len=513", ["calibration.seq_len=513", "allowed: 2 to 512"]),
        ("rsq", "calibration.samples=100000", ["the text has", "tokens"]),
        ("rsq", "weights=null", ["does nothing"]),
        ("rsq", "weights.bits=5", ["weights.bits=5", "allowed: 2, 3, 4, 8"]),
    ],
)
def test_bad_settings(tiny: Tiny, tmp_path: Path, text: Path, recipe: str, sets: str, words: list[str]) -> None:
    out = tmp_path / "out"
    line = refused(*arguments(tiny("llama"), recipe, out, options(recipe, text, sets)))
    for word in words:
        assert word in line
    assert not out.exists()
    assert not list(tmp_path.glob("*.partial/layer*"))


def test_a_full_disk_is_noticed_before(tiny: Tiny, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 10**5, 10**5)  # type: ignore[attr-defined]
    monkeypatch.setattr(planning.shutil, "disk_usage", lambda _: usage)
    line = refused(*arguments(tiny("llama"), "rsq", tmp_path / "out", options("rsq", text)))
    assert "GB of disk" in line
    assert "0.00 GB free" in line
    assert list(tmp_path.iterdir()) == []


DAMAGES = [
    "model.embed_tokens.weight",
    "model.layers.1.mlp.up_proj.weight",
    "model.layers.2.input_layernorm.weight",
    "model.norm.weight",
    "lm_head.weight",
]


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("recipe", ["rtn", "rsq"])
def test_nan_in_a_weight_is_named(tiny: Tiny, tmp_path: Path, text: Path, name: str, recipe: str) -> None:
    model = shutil.copytree(tiny("llama_untied"), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors[name].view(-1)[5] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    line = refused(*arguments(model, recipe, tmp_path / "out", options(recipe, text)))
    assert f"{name} holds NaN" in line
    assert not (tmp_path / "out").exists()


def test_a_truncated_model_is_refused(tiny: Tiny, tmp_path: Path, text: Path) -> None:
    model = shutil.copytree(tiny("llama"), tmp_path / "model")
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[:-1000])
    line = refused(*arguments(model, "rsq", tmp_path / "out", options("rsq", text)))
    assert "truncated or damaged" in line


def test_unusable_activations_are_a_note_in_the_report(tiny: Tiny, tmp_path: Path, text: Path) -> None:
    model = shutil.copytree(tiny("llama"), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.post_attention_layernorm.weight"].zero_()  # gate, up and down read zeros alone
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    result = quick(model, "gptq", tmp_path / "out", text)
    names = [f"model.layers.1.mlp.{role}_proj" for role in ("gate", "up", "down")]
    assert result.report["weights"]["degraded"] == names
    assert any(line.startswith("degraded 3 modules") for line in result.summary)
    assert names[2].replace("_", r"\_") in (result.out / "README.md").read_text()
    check(result)


@pytest.mark.parametrize("content", ["file", "folder"])
def test_what_stands_at_out_is_left_alone(tiny: Tiny, tmp_path: Path, text: Path, content: str) -> None:
    out = tmp_path / "out"
    kept = out if content == "file" else out / "thesis.txt"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("years of work")
    line = refused(*arguments(tiny("llama"), "rtn", out, options("rtn", text)))
    assert "exists and isn't an artifact" in line or "is a file" in line
    assert kept.read_text() == "years of work"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_may_be_filled(tiny: Tiny, tmp_path: Path, text: Path) -> None:
    (tmp_path / "out").mkdir()
    check(quick(tiny("llama"), "rtn", tmp_path / "out", text))


def test_errors_in_python_are_input_errors(tiny: Tiny, tmp_path: Path, text: Path) -> None:
    with pytest.raises(InputError, match=r"--model=.*nowhere"):
        quick(tmp_path / "nowhere", "rtn", tmp_path / "out", text)
    with pytest.raises(InputError, match="did you mean 'rsq'"):
        run(str(tiny("llama")), "rsqq", out=tmp_path / "out")
