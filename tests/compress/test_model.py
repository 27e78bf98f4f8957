"""A model opened layer by layer is the model that transformers loads whole."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from models import CONFIGS, VOCAB, save_tiny, save_tiny_gguf
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress import checkpoint as checkpoint_module
from compress.checkpoint import SafetensorsCheckpoint
from compress.gguf_reader import GgufCheckpoint
from compress.model import ModelView, open_config, open_model, run_layer

Tiny = Callable[[str], Path]
GGUF_FAMILIES = ["llama", "llama_untied", "qwen2", "qwen3"]


def tokens(length: int = 24) -> Tensor:
    return torch.randint(0, VOCAB, (2, length), generator=torch.Generator().manual_seed(7))


def layerwise_logits(view: ModelView, ids: Tensor) -> Tensor:
    length = ids.shape[1]
    hidden, positions = view.embed_weight()[ids], view.position_embeddings(length)
    for index in range(view.num_layers):
        layer = view.build_layer(index, view.layer_weights(index))
        hidden = run_layer(layer, hidden, positions, view.attention_mask(index, length))
    variance = hidden.pow(2).mean(-1, keepdim=True)
    normed = view.final_norm_weight() * hidden * torch.rsqrt(variance + view.config.rms_norm_eps)
    return F.linear(normed, view.head_weight())


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("name", CONFIGS)
def test_layer_by_layer_is_the_whole_model(tiny: Tiny, name: str) -> None:
    expected = AutoModelForCausalLM.from_pretrained(tiny(name))(tokens()).logits
    torch.testing.assert_close(layerwise_logits(open_model(str(tiny(name))), tokens()), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_dense_is_from_pretrained(tiny: Tiny, name: str, dtype: torch.dtype) -> None:
    ours = open_model(str(tiny(name))).load_dense(dtype)
    theirs = AutoModelForCausalLM.from_pretrained(tiny(name), dtype=dtype)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    assert torch.equal(ours(tokens()).logits, theirs(tokens()).logits)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == theirs.config.tie_word_embeddings
    assert ours.config.dtype == dtype
    assert not ours.training


@pytest.mark.parametrize("name", GGUF_FAMILIES)
def test_gguf_is_the_same_model_as_safetensors(tiny: Tiny, name: str) -> None:
    """8 tokens: what llama.cpp's format doesn't hold is qwen2's sliding window of 8."""
    folder, file = open_model(str(tiny(name))), open_model(str(tiny(f"{name}.gguf")))
    assert torch.equal(file.load_dense()(tokens(8)).logits, folder.load_dense()(tokens(8)).logits)
    assert file.tied == folder.tied
    assert file.facts.num_params == folder.facts.num_params
    assert file.dtype == torch.float32
    for layer in range(3):
        assert file.linears(layer) == folder.linears(layer)


