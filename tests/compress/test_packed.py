"""Artifacts with packed weights in memory: the same answers as dense, in every way of generating."""

import copy
import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from compress.calibrate.errors import InputError
from compress.evalsuite.efficiency import HighWater, allocated
from compress.kernels import native, triton_support
from compress.kernels.quant_linear import quant_linear
from models import CONFIGS, save_tiny
from runs import distance, logits, quick, refused, stored
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.device import pick_dtype
from compress.evaluate import evaluate
from compress.memory import release
from compress.options import EvalOptions
from compress.runtime import PackedLinear, load, loading
from compress.runtime.formats import packed_format
from compress.runtime.linear import Compute
from compress.runtime.loading import find
from compress.runtime.packed import packed_folder
from compress.runtime.stored import StoredTensors

Tiny = Callable[[str], Path]
Artifacts = Callable[..., Path]
FORMATS = "export.formats=[compressed-tensors,gptq]"
MIXED = ("weights.bits=3", "weights.overrides={down_proj: 8, layers.1: 2}", "weights.lm_head_bits=8")
ASYMMETRIC = ("weights.bits=2", "weights.symmetric=false")
CHANNELS = ("weights.group_size=-1", "export.dtype=bfloat16")


@pytest.fixture(scope="module")
def artifacts(tiny: Tiny, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """``artifacts(name, *sets)``: a quick artifact of a tiny model, made once."""
    made: dict[tuple[str, ...], Path] = {}

    def make(name: str, *sets: str) -> Path:
        if (name, *sets) not in made:
            out = tmp_path_factory.mktemp("packed") / "out"
            made[name, *sets] = quick(tiny(name), "rtn", out, text, *(sets or (FORMATS,))).out
        return made[name, *sets]

    return make


def pair(folder: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    return load(folder)[0], load(folder, packed=False)[0]


def ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 300, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(batch: int, length: int) -> dict[str, Tensor]:
    """A batch whose sequences are padded on the left by 0, 1, 2, ... tokens."""
    mask = torch.ones(batch, length, dtype=torch.long)
    for row in range(batch):
        mask[row, :row] = 0
    return {"input_ids": ids(batch, length) * mask, "attention_mask": mask}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])
def test_logits_are_those_of_the_dequantized_weights(artifacts: Artifacts, name: str, form: str) -> None:
    out = artifacts(name)
    packed, dense = pair(out if form == "compressed-tensors" else out / form)
    assert distance(logits(packed), logits(dense)) < 1e-4
    assert isinstance(packed, type(dense))
    layers = [module for module in packed.modules() if isinstance(module, PackedLinear)]
    assert len(layers) == 21
    assert not any(isinstance(module, nn.Linear) for module in packed.modules())
    for layer, other in zip(layers, (m for m in dense.model.layers.modules() if isinstance(m, nn.Linear)), strict=True):
        torch.testing.assert_close(layer.dequantize(), other.weight, atol=1e-6, rtol=1e-4)


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "temperature": 1.5, "num_return_sequences": 3},
    "penalty": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("way", WAYS)
def test_generation_is_that_of_the_dense_model(artifacts: Artifacts, name: str, way: str) -> None:
    found = []
    for model in pair(artifacts(name)):
        torch.manual_seed(1)
        settings = {"do_sample": False, "min_new_tokens": 14, "max_new_tokens": 14} | WAYS[way]
        found.append(model.generate(**padded(2, 9), **settings))
    assert found[0].shape[1] == 23
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["llama", "llama_untied"])
def test_prompt_lookup_and_assistants(artifacts: Artifacts, name: str) -> None:
    packed, dense = pair(artifacts(name))
    prompt = {"input_ids": ids(1, 5).repeat(1, 3), "attention_mask": torch.ones(1, 15, dtype=torch.long)}
    settings = {"do_sample": False, "max_new_tokens": 14, "min_new_tokens": 14}
    expected = dense.generate(**prompt, **settings)
    assert torch.equal(packed.generate(**prompt, **settings, prompt_lookup_num_tokens=3), expected)
    assert torch.equal(packed.generate(**prompt, **settings, assistant_model=packed), expected)


