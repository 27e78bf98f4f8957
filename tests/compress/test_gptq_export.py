"""GPTQ checkpoints: read by Microsoft's loader of ONNX Runtime GenAI, and version 2 by the format's description."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compress.calibrate.errors import InputError
from onnxruntime_genai.models.loaders.gptq import GPTQModel
from runs import decoded, distance, logits, quick, stored
from torch import Tensor

from compress.artifact.gptq import CONFIG_FILE, GptqCheckpoint, open_gptq
from compress.runtime import load

pytestmark = pytest.mark.usefixtures("_no_page")
Tiny = Callable[[str], Path]
FORMATS = "export.formats=[compressed-tensors, gptq]"


def theirs(folder: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, dequantized weight and scales of every quantized module, as the third party's loader repacks them."""
    config = json.loads((folder / "config.json").read_text())
    kv_size = config["num_key_value_heads"] * config["head_dim"]
    attributes = {"config": config["quantization_config"], "use_g_idx": False}
    sizes = (config["num_attention_heads"] * config["head_dim"], kv_size, config["intermediate_size"])
    model = GPTQModel("gptq", str(folder), attributes, *sizes, config["num_hidden_layers"])
    for index, layer in enumerate(model.layers):
        for part in ("self_attn", "mlp"):
            for name, module in vars(getattr(layer, part)).items():
                if getattr(module, "qweight", None) is not None:
                    yield f"model.layers.{index}.{part}.{name}", *dequantized(module)


def dequantized(module: Any) -> tuple[Tensor, Tensor]:
    """From the blocks of ONNX Runtime's MatMulNBits: [N, K / g, bytes], at 4 bits the low nibble first."""
    rows, groups, _ = module.qweight.shape
    codes, zeros = module.qweight, module.qzeros
    if module.bits == 4:
        codes, zeros = (torch.stack([words & 15, words >> 4], -1).flatten(-2) for words in (codes, zeros))
    zeros = zeros.view(rows, -1)[:, :groups].unsqueeze(-1)
    scales = module.scales.view(rows, groups).float()
    return ((codes.float() - zeros) * scales.unsqueeze(-1)).view(rows, -1), scales


@pytest.mark.parametrize(
    "sets",
    [("weights.bits=8",), ("weights.bits=4", "weights.rotation=random", "weights.group_size=16")],
)
def test_a_third_party_reads_the_same_weights(tiny: Tiny, tmp_path: Path, text: Path, sets: tuple[str, ...]) -> None:
    out = quick(tiny("llama"), "rtn", tmp_path / "out", text, "weights.group_size=32", FORMATS, *sets).out
    expected, negative = decoded(out), 0
    found = list(theirs(out / "gptq"))
    assert len(found) == 21
    for name, weight, scales in found:
        assert torch.equal(weight, expected[f"{name}.weight"]), name
        negative += int((scales < 0).sum())
    assert negative > 100  # signed scales, docs/adr/0002
    ours, words = stored(out), stored(out / "gptq")
    assert all(torch.equal(words[f"{name}.qweight"].t(), ours[f"{name}.weight_packed"]) for name, _, _ in found)


@pytest.mark.parametrize(
    ("name", "sets"),
    [
        ("llama", ("weights.bits=4",)),
        ("llama", ("weights.bits=8", "weights.symmetric=false")),
        ("llama_untied", ("weights.bits=4", "weights.symmetric=false", "weights.rotation=hadamard")),
        ("qwen3", ("weights.bits=8", "weights.group_size=-1")),
    ],
)
def test_version_2_holds_the_same_weights(
    tiny: Tiny, tmp_path: Path, text: Path, name: str, sets: tuple[str, ...]
) -> None:
    sets = ("weights.group_size=16", FORMATS, "export.gptq_version=2", *sets)
    out = quick(tiny(name), "rtn", tmp_path / "out", text, *sets).out
    expected, checkpoint = decoded(out), GptqCheckpoint(out / "gptq")
    assert set(checkpoint.names()) == expected.keys()
    for key, weight in expected.items():
        assert checkpoint.shape(key) == weight.shape
        assert torch.equal(checkpoint.read(key), weight), key
    block = json.loads((out / "gptq" / "config.json").read_text())["quantization_config"]
    assert block["checkpoint_format"] == "gptq_v2"
    if block["sym"]:
        zeros = stored(out / "gptq")["model.layers.0.mlp.up_proj.qzeros"]
        assert {word & 0xFFFFFFFF for word in zeros.flatten().tolist()} == {
            0x88888888 if block["bits"] == 4 else 0x80808080
        }


def test_the_folder_of_a_checkpoint(tiny: Tiny, tmp_path: Path, text: Path) -> None:
    sets = ("weights.group_size=16", "weights.bits=4", "export.formats=gptq")
    out = quick(tiny("llama_untied"), "rtn", tmp_path / "out", text, *sets).out
    block = json.loads((out / "config.json").read_text())["quantization_config"]
    assert block == json.loads((out / CONFIG_FILE).read_text())
    assert block["quant_method"] == "gptq"
    assert (block["bits"], block["group_size"], block["sym"], block["desc_act"]) == (4, 16, True, False)
    assert block["checkpoint_format"] == "gptq"
    tensors = stored(out)
    shapes = {
        kind: tensors[f"model.layers.1.mlp.down_proj.{kind}"] for kind in ("qweight", "qzeros", "scales", "g_idx")
    }
    assert {kind: list(tensor.shape) for kind, tensor in shapes.items()} == {
        "qweight": [96 * 4 // 32, 48],
        "qzeros": [6, 48 * 4 // 32],
        "scales": [6, 48],
        "g_idx": [96],
    }
    assert shapes["g_idx"].tolist() == [column // 16 for column in range(96)]
    assert shapes["scales"].dtype == torch.float16
    assert tensors["model.layers.1.mlp.down_proj.bias"].dtype == torch.float16
    assert distance(logits(load(out, packed=False)[0]), logits(open_gptq(out).load_dense())) == 0


def test_words_of_another_writer(tiny: Tiny, tmp_path: Path, text: Path) -> None:
    """Columns in another order of groups (desc_act) are read; several widths and unknown versions aren't guessed at."""
    sets = ("weights.bits=4", "weights.group_size=16", "export.formats=gptq")
    out = quick(tiny("qwen3"), "rtn", tmp_path / "out", text, *sets).out
    checkpoint, name = GptqCheckpoint(out), "model.layers.0.mlp.up_proj"
    before = checkpoint.read(f"{name}.weight")
    scales = stored(out)[f"{name}.scales"].float()
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0)) // 16
    real = checkpoint._stored
    checkpoint._stored = lambda key: order.int() if key == f"{name}.g_idx" else real(key)  # type: ignore[method-assign]
    codes = before / scales.t().repeat_interleave(16, 1)
    assert torch.allclose(checkpoint.read(f"{name}.weight"), codes * scales[order].t(), rtol=1e-5)
    config = json.loads((out / "config.json").read_text())
    for key, value in {"dynamic": {"+:.*": {"bits": 8}}, "checkpoint_format": "marlin"}.items():
        changed = config | {"quantization_config": config["quantization_config"] | {key: value}}
        (out / "config.json").write_text(json.dumps(changed))
        with pytest.raises(InputError, match=key):
            GptqCheckpoint(out)