def test_quantized_gguf_is_what_transformers_reads(tiny: Tiny) -> None:
    path = tiny("llama-q8_0.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    view = open_model(str(path))
    assert torch.equal(view.load_dense()(tokens()).logits, theirs(tokens()).logits)
    assert view.dtype == torch.float16
    assert view.config.dtype == torch.float16
    assert not hasattr(view.config, "quantization_config")
    assert view.name() == "tiny llama"


def test_gguf_tokenizer_has_the_vocabulary_and_the_chat_template(tiny: Tiny) -> None:
    text = "hello the 12 <|im_start|>user\nan ü"
    chat = [{"role": "user", "content": "hello"}]
    ours = open_model(str(tiny("llama.gguf"))).tokenizer()
    theirs = AutoTokenizer.from_pretrained(tiny("llama"))
    assert ours(text).input_ids == theirs(text).input_ids
    assert ours.decode(ours(text).input_ids) == text
    assert ours.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(chat, tokenize=False)
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (0, 2, 0)


def test_gguf_reads_rows_in_pieces(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = GgufCheckpoint(tiny("llama-q8_0.gguf"), "m").read("model.embed_tokens.weight")
    monkeypatch.setattr("compress.gguf_reader._CHUNK", 7 * 96)  # 300 rows in pieces of 7: the last has 6
    pieces = GgufCheckpoint(tiny("llama-q8_0.gguf"), "m").read("model.embed_tokens.weight")
    assert torch.equal(whole, pieces)


def test_gguf_llama3_rope_is_recovered_from_the_stored_frequencies(tmp_path: Path) -> None:
    """transformers' legacy reader drops them and loads another model."""
    dim, factor = 16, 8.0
    plain = 500_000.0 ** -(np.arange(0, dim, 2) / dim)
    smooth = np.clip((8192 * plain / (2 * np.pi) - 1) / 3, 0, 1)
    factors = (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
    assert set(factors) > {np.float32(1), np.float32(factor)}
    metadata = {"llama.rope.freq_base": 500_000.0}
    path = save_tiny_gguf("llama", tmp_path / "m.gguf", metadata=metadata, tensors={"rope_freqs.weight": factors})
    rotary = open_model(str(path)).rotary()
    torch.testing.assert_close(rotary.inv_freq, torch.from_numpy(plain / factors).float())


@pytest.mark.parametrize(("name", "windows"), [("mistral", [8, 8, 8]), ("qwen2", [None, 8, 8]), ("llama", [None] * 3)])
def test_windows_and_masks(tiny: Tiny, name: str, windows: list[int | None]) -> None:
    view = open_model(str(tiny(name)))
    assert [view.window(layer) for layer in range(3)] == windows
    assert view.attention_mask(2, 8) is None
    mask = view.attention_mask(2, 20)
    if windows[2] is None:
        assert mask is None
    else:
        assert mask is not None
        assert mask.shape == (1, 1, 20, 20)
        assert mask[0, 0, 15].nonzero().flatten().tolist() == list(range(8, 16))


def test_facts_come_from_headers_alone(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object, name: str) -> Tensor:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(SafetensorsCheckpoint, "read", fail)
    monkeypatch.setattr(GgufCheckpoint, "read", fail)
    facts = open_config(str(tiny("mistral")))
    assert facts.linears(1)["q"].name == "model.layers.1.self_attn.q_proj"
    shapes = {role: (fact.out_features, fact.in_features) for role, fact in facts.linears(1).items()}
    assert shapes["q"] == (96, 72)
    assert shapes["k"] == shapes["v"] == (48, 72)
    assert shapes["o"] == (72, 96)
    assert shapes["gate"] == shapes["up"] == (144, 72)
    assert shapes["down"] == (72, 144)
    assert facts.head_dim == 24
    assert facts.num_layers == 3
    assert not facts.tied
    assert facts.num_params == sum(
        value.numel() for value in AutoModelForCausalLM.from_pretrained(tiny("mistral")).parameters()
    )
    assert facts.checkpoint_bytes == (tiny("mistral") / "model.safetensors").stat().st_size
    assert open_config(str(tiny("llama.gguf"))).checkpoint_bytes == tiny("llama.gguf").stat().st_size


@pytest.mark.parametrize(
    ("name", "biased"),
    [("llama", set()), ("llama_untied", set("qkvo") | {"gate", "up", "down"}), ("qwen2", set("qkv"))],
)
def test_biases_are_facts(tiny: Tiny, name: str, biased: set[str]) -> None:
    assert {role for role, fact in open_config(str(tiny(name))).linears(0).items() if fact.bias} == biased


def test_tied_head_is_the_embedding(tiny: Tiny) -> None:
    view = open_model(str(tiny("llama")))
    assert view.tied
    assert "lm_head.weight" not in view.facts.tensor_shapes()
    assert torch.equal(view.head_weight(), view.embed_weight())


def test_tied_config_with_two_different_matrices_is_untied_like_in_transformers(tiny: Tiny, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny("mistral"), tmp_path / "m")
    edit_config(folder, tie_word_embeddings=True)
    view = open_model(str(folder))
    assert not view.tied
    assert not view.config.tie_word_embeddings
    expected = AutoModelForCausalLM.from_pretrained(folder)(tokens()).logits
    assert torch.equal(view.load_dense()(tokens()).logits, expected)
    facts = open_config(str(folder))  # what a plan goes by
    assert not facts.tied
    assert facts.num_params == view.facts.num_params == open_config(str(tiny("mistral"))).num_params


def test_a_tied_matrix_that_is_stored_twice_is_tied(tiny: Tiny, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny("llama"), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert open_config(str(folder)).tied
    assert open_model(str(folder)).tied


def test_matrices_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_module, "_ROWS", 2)
    matrix = torch.arange(15.0).reshape(5, 3)
    last = matrix.clone()
    last[4, 2] += 1
    tensors = {"a": matrix, "same": matrix.to(torch.bfloat16), "last": last, "wide": torch.zeros(5, 4)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    opened = SafetensorsCheckpoint(tmp_path, "m")
    found = {name: opened.differ("a", name) for name in ("a", "same", "last", "wide", "absent")}
    assert found == {"a": False, "same": False, "last": True, "wide": True, "absent": False}


def test_layers_are_the_callers(tiny: Tiny) -> None:
    view = open_model(str(tiny("llama")))
    weights = view.layer_weights(1)
    layer: Any = view.build_layer(1, weights)
    assert layer.self_attn.q_proj.weight.data_ptr() == weights["self_attn.q_proj.weight"].data_ptr()
    assert layer.self_attn.layer_idx == 1
    weights["self_attn.q_proj.weight"].zero_()
    assert view.layer_weights(1)["self_attn.q_proj.weight"].abs().sum() > 0
    del weights["mlp.up_proj.weight"]
    with pytest.raises(RuntimeError, match=r"mlp\.up_proj\.weight"):
        view.build_layer(1, weights)


def test_shards_and_storage_type(tmp_path: Path) -> None:
    folder = save_tiny("mistral", tmp_path / "m", torch.bfloat16, shard="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    view = open_model(str(folder))
    assert view.dtype == torch.bfloat16
    assert view.embed_weight().dtype == torch.float32
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens()).logits
    assert torch.equal(view.load_dense()(tokens()).logits, expected)
    assert len(view.checkpoint.fingerprint()) == len(list(folder.glob("*.safetensors"))) + 2


def test_fingerprint_changes_with_any_file(tiny: Tiny, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny("llama"), tmp_path / "m")
    before = open_model(str(folder)).checkpoint.fingerprint()
    assert before == open_model(str(tiny("llama"))).checkpoint.fingerprint()
    edit_config(folder, rms_norm_eps=1e-5)
    after = open_model(str(folder)).checkpoint.fingerprint()
    assert {name for name in before if before[name] != after[name]} == {"config.json"}


def test_generation_config_is_the_models_own(tiny: Tiny, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny("llama"), tmp_path / "m")
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": true, "eos_token_id": [1, 2]}')
    assert open_model(str(folder)).load_dense().generation_config.temperature == 0.6
    assert open_model(str(tiny("llama.gguf"))).generation_config().eos_token_id == 2


def test_bfloat16_gguf_keeps_its_range(tmp_path: Path) -> None:
    path = save_tiny_gguf("llama", tmp_path / "m.gguf", gguf.GGMLQuantizationType.BF16)
    assert open_model(str(path)).dtype == torch.bfloat16
