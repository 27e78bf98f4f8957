"""The proof that an artifact is what was computed: loaded as a user would load it, and compared.

Every weight is compared bit for bit with what its file says it is, dequantized by our own reader in the storage dtype,
which is what plain ``from_pretrained`` gives. Then the loaded model answers a probe, layer by layer in float32, and its
logits are compared with those of the model that calibration ran through. Memory stays at one 16-bit model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.artifact.compressed_tensors import dequantized
from compress.artifact.export import format_folders, load_artifact
from compress.families import Family
from compress.job import Result
from compress.memory import release

# Logits may differ by the rounding of ``code * scale`` to the storage dtype, relative to the largest logit.
TOLERANCE = {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 6e-2}


def check_reload(folder: Path, result: Result, family: Family, formats: tuple[str, ...]) -> dict[str, Any]:
    """Load the artifact as a user would, format by format, and compare it with the model in memory.

    Returns:
        The report's section ``reload_check``: that of the first format, and all by name.

    Raises:
        RuntimeError: a weight or the logits differ; the artifact must not be used.
    """
    found = {}
    for name, place in format_folders(folder, formats).items():
        found[name] = _check_format(place, result, family)
        release()
    return found[formats[0]] | {"formats": found}


def _check_format(folder: Path, result: Result, family: Family) -> dict[str, Any]:
    model = load_artifact(folder, result.dtype)
    wrong = [name for part in result.parts for name in _wrong_weights(model, part, result)]
    if wrong:
        raise RuntimeError(
            f"{folder} was reloaded and {len(wrong)} tensors aren't what was written, {wrong[0]} the first: "
            "the artifact isn't published; please report this"
        )
    length = min(len(result.probe), getattr(model.config, "max_position_embeddings", None) or len(result.probe))
    with torch.no_grad(), _float32_layers(model, family):
        logits = model(result.probe[:length].unsqueeze(0)).logits[0].float()
    expected = result.logits[:length]
    difference = float((logits - expected).abs().max() / expected.abs().max())
    tolerance = TOLERANCE[result.dtype]
    if not difference <= tolerance:
        raise RuntimeError(
            f"{folder} was reloaded and its logits differ from the model in memory by {difference:.2e} of the largest "
            f"(allowed {tolerance:g}): the artifact isn't published; please report this"
        )
    agreement = float((logits.argmax(-1) == expected.argmax(-1)).float().mean())
    return {
        "weights_identical": True,
        "relative_difference": difference,
        "top1_agreement": agreement,
        "tolerance": tolerance,
    }


def _wrong_weights(model: PreTrainedModel, part: Path, result: Result) -> Iterator[str]:
    """Names of the parameters that differ from the part's tensors."""
    tensors = load_file(part)
    for name in {key.rpartition(".")[0] for key in tensors}:
        module = model.get_submodule(name)
        if f"{name}.weight_packed" in tensors:
            expected = dequantized(tensors, name, result.schemes[name].bits).to(result.dtype)
        else:
            expected = tensors[f"{name}.weight"]
        if not _same(module.weight, expected):
            yield f"{name}.weight"
        if f"{name}.bias" in tensors and not _same(module.bias, tensors[f"{name}.bias"]):
            yield f"{name}.bias"


def _same(found: Any, expected: Tensor) -> bool:
    return isinstance(found, Tensor) and found.dtype == expected.dtype and torch.equal(found, expected)


@contextmanager
def _float32_layers(model: PreTrainedModel, family: Family) -> Iterator[None]:
    """Within it every layer computes in float32 and goes back to its own dtype when it is done."""
    dtype = model.dtype
    modules: list[nn.Module] = [*model.get_submodule(family.layers)]
    modules += [model.get_submodule(name) for name in (family.embed, family.final_norm, family.head)]
    hooks = []
    for module in modules:
        hooks.append(module.register_forward_pre_hook(lambda m, _: m.float() and None))
        hooks.append(module.register_forward_hook(lambda m, *_: m.to(dtype) and None))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
