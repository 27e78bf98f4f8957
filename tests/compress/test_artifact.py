"""The artifact's parts: shards, the quantization block, the model card, inspection."""

import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from compress.calibrate.errors import InputError
from compress.cli.main import main
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from runs import quick, stored
from safetensors import safe_open
from safetensors.torch import save_file

from compress import source
from compress.artifact.compressed_tensors import (
    FORMAT,
    Scheme,
    dequantized,
    packed_tensors,
    quantization_config,
    schemes_of,
)
from compress.artifact.export import read_report
from compress.artifact.inspect import inspect
from compress.artifact.shards import join, tensor_header

Tiny = Callable[[str], Path]


@pytest.fixture(scope="module")
def artifact(tiny: Tiny, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished artifact; copy it before you change it."""
    sets = ("weights.overrides={'down_proj': 8}",)
    return quick(tiny("llama"), "rsq", tmp_path_factory.mktemp("artifact") / "out", text, *sets).out


@pytest.fixture
def copied(artifact: Path, tmp_path: Path) -> Path:
    return shutil.copytree(artifact, tmp_path / "out")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [16, -1])
def test_the_library_reads_what_we_write(bits: int, symmetric: bool, size: int) -> None:
    rows, columns, groups = 24, 80, 5 if size == 16 else 1
    generator = torch.Generator().manual_seed(bits)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    codes = torch.randint(low, high, (rows, columns), generator=generator, dtype=torch.int8)
    scale = torch.randn(rows, groups, generator=generator)  # of either sign
    zero = torch.zeros(rows, groups)
    if not symmetric:
        zero = torch.randint(low, high, (rows, groups), generator=generator).float()
    tensors = packed_tensors("m", codes, scale, zero, Scheme(bits, size, symmetric), torch.float32)
    expected = ((codes.view(rows, groups, -1) - zero[..., None]) * scale[..., None]).view(rows, columns)
    assert torch.equal(dequantized(tensors, "m", bits), expected)
    strategy: dict[str, Any] = {"strategy": "channel"} if size == -1 else {"strategy": "group", "group_size": size}
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, **strategy)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=FORMAT)
    local = {key.removeprefix("m."): tensor for key, tensor in tensors.items()}
    theirs = BaseCompressor.get_value_from_registry(FORMAT).decompress(local, scheme)["weight"]
    assert torch.equal(theirs, expected)


def test_the_commonest_scheme_applies_to_all_and_the_others_are_named() -> None:
    three, eight = Scheme(3, 64, True), Scheme(8, -1, True)
    block = quantization_config({"a": eight, "b": three, "c": three}, ["lm_head"])
    assert schemes_of(block) == [(("Linear",), three), (("a",), eight)]
    assert block["ignore"] == ["lm_head"]
    assert block["quant_method"] == "compressed-tensors"
    assert block["format"] == FORMAT
    assert block["quantization_status"] == "compressed"
    json.dumps(block)


@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        (Scheme(3, 64, True), "W3A16-G64"),
        (Scheme(4, -1, True), "W4A16-channel"),
        (Scheme(4, 128, False), "W4A16-G128-asym"),
    ],
)
def test_names_of_schemes(scheme: Scheme, name: str) -> None:
    assert str(scheme) == name


@pytest.mark.parametrize("shard_bytes", [10**9, 5_000, 1])
def test_joined_parts_hold_the_same_tensors(tmp_path: Path, shard_bytes: int) -> None:
    parts, tensors = [], {}
    for index in range(5):
        own = {
            f"{index}.w": torch.randn(10 + index, 30).to([torch.float32, torch.bfloat16][index % 2]),
            f"{index}.codes": torch.randint(-9, 9, (7,), dtype=torch.int8),  # an odd number of bytes
            f"{index}.shape": torch.tensor([index, 3]),
        }
        parts.append(tmp_path / f"part{index}.safetensors")
        save_file(own, parts[-1])
        tensors |= own
    out = tmp_path / "out"
    out.mkdir()
    written = join(parts, out, shard_bytes)
    assert written == {path.name: path.stat().st_size for path in out.iterdir()}
    found = stored(out)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) and found[key].dtype == tensors[key].dtype for key in tensors)
    files = sorted(path.name for path in out.glob("*.safetensors"))
    for name in files:
        with safe_open(out / name, "pt") as handle:
            assert handle.metadata() == {"format": "pt"}
        _, start = tensor_header(out / name)
        assert start % 8 == 0
    if shard_bytes == 10**9:
        assert files == ["model.safetensors"]
        return
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) == (5 if shard_bytes == 1 else 2)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    for name in files:
        with safe_open(out / name, "pt") as handle:
            assert {index["weight_map"][key] for key in handle.keys()} == {name}  # noqa: SIM118 (a handle is no mapping)


def test_inspection(artifact: Path) -> None:
    found = inspect(artifact)
    assert found.damaged == []
    assert found.weight_bytes == (artifact / "model.safetensors").stat().st_size
    assert sum(found.tensors.values()) == len(stored(artifact))
    text = "\n".join(found.lines())
    for words in ("llama", "W3A16-G8 on Linear", "W8A16-G8 on", "recipe rsq", "bits a weight", "worst: model.layers."):
        assert words in text
    json.dumps(found.to_json())
    told = CliRunner().invoke(main, ["inspect", str(artifact), "--json"])
    assert json.loads(told.stdout)["damaged"] == []


def test_inspection_of_a_plain_model(tiny: Tiny) -> None:
    found = inspect(tiny("llama"))
    assert found.report is None
    assert "not written by compress" in found.lines()[-1]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "recipe.yaml"])
def test_damage_is_found(copied: Path, name: str) -> None:
    data = bytearray((copied / name).read_bytes())
    data[-1] ^= 1
    (copied / name).write_bytes(data if name != "config.json" else bytes(data[:-1]) + b" ")
    found = inspect(copied)
    assert found.damaged == [name]
    assert f"DAMAGED: {name} isn't the file that was written" in found.lines()[-1]


def test_a_missing_file_is_found(copied: Path) -> None:
    (copied / "tokenizer.json").unlink()
    assert inspect(copied).damaged == ["tokenizer.json"]


@pytest.mark.parametrize(
    ("damage", "readable"),
    [
        (lambda data: data[:-100], True),
        (lambda data: data[:3], False),
        (lambda data: b"", False),
        (lambda data: b"\xff" * 8 + data[8:], False),
        (lambda data: (2**40).to_bytes(8, "little") + data[8:], False),
        (lambda data: (2).to_bytes(8, "little") + b"[]" + data[10:], False),
        (lambda data: data[:8] + b"\xff" * 20 + data[28:], False),
    ],
)
def test_a_damaged_weight_file_is_told(copied: Path, damage: Callable[[bytes], bytes], readable: bool) -> None:
    path = copied / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    if readable:
        assert inspect(copied).damaged == ["model.safetensors"]
    else:
        with pytest.raises(InputError, match="holds a file that can't be read"):
            inspect(copied)


def test_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no config\.json"):
        inspect(tmp_path / "nowhere")
    assert read_report(tmp_path) is None


@pytest.mark.parametrize("content", ["", "[1]", "{}", "{"])
def test_a_report_that_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "report.json").write_text(content)
    assert read_report(tmp_path) is None


def test_everything_in_an_artifact_is_fetched_from_the_hub_again(artifact: Path) -> None:
    files = read_report(artifact)["artifact"]["files"]  # type: ignore[index]
    assert [name for name in files if not any(fnmatch(name, pattern) for pattern in source._WANTED)] == []
