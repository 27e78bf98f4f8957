"""A transformers model over packed weights, built without ever being dense.

The model is made on the meta device, where it takes no memory. Then tensor by tensor is read and repacked for the
kernels, the largest first: what repacking needs beside its result is a few times one tensor, so that the peak stays
near the size of the model itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from compress.calibrate.errors import InputError
from compress.checkpoint import read_json
from compress.families import FAMILIES, Family, check_config
from compress.kernels import triton_support
from compress.memory import release, trim
from compress.plan import Share
from compress.runtime.decoder import fused_class
from compress.runtime.formats import PackedFormat, packed_format
from compress.runtime.linear import Compute, PackedLinear, StoredEmbedding, StoredLinear, TiedLinear, layout_for
from compress.runtime.model import answering_class
from compress.runtime.stored import StoredTensors
from compress.share.config import folder_config, folder_shares, unmarked
from compress.share.modules import Consumer, share_layers

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_DERIVED = (".rotary_emb.inv_freq",)  # what old checkpoints store, and the config says


@dataclass(frozen=True)
class PackedFolder:
    """A folder whose packed weights can be run as they are.

    Attributes:
        folder: with ``config.json`` and safetensors.
        content: of its ``config.json``.
        family: of its model.
        tensors: what its files hold.
        form: how they are packed.
        shares: its layers that share attention.
    """

    folder: Path
    content: Mapping[str, Any]
    family: Family
    tensors: StoredTensors
    form: PackedFormat
    shares: Mapping[int, Share]

    def load(self, compute: Compute, device: torch.device) -> PreTrainedModel:
        """The model, in eval mode and without gradients.

        Args:
            compute: how it computes.
            device: where it will be.

        Raises:
            InputError: a GPU that can't run the kernels; a tensor that is missing, is of another shape or type, or
                isn't known. All that is seen in headers is found before anything is read.
        """
        _check_device(device)
        model = self._on_meta(compute.dtype)
        parts = self._checked(model)
        for name in sorted(parts, key=lambda name: parts[name], reverse=True):
            self._place(model, name, compute, device)
            trim()  # what repacking left behind lies in between what stays, and would add up
        if isinstance(model.get_submodule(self.family.head), nn.Linear):  # tied: nothing of its own is stored
            model.set_submodule(self.family.head, TiedLinear(model.get_submodule(self.family.embed)))
        for module in model.modules():
            if isinstance(module, Consumer):
                module.to(device)  # where its map of heads has to be
        rotary = self.family.load_class("RotaryEmbedding")(model.config)
        model.set_submodule(self.family.rotary, rotary.to(device))
        model.generation_config = self._generation_config(model)
        release()
        return model.eval().requires_grad_(False)

    def _on_meta(self, dtype: torch.dtype) -> PreTrainedModel:
        config = folder_config(self.folder, self.content)
        del config.quantization_config
        config.dtype = dtype
        with torch.device("meta"):
            model: PreTrainedModel = answering_class(self.family)(config)
            setattr(model, model.base_model_prefix, fused_class(self.family)(config))
        share_layers(model, self.shares)
        return model

    def _checked(self, model: PreTrainedModel) -> dict[str, int]:
        """Compare the headers with the model; returns the modules to be read, and the bytes of each one's weight."""
        parts: dict[str, int] = {}
        known: set[str] = set()
        for name, module in model.named_modules():
            shapes = {key: tuple(value.shape) for key, value in module.named_parameters(recurse=False)}
            if not shapes or (name == self.family.head and self._tied(model)):
                continue
            if isinstance(module, nn.Linear) and self.form.holds(name):
                shape = shapes.pop("weight")
                known |= self.form.check(name, (shape[0], shape[1]))
                parts[name] = self.form.nbytes(name)
            for key, shape in shapes.items():
                self.tensors.check(f"{name}.{key}", shape, _FLOATS)
                known.add(f"{name}.{key}")
                parts.setdefault(name, self.tensors.entries[f"{name}.{key}"].nbytes)
        strange = {name for name in self.tensors.entries if name not in known and not name.endswith(_DERIVED)}
        if strange:
            raise self.tensors.problem(f"holds {min(strange)}, which the model of its config.json doesn't have")
        return parts

    def _tied(self, model: PreTrainedModel) -> bool:
        """Whether the head is the embedding: the config says so, and the files hold no other."""
        head = self.family.head
        stored = f"{head}.weight" in self.tensors.entries or self.form.holds(head)
        return bool(model.config.tie_word_embeddings) and not stored

    def _place(self, model: PreTrainedModel, name: str, compute: Compute, device: torch.device) -> None:
        """Read one module's tensors, and put what holds them in the place of the empty module."""
        module = model.get_submodule(name)
        if not isinstance(module, nn.Linear | nn.Embedding):
            for key, _ in list(module.named_parameters(recurse=False)):
                value = self.tensors.read(f"{name}.{key}").to(device, compute.dtype)
                setattr(module, key, nn.Parameter(value, requires_grad=False))
            return
        bias = None
        if getattr(module, "bias", None) is not None:
            bias = self.tensors.read(f"{name}.bias").to(device, compute.dtype)
        if isinstance(module, nn.Linear) and self.form.holds(name):
            shape = (module.out_features, module.in_features)
            try:
                weight = self.form.read(name, shape, layout_for(device))
            except ValueError as error:
                raise self.tensors.problem(f"{name}: {error}") from error
            model.set_submodule(name, PackedLinear(weight.to(device), bias, compute))
            return
        plain = self.tensors.read(f"{name}.weight").to(device)
        kept = StoredLinear(plain, bias) if isinstance(module, nn.Linear) else StoredEmbedding(plain, compute.dtype)
        model.set_submodule(name, kept)

    def _generation_config(self, model: PreTrainedModel) -> GenerationConfig:
        if (self.folder / "generation_config.json").is_file():
            return GenerationConfig.from_pretrained(str(self.folder))
        return GenerationConfig.from_model_config(model.config)


def packed_folder(folder: Path) -> PackedFolder | None:
    """A folder whose packed weights can be run, or None for one that is run dense.

    Dense are formats, families and schemes that the kernels don't know: activations quantized on disk, other number
    types, inputs in another order, GGUF.

    Raises:
        InputError: its config can't be read, or a header of packed weights.
    """
    content = read_json(folder / "config.json", str(folder))
    block, plain = content.get("quantization_config"), unmarked(content)
    family = FAMILIES.get(str(plain.get("model_type")))
    if not isinstance(block, dict) or family is None or not list(folder.glob("*.safetensors")):
        return None
    form = packed_format(block)
    if form is None:
        return None
    check_config({key: value for key, value in plain.items() if key != "quantization_config"}, family, str(folder))
    tensors = StoredTensors(folder)
    shares = folder_shares(folder, content)
    return PackedFolder(folder, content, family, tensors, form(tensors, block), shares)


def _check_device(device: torch.device) -> None:
    """Find a GPU without Triton, or one that is too old, before the first token does."""
    if device.type != "cuda":
        return
    try:
        triton_support.check(device)
    except ValueError as error:
        raise InputError("--device", device, str(error), fix="use --device cpu") from error
