"""Models that can't be compressed are refused by name, with the reason, before any weight is read."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from compress.calibrate.errors import InputError
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from models import save_tiny, save_tiny_gguf
from safetensors.torch import load_file, save_file

from compress import source
from compress.families import FAMILIES, REFUSALS
from compress.model import open_config, open_model

Tiny = Callable[[str], Path]


def refused(model: Path | str) -> str:
    with pytest.raises(InputError) as caught:
        open_config(str(model))
    text = str(caught.value)
    assert text.startswith(f"--model={model}: ")
    assert "\n" not in text
    return text


@pytest.fixture
def folder(tiny: Tiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("llama"), tmp_path / "model"))


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("gemma2", "norms stand after attention and MLP too"),
        ("gemma", "1 + weight"),
        ("olmo2", "instead of before them"),
        ("phi3", "fused"),
        ("qwen3_moe", "experts"),
        ("gpt2", "subtracts the mean"),
        ("mamba2", "recurrence"),
        ("brand_new", "isn't in the table"),
    ],
)
def test_families_outside_the_table(folder: Path, model_type: str, reason: str) -> None:
    edit_config(folder, model_type=model_type)
    text = refused(folder)
    assert f"the family '{model_type}' isn't supported" in text
    assert reason in text
    assert "llama, mistral, qwen2, qwen3" in text


def test_no_family_is_both_supported_and_refused() -> None:
    assert not set(FAMILIES) & set(REFUSALS)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized already (gptq)"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "is a LlamaForSequenceClassification"),
        ({"is_causal": False}, "isn't causal"),
        ({"num_key_value_heads": 4}, "6 attention heads don't divide by 4"),
        ({"num_attention_heads": 7, "num_key_value_heads": 7}, "its config isn't valid"),
        ({"rope_parameters": {"rope_type": "moon", "rope_theta": 1.0}}, "its config isn't valid"),
        ({"hidden_act": "moon"}, "its config isn't valid"),
        ({"num_hidden_layers": "3", "num_attention_heads": "6"}, "its config isn't valid"),
        ({"num_hidden_layers": 2**31}, "claims 2147483648 layers"),
        ({"model_type": None}, "names no model_type"),
        ({"intermediate_size": 96}, "has the shape [160, 96] where config.json calls for [96, 96]"),
        ({"num_hidden_layers": 4}, "9 of 38 tensors are missing from its files: model.layers.3."),
        ({"tie_word_embeddings": False}, "1 of 30 tensors are missing from its files: lm_head.weight"),
    ],
)
def test_configs(folder: Path, changes: dict[str, object], reason: str) -> None:
    edit_config(folder, **changes)
    assert reason in refused(folder)


def test_unknown_layer_type(tiny: Tiny, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny("qwen2"), tmp_path / "m"))
    edit_config(copy, layer_types=["full_attention", "chunked_attention", "full_attention"])
    assert "unknown type 'chunked_attention'" in refused(copy)


@pytest.mark.parametrize("content", ["{", "[]", "\udcff"])
def test_damaged_config(folder: Path, content: str) -> None:
    (folder / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    assert "config.json" in refused(folder)


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "holds no config.json" in refused(folder)


@pytest.mark.parametrize("keep", [0, 4, 1000, -1])
def test_truncated_safetensors(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "model.safetensors" in (text := refused(folder))
    assert "truncated or damaged" in text


def test_pickles_are_never_read(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "no weights to read" in refused(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04never opened")
    text = refused(folder)
    assert "pickles (pytorch_model.bin)" in text
    assert "save_pretrained" in text


def test_folder_with_only_gguf_names_the_file(tiny: Tiny, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    shutil.copy(tiny("llama.gguf"), folder / "m.gguf")
    assert str(folder / "m.gguf") in refused(folder)


def test_adapter_is_no_model(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    assert "an adapter" in refused(folder)


def test_integer_tensors_mean_a_quantized_model(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.int8)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "model.norm.weight has the type I8" in refused(folder)


def test_shards_and_index(tmp_path: Path) -> None:
    folder = save_tiny("mistral", tmp_path / "m", shard="300KB")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = sorted(set(content["weight_map"].values()))[1]
    (folder / shard).rename(tmp_path / shard)
    assert f"shards that its index lists are missing, first {shard}" in refused(folder)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(content["weight_map"], f"../{shard}")}))
    assert "isn't a file of this folder" in refused(folder)
    index.write_text("{}")
    assert "no weight_map" in refused(folder)
    (tmp_path / shard).rename(folder / shard)
    index.unlink()
    assert "but no model.safetensors.index.json" in refused(folder)


@pytest.mark.parametrize(
    ("keep", "reason"),
    [
        (0, "too short"),
        (20, "too short"),
        (300, "goes beyond the end"),
        (-1, "is truncated: "),
        (-50_000, "is truncated: "),
    ],
)
def test_truncated_gguf(tiny: Tiny, tmp_path: Path, keep: int, reason: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny("llama.gguf").read_bytes()[:keep])
    assert reason in refused(path)


def test_damage_anywhere_in_a_gguf_header_is_told_or_harmless(tiny: Tiny, tmp_path: Path) -> None:
    """No length in the header, however wrong, may lead to another exception, an endless loop or a huge allocation."""
    content = tiny("llama.gguf").read_bytes()
    path = tmp_path / "m.gguf"
    generator = np.random.default_rng(0)
    for position in generator.integers(4, 9000, 150):
        damaged = bytearray(content)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        try:
            open_config(str(path))
        except InputError:
            continue
        path.write_bytes(content[:position])
        refused(path)


@pytest.mark.parametrize("name", ["llama", "llama.gguf"])
def test_unreadable_file(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = tiny(name)

    def forbidden(self: Path, *args: object, **kwargs: object) -> object:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", forbidden)
    assert "can't be read (Permission denied)" in refused(path)


def test_not_a_gguf(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    assert "isn't a GGUF file" in refused(path)
    path.write_bytes(b"GGUF" + struct.pack(">I", 3) + bytes(100))
    assert "big-endian" in refused(path)


def _gguf_with(tmp_path: Path, **metadata: object) -> Path:
    """A tiny llama whose header says something else."""
    return save_tiny_gguf("llama", tmp_path / "m.gguf", metadata=metadata)


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"general.architecture": "gemma2"}, "the family 'gemma2' isn't supported"),
        ({"llama.expert_count": 8}, "experts"),
        ({"split.count": 3}, "one of 3 parts"),
        ({"llama.rope.scaling.type": "yarn"}, "scaled by 'yarn'"),
        ({"llama.embedding_length": 48}, "where config.json calls for"),
        ({"llama.attention.head_count": 0}, "needs a positive number as llama.attention.head_count, and has 0"),
    ],
)
def test_gguf_headers(tmp_path: Path, metadata: dict[str, object], reason: str) -> None:
    assert reason in refused(_gguf_with(tmp_path, **metadata))


def test_gguf_with_unknown_rope_frequencies(tmp_path: Path) -> None:
    path = save_tiny_gguf(
        "llama", tmp_path / "m.gguf", tensors={"rope_freqs.weight": np.linspace(1, 3, 8, dtype=np.float32)}
    )
    assert "can't express" in refused(path)


def test_gguf_without_a_tensor(tmp_path: Path) -> None:
    path = save_tiny_gguf("llama", tmp_path / "m.gguf", without="blk.1.ffn_up.weight")
    assert "model.layers.1.mlp.up_proj.weight" in refused(path)


def test_paths_that_do_not_exist(folder: Path) -> None:
    assert "did you mean 'model'?" in refused(folder.parent / "modle")
    assert "doesn't exist either" in refused(folder / "a" / "b")
    assert "no such file" in refused(folder.parent / "m.gguf")
    assert f"give its folder {folder}" in refused(folder / "config.json")
    assert "no such file" in refused("not a/hub id")


def test_tokenizer_missing(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(InputError, match="tokenizer can't be loaded"):
        open_model(str(folder)).tokenizer()


_ANSWER = cast(Any, SimpleNamespace(headers={}, request=None))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (GatedRepoError("x", response=_ANSWER), "accept its terms at https://huggingface.co/someone/model"),
        (RepositoryNotFoundError("x", response=_ANSWER), "hf auth login"),
        (LocalEntryNotFoundError("x"), "the Hub can't be reached; check the connection, or give a local folder"),
        (EntryNotFoundError("x"), "no config.json"),
        (HfHubHTTPError("503 busy\nmore", response=_ANSWER), "the Hub refused: 503 busy"),
    ],
)
def test_hub_errors_say_how_to_go_on(monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str) -> None:
    def fail(*args: object, **kwargs: object) -> str:
        raise error

    monkeypatch.setattr(source, "HfApi", lambda: _Hub(["model.safetensors"]))
    monkeypatch.setattr(source, "hf_hub_download", fail)
    assert reason in refused("someone/model")


def test_hub_model_is_planned_from_its_config_and_then_downloaded(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []

    def config(repo: str, name: str, local_files_only: bool) -> str:
        fetched.append(name)
        assert not local_files_only
        return str(tiny("llama") / name)

    def snapshot(repo: str, allow_patterns: list[str], ignore_patterns: list[str], local_files_only: bool) -> str:
        fetched.append("snapshot")
        assert not any("bin" in pattern for pattern in allow_patterns)
        return str(tiny("llama"))

    monkeypatch.setattr(source, "hf_hub_download", config)
    monkeypatch.setattr(source, "snapshot_download", snapshot)
    monkeypatch.setattr(source, "HfApi", lambda: _Hub(["model.safetensors", "onnx/model.safetensors", "README.md"]))
    facts = open_config("someone/model")
    assert fetched == ["config.json"]
    assert facts.checkpoint_bytes == 1000
    assert facts.dtype == torch.float32
    assert open_model("someone/model").name() == "someone/model"
    assert fetched[-1] == "snapshot"
    monkeypatch.setattr(source, "HfApi", lambda: _Hub(["pytorch_model.bin"]))
    assert "holds no safetensors" in refused("someone/model")


def test_without_a_network_the_cache_is_asked_and_nothing_is_tried_again(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cached(repo: str, *args: object, local_files_only: bool, **kwargs: object) -> str:
        assert local_files_only
        return str(tiny("llama") / "config.json") if args else str(tiny("llama"))

    monkeypatch.setattr(source, "HfApi", lambda: _Hub(None))
    monkeypatch.setattr(source, "hf_hub_download", cached)
    monkeypatch.setattr(source, "snapshot_download", cached)
    facts = open_config("someone/model")
    assert facts.checkpoint_bytes == 4 * facts.num_params
    assert open_model("someone/model").num_layers == 3


class _Hub:
    """The Hub's answer about a repository with these files; None: it can't be reached."""

    def __init__(self, names: list[str] | None) -> None:
        self.siblings = None if names is None else [_File(name) for name in names]

    def model_info(self, repo: str, files_metadata: bool, timeout: float) -> "_Hub":
        assert files_metadata
        if self.siblings is None:
            raise OfflineModeIsEnabled("no network")
        return self


class _File:
    size = 1000

    def __init__(self, rfilename: str) -> None:
        self.rfilename = rfilename