@pytest.mark.parametrize("sets", [MIXED, ASYMMETRIC, CHANNELS], ids=["mixed", "asymmetric", "channels"])
@pytest.mark.parametrize("name", ["qwen3", "llama_untied"])
def test_widths_and_schemes(artifacts: Artifacts, name: str, sets: tuple[str, ...]) -> None:
    packed, dense = pair(artifacts(name, *sets))
    assert distance(logits(packed), logits(dense)) < 1e-4
    bits = {key: module.bits for key, module in packed.named_modules() if isinstance(module, PackedLinear)}
    if sets is MIXED:
        assert bits["model.layers.0.mlp.down_proj"] == bits["lm_head"] == 8
        assert bits["model.layers.1.mlp.up_proj"] == 2
        assert bits["model.layers.2.mlp.up_proj"] == 3
    settings = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    assert torch.equal(*(model.generate(**padded(2, 6), **settings) for model in (packed, dense)))


def test_nothing_dense_stays(artifacts: Artifacts) -> None:
    out = artifacts(
        "llama", "weights.group_size=32", "weights.lm_head_bits=8", "weights.untie=yes", "export.dtype=float16"
    )
    model, _ = load(out)
    files = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert allocated(model).nbytes < 1.05 * files
    assert model.model.embed_tokens.weight.dtype == torch.float16
    assert model.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert "bits=8, group_size=32, symmetric" in repr(model.lm_head)
    tied, _ = load(artifacts("qwen2"))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


@pytest.mark.parametrize("change", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), copy.deepcopy, Tensor.clone])
def test_a_tied_head_stays_one_with_the_embedding(artifacts: Artifacts, change: Callable[[Any], Any]) -> None:
    model, _ = load(artifacts("qwen2"))
    before = allocated(model).nbytes, model.model.embed_tokens.weight.dtype
    changed = model._apply(change) if change is Tensor.clone else change(model)  # as to(device) does
    head, embedding = changed.lm_head.weight, changed.model.embed_tokens.weight
    assert head is embedding
    assert allocated(changed).nbytes <= before[0]
    assert embedding.dtype == before[1]
    if change is copy.deepcopy:
        assert embedding.data_ptr() != model.model.embed_tokens.weight.data_ptr()
        model.model.embed_tokens.weight.zero_()
        assert embedding.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sets", [CHANNELS, ASYMMETRIC], ids=["bfloat16", "float32"])
def test_stored_scales_keep_their_type(artifacts: Artifacts, sets: tuple[str, ...], dtype: torch.dtype) -> None:
    model, _ = load(artifacts("llama_untied", *sets))
    layer, scale = model.model.layers[1].mlp.up_proj, model.model.layers[1].mlp.up_proj.scale.clone()
    expected = logits(model)
    assert scale.dtype == (torch.bfloat16 if sets is CHANNELS else torch.float32)
    model.to(dtype)
    assert torch.equal(layer.scale, scale)
    assert layer.scale.dtype == scale.dtype
    assert model.model.embed_tokens.weight.dtype == scale.dtype
    found = logits(model)
    assert found.dtype == layer.bias.dtype == dtype
    assert distance(found.float(), expected) < (1e-6 if dtype == torch.float32 else 0.1)


