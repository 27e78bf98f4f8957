"""Loading and using artifacts and other models."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from compress.calibrate.errors import InputError
from compress.cli.main import main
from runs import distance, logits, quick, rebuilt
from transformers import AutoModelForCausalLM

import compress
from compress.device import pick_device
from compress.options import GenerateOptions
from compress.runtime import generate, load

Tiny = Callable[[str], Path]


@pytest.fixture(scope="module")
def artifact(tiny: Tiny, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quick(tiny("llama"), "rtn", tmp_path_factory.mktemp("runtime") / "out", text).out


def test_an_artifact_can_be_loaded_dense(artifact: Path) -> None:
    model, tokenizer = load(artifact, packed=False)
    expected = rebuilt(artifact)
    assert not model.training
    assert {tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()} == {torch.float32}
    hidden = model.model(torch.arange(8)[None]).last_hidden_state  # a part, before the whole was ever called
    torch.testing.assert_close(hidden, expected.model(torch.arange(8)[None]).last_hidden_state, atol=1e-5, rtol=1e-4)
    assert distance(logits(model), logits(expected)) < 1e-5
    assert tokenizer.decode(tokenizer("in a hen").input_ids) == "in a hen"
    assert compress.load is load


def test_bfloat16(artifact: Path) -> None:
    model, _ = load(str(artifact), dtype=torch.bfloat16, packed=False)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert distance(logits(model).float(), logits(rebuilt(artifact))) < 0.1


@pytest.mark.parametrize("name", ["llama", "qwen3", "llama.gguf"])
def test_other_models_are_loaded_too(tiny: Tiny, name: str) -> None:
    model, tokenizer = load(tiny(name))
    expected = AutoModelForCausalLM.from_pretrained(tiny(name.removesuffix(".gguf")))
    assert distance(logits(model), logits(expected)) < 1e-5
    assert tokenizer("the").input_ids


@pytest.mark.parametrize("keep", [0, 5, -1])
def test_a_damaged_artifact_is_refused(artifact: Path, tmp_path: Path, keep: int) -> None:
    copied = shutil.copytree(artifact, tmp_path / "out")
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"damaged|can't be read"):
        load(copied)
    result = CliRunner().invoke(main, ["generate", str(copied), "--prompt", "a"])
    assert result.exit_code == 2
    assert result.stdout == ""


def test_no_such_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--model"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("options", [GenerateOptions(max_new_tokens=6), GenerateOptions(6, temperature=2.0, seed=3)])
def test_generation_is_repeatable(artifact: Path, options: GenerateOptions) -> None:
    first, again = ("".join(generate(str(artifact), "in a hen", options)) for _ in range(2))
    assert first == again
    if options.temperature:
        other = GenerateOptions(6, temperature=2.0, seed=4)
        assert first != "".join(generate(str(artifact), "in a hen", other))


def test_greedy_generation_is_that_of_transformers(artifact: Path) -> None:
    model, tokenizer = load(artifact)
    ids = tokenizer("in a hen", return_tensors="pt").input_ids
    for _ in range(8):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        if int(ids[0, -1]) == model.config.eos_token_id:
            break
    expected = tokenizer.decode(ids[0], skip_special_tokens=True).removeprefix("in a hen")
    found = "".join(generate(str(artifact), "in a hen", GenerateOptions(max_new_tokens=8, chat=False)))
    assert found == expected


def test_a_chat_template_is_used_where_there_is_one(artifact: Path, tmp_path: Path) -> None:
    ask = "".join(generate(str(artifact), "hen", GenerateOptions(max_new_tokens=8)))
    assert ask == "".join(generate(str(artifact), "hen", GenerateOptions(max_new_tokens=8, chat=True)))
    assert ask != "".join(generate(str(artifact), "hen", GenerateOptions(max_new_tokens=8, chat=False)))


def test_prompts_that_cannot_be_answered(artifact: Path, tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is empty"):
        list(generate(str(artifact), "", GenerateOptions(chat=False)))
    with pytest.raises(InputError, match="has 600 tokens, the model's context 512"):
        list(generate(str(artifact), "z" * 600, GenerateOptions(chat=False)))
    plain = shutil.copytree(tiny("llama"), tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="has no chat template"):
        list(generate(str(plain), "a", GenerateOptions(chat=True)))


def test_generation_stops_at_the_end_of_the_context(artifact: Path) -> None:
    options = GenerateOptions(max_new_tokens=50, chat=False)
    assert len("".join(generate(str(artifact), "z" * 510, options)).encode()) <= 20


@pytest.mark.parametrize("name", ["gpu", "cuda:x", ""])
def test_unknown_devices(name: str) -> None:
    with pytest.raises(InputError, match="is not a device"):
        pick_device(name)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="use --device cpu"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto").type == "cuda"
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(InputError, match="has 2 of them"):
        pick_device("cuda:2")