@pytest.mark.skipif(not HighWater(torch.device("cpu")).resettable, reason="memory high water can't be begun anew here")
def test_peak_memory_while_loading(tmp_path: Path, text: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_hidden_layers": 8}
    out = quick(save_tiny("llama", tmp_path / "m", **sizes), "rtn", tmp_path / "out", text, "weights.group_size=64").out
    load(out)  # what is imported on the way
    release()
    water = HighWater(torch.device("cpu"))
    water.reset()
    model, _ = load(out)
    peak, files = water.peak(), (out / "model.safetensors").stat().st_size
    assert peak is not None
    assert allocated(model).nbytes <= 1.02 * files
    assert files > 16_000_000  # so that scratch, 4 MB whatever the model's size, is less than 0.3 of it
    assert peak < 1.3 * files


@pytest.mark.parametrize("threads", [1, 3])
def test_threads(artifacts: Artifacts, threads: int) -> None:
    one, more = load(artifacts("llama"))[0], load(artifacts("llama"), threads=threads)[0]
    settings = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}
    assert torch.equal(one.generate(**padded(2, 6), **settings), more.generate(**padded(2, 6), **settings))
    with pytest.raises(InputError, match="--threads=0: nothing would be computed"):
        load(artifacts("llama"), threads=0)
    layers = [module for module in more.modules() if isinstance(module, PackedLinear)]
    assert {layer.threads for layer in layers} == {threads}


@pytest.mark.parametrize("command", ["generate", "serve", "eval"])
def test_threads_of_commands(artifacts: Artifacts, command: str, monkeypatch: pytest.MonkeyPatch, text: Path) -> None:
    found: list[Compute] = []

    def stop(self: Any, compute: Compute, *args: Any, **kwargs: Any) -> None:
        found.append(compute)
        raise InputError("--model", "x", "was to be loaded")

    monkeypatch.setattr(loading.Unloaded, "open", stop)
    others = {
        "generate": ["--prompt", "a"],
        "serve": ["--port", "0"],
        "eval": ["--packed", "--text", str(text), "--window", "16", "--windows", "1"],
    }[command]
    assert "was to be loaded" in refused(command, str(artifacts("llama")), *others, "--threads", "3")
    assert {compute.threads for compute in found} == {3}
    assert "0" in refused(command, str(artifacts("llama")), *others, "--threads", "0")


def test_the_type_that_a_device_computes_in(artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(artifacts("llama"))[0].dtype == pick_dtype(torch.device("cpu")) == torch.float32
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    found: list[Compute] = []
    monkeypatch.setattr(loading.Unloaded, "open", lambda self, compute, *args, **kwargs: found.append(compute))
    monkeypatch.setattr(loading, "pick_device", lambda name: torch.device("cuda"))
    for native_bf16, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, held=native_bf16: held)
        load(artifacts("llama"))
        assert found[-1].dtype == expected
        load(artifacts("llama"), dtype=torch.float32)
        assert found[-1].dtype == torch.float32


def test_evaluation_packed(artifacts: Artifacts, text: Path) -> None:
    found = {}
    for packed, activations in ((False, "float"), (True, "float"), (False, "int8")):
        options = EvalOptions(text=str(text), window=32, windows=2, packed=packed, activations=activations)  # type: ignore[arg-type]
        found[packed, activations] = evaluate(str(artifacts("llama")), ["perplexity"], options).scores.metrics[0].value
    assert found[True, "float"] == pytest.approx(found[False, "float"], rel=1e-5)
    assert found[False, "int8"] != pytest.approx(found[False, "float"], rel=1e-5)
    assert found[False, "int8"] == pytest.approx(found[False, "float"], rel=0.05)


def test_gradients_reach_the_inputs(artifacts: Artifacts) -> None:
    found = []
    for model in pair(artifacts("qwen3")):
        embedded = model.get_input_embeddings()(ids(1, 6)).detach().clone().requires_grad_()
        model(inputs_embeds=embedded).logits.square().sum().backward()
        found.append(embedded.grad)
    assert distance(*found) < 1e-4


@pytest.mark.skipif(native.library() is None, reason="the C++ kernels aren't compiled here")
def test_the_kernel_alone_has_no_gradient(artifacts: Artifacts) -> None:
    layer = load(artifacts("llama"))[0].model.layers[0].mlp.up_proj
    x = torch.randn(2, layer.in_features, requires_grad=True)
    with pytest.raises(ValueError, match="quant_linear has no gradient on the path native-"):
        quant_linear(x, layer.packed)
    with torch.no_grad():
        y = quant_linear(x, layer.packed)
    torch.testing.assert_close(layer(x), y, atol=1e-5, rtol=1e-4)
    (gradient,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(gradient, layer.dequantize().sum(dim=0).expand_as(x))


def test_bfloat16(artifacts: Artifacts) -> None:
    packed, _ = load(artifacts("llama"), dtype=torch.bfloat16)
    dense, _ = load(artifacts("llama"), packed=False)
    assert packed(ids(1, 4)).logits.dtype == packed.dtype == torch.bfloat16
    assert distance(logits(packed).float(), logits(dense)) < 0.1


def test_8_bit_activations(artifacts: Artifacts) -> None:
    packed, _ = load(artifacts("llama"), activations="int8")
    dense, _ = load(artifacts("llama"), packed=False)
    assert 1e-5 < distance(logits(packed), logits(dense)) < 0.05
    with pytest.raises(InputError, match="--activations=int4: unknown"):
        load(artifacts("llama"), activations="int4")  # type: ignore[arg-type]


def test_a_packed_model_is_not_saved_but_copied(artifacts: Artifacts, tmp_path: Path) -> None:
    model, _ = load(artifacts("llama"))
    with pytest.raises(ValueError, match="copy the folder"):
        model.save_pretrained(tmp_path)
    again = copy.deepcopy(model)
    assert torch.equal(logits(again), logits(model))


def damaged(artifacts: Artifacts, tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], part: str = "") -> Path:
    """A copy of an artifact whose tensors are changed, and whose report is taken away with its checksums."""
    copied = shutil.copytree(artifacts("llama"), tmp_path / "out")
    (copied / "report.json").unlink()
    tensors = stored(copied / part)
    change(tensors)
    (copied / part / "model.safetensors").unlink()
    save_file(tensors, copied / part / "model.safetensors")
    return copied / part


LAYER = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t.pop(f"{LAYER}.weight_scale"), f"lacks the tensor {LAYER}.weight_scale"),
        (lambda t: t.pop("model.norm.weight"), "lacks the tensor model.norm.weight"),
        (lambda t: t.pop(f"{LAYER}.weight_packed"), f"lacks the tensor {LAYER}.weight"),
        (
            lambda t: t.update({f"{LAYER}.weight_packed": t[f"{LAYER}.weight_packed"][:, :-1].contiguous()}),
            f"{LAYER}.weight_packed is int32 .*expected int32 ",
        ),
        (
            lambda t: t.update({f"{LAYER}.weight_packed": t[f"{LAYER}.weight_packed"].long()}),
            f"{LAYER}.weight_packed is int64",
        ),
        (lambda t: t[f"{LAYER}.weight_shape"].add_(1), f"{LAYER}.weight_shape isn't"),
        (lambda t: t.update(k_scale=torch.ones(1)), "holds k_scale, which the model"),
    ],
    ids=["missing", "no norm", "no codes", "shape", "dtype", "stored shape", "unknown"],
)
def test_tensors_that_are_not_what_they_should_be(
    artifacts: Artifacts, tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], problem: str
) -> None:
    with pytest.raises(InputError, match=problem) as caught:
        load(damaged(artifacts, tmp_path, change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("desc_act", [False, True])
def test_gptq_without_an_order_of_inputs(artifacts: Artifacts, tmp_path: Path, desc_act: bool) -> None:
    def leave_out(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(".g_idx")]:
            del tensors[name]

    folder = damaged(artifacts, tmp_path, leave_out, "gptq")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["desc_act"] = desc_act
    (folder / "config.json").write_text(json.dumps(config))
    if desc_act:
        with pytest.raises(InputError, match=r"lacks the tensor .*\.g_idx, which desc_act needs"):
            load(folder)
        return
    packed, dense = pair(folder)
    assert isinstance(packed.model.layers[0].mlp.up_proj, PackedLinear)
    assert distance(logits(packed), logits(dense)) < 1e-4
    assert torch.equal(logits(packed), logits(load(artifacts("llama") / "gptq")[0]))


def test_gptq_out_of_order(artifacts: Artifacts, tmp_path: Path) -> None:
    folder = damaged(artifacts, tmp_path, lambda t: t[f"{LAYER}.g_idx"].copy_(t[f"{LAYER}.g_idx"].flip(0)), "gptq")
    with pytest.raises(InputError, match=f"{LAYER}.g_idx isn't in order"):
        load(folder)


@pytest.mark.parametrize("part", ["", "gptq"])
def test_a_flipped_bit_is_found(artifacts: Artifacts, tmp_path: Path, part: str) -> None:
    copied = shutil.copytree(artifacts("llama"), tmp_path / "out")
    path = copied / part / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"is damaged: (gptq/)?model\.safetensors changed"):
        load(copied / part)


@pytest.mark.parametrize(
    "change",
    [
        lambda block: block["config_groups"]["group_0"].update(input_activations={"num_bits": 8, "type": "int"}),
        lambda block: block.update(kv_cache_scheme={"num_bits": 8}),
        lambda block: block["config_groups"]["group_0"]["weights"].update(type="float"),
        lambda block: block.update(quant_method="bitsandbytes"),
        lambda block: block.update(transform_config={"config_groups": {"R4": {"type": "hadamard"}}}),
        lambda block: block.update(sparsity_config={"format": "sparse-24-bitmask"}),
    ],
)
def test_formats_that_are_not_run_packed(artifacts: Artifacts, change: Callable[[dict[str, Any]], Any]) -> None:
    block = json.loads((artifacts("llama") / "config.json").read_text())["quantization_config"]
    block.update(transform_config={}, sparsity_config={})  # as they are written where there is neither
    assert packed_format(block) is not None
    change(block)
    assert packed_format(block) is None


def test_8_bit_floats_are_run_dense(tiny: Tiny, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny("llama"), tmp_path / "fp8")
    dense, _ = load(folder)
    tensors = stored(folder)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors[name].float()
        scale = weight.abs().amax(dim=1, keepdim=True) / 448
        tensors[name] = (weight / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale"] = scale
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    assert packed_folder(folder) is None
    model, _ = load(folder)
    assert 1e-5 < distance(logits(model), logits(dense)) < 0.2


def test_other_number_types_are_read(tmp_path: Path) -> None:
    kinds = (torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64)
    save_file({str(kind): torch.arange(3).to(kind) for kind in kinds}, tmp_path / "model.safetensors")
    tensors = StoredTensors(tmp_path)
    for kind in kinds:
        assert tensors.read(str(kind)).dtype == kind
        assert tensors.read(str(kind)).tolist() == [0, 1, 2]


def test_a_gpu_that_cannot_run_the_kernels(artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: torch.device) -> None:
        raise ValueError(f"{device} has compute capability 7.5")

    held = packed_folder(artifacts("llama"))
    assert held is not None
    with monkeypatch.context() as patch:
        patch.setattr(triton_support, "AVAILABLE", False)
        with pytest.raises(InputError, match="--device=cuda: Triton isn't installed"):
            held.load(Compute(), torch.device("cuda"))
    monkeypatch.setattr(triton_support, "check", refuse)
    with pytest.raises(InputError, match=r"--device=cuda:0: cuda:0 has compute capability 7\.5; use --device cpu"):
        held.load(Compute(), torch.device("cuda:0"))
    held.load(Compute(), torch.device("cpu"))


def test_8_bit_activations_are_for_a_cpu(artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    with pytest.raises(InputError, match="--activations=int8: runs on a CPU, not on cuda; use --device cpu"):
        find(artifacts("llama")).open(Compute(activations="int8"), gpu)
    monkeypatch.setattr(loading, "pick_device", lambda name: gpu)
    with pytest.raises(InputError, match="--activations=int8"):
        load("no such model", activations="int8")
