"""GPTQ checkpoints, the format with the widest support at 4 and 8 bits, from the codes of finished layers.

A linear layer ``NAME`` of shape ``[N, K]`` becomes

    NAME.qweight  int32 [K * bits / 32, N], unsigned codes packed along the inputs
    NAME.qzeros   int32 [groups, N * bits / 32], zero points packed along the outputs; version 1 stores zero - 1
    NAME.scales   float16 [groups, N]
    NAME.g_idx    int32 [K], the group of every input; other tools leave it out where inputs are in order

and means ``w[n, k] = scales[g_idx[k], n] * (code - zero)``. Symmetric codes have the zero ``2^(bits-1)``; scales may be
negative (docs/adr/0002), which is nothing to a reader that multiplies.

The reader here shares no code with the writer: it is the proof of what was written.
"""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from compress.artifact.shards import join, tensor_header
from compress.calibrate.errors import InputError
from compress.checkpoint import FileSet
from compress.job import Job, Result
from compress.kernels.packing import symmetric_zero_words, to_gptq_words, to_gptq_zeros
from compress.model import ModelView, view_of
from compress.scheme import Scheme

CONFIG_FILE = "quantize_config.json"
_FORMATS = {1: "gptq", 2: "gptq_v2"}
_PACKED = ".qweight"
_PARTS = (".qzeros", ".scales", ".g_idx")


def gptq_tensors(tensors: Mapping[str, Tensor], schemes: Mapping[str, Scheme], form: int) -> dict[str, Tensor]:
    """The tensors of a part as a GPTQ checkpoint has them; what isn't quantized stays as it is.

    Args:
        tensors: of one part, quantized modules as ``packed_tensors`` gives them.
        schemes: how every quantized module is stored.
        form: version of the checkpoint format, 1 or 2.
    """
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition(".")
        if name not in schemes or kind == "bias":
            found[key] = tensor
        elif kind == "weight_packed":
            found |= _module(name, tensors, schemes[name], form)
    return found


def _module(name: str, tensors: Mapping[str, Tensor], scheme: Scheme, form: int) -> dict[str, Tensor]:
    rows, columns = tensors[f"{name}.weight_shape"].tolist()
    scale = tensors[f"{name}.weight_scale"]
    groups = scale.shape[1]
    if scheme.symmetric:
        zeros = symmetric_zero_words(scheme.bits, rows, form).repeat(groups, 1)
    else:
        zeros = to_gptq_zeros(tensors[f"{name}.weight_zero_point"], scheme.bits, rows, form)
    return {
        f"{name}.qweight": to_gptq_words(tensors[f"{name}.weight_packed"]),
        f"{name}.qzeros": zeros,
        f"{name}.scales": scale.t().contiguous(),
        f"{name}.g_idx": torch.arange(columns, dtype=torch.int32) // (columns // groups),
    }


def gptq_config(scheme: Scheme, form: int) -> dict[str, Any]:
    """The block ``quantization_config`` of ``config.json``, and the content of ``quantize_config.json``."""
    return {
        "quant_method": "gptq",
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "sym": scheme.symmetric,
        "desc_act": False,
        "lm_head": False,
        "checkpoint_format": _FORMATS[form],
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"compress:{version('compress')}"]},
    }


def gptq_scheme(block: Mapping[str, Any]) -> Scheme:
    """How modules are stored, by a block ``quantization_config`` of GPTQ's."""
    return Scheme(block["bits"], block["group_size"], block.get("sym", True))


def write_gptq(job: Job, result: Result, folder: Path) -> dict[str, Any]:
    """Write the weights and ``quantize_config.json`` into ``folder``, a part of the model at a time.

    Returns:
        The block ``quantization_config``.
    """
    form = job.recipe.export.gptq_version
    parts, made = [], []
    for index, part in enumerate(result.parts):
        if any(key.endswith(".weight_packed") for key in tensor_header(part)[0]):
            tensors = gptq_tensors(load_file(part), result.schemes, form)
            part = job.folder.save_tensors(f"gptq-{index:05d}.safetensors", tensors)
            made.append(part)
        parts.append(part)
    join(parts, folder, job.recipe.export.shard_size_mb * 1_000_000)
    for part in made:
        part.unlink()
    block = gptq_config(next(iter(result.schemes.values())), form)
    (folder / CONFIG_FILE).write_text(json.dumps(block, indent=2) + "\n", encoding="utf-8")
    return block


class GptqCheckpoint(FileSet):
    """A folder in GPTQ's format as a checkpoint of plain weights, dequantized one at a time when they are read.

    Args:
        folder: with ``config.json`` and safetensors.

    Raises:
        InputError: it holds modules of several widths, or an unknown version of the format.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__([*sorted(folder.glob("*.safetensors")), folder / "config.json"])
        block = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        if block.get("dynamic"):
            raise InputError("--model", folder, "its modules have several widths (dynamic), which isn't read here")
        if block.get("checkpoint_format", "gptq") not in _FORMATS.values():
            raise InputError("--model", folder, f"its checkpoint_format {block['checkpoint_format']!r} isn't known")
        self._folder, self._ordered = folder, not block.get("desc_act")
        self._bits: int = block["bits"]
        self._added = 1 if block.get("checkpoint_format", "gptq") == _FORMATS[1] else 0
        self._home: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for file in self.files()[:-1]:
            for name, entry in tensor_header(file)[0].items():
                self._home[name] = file
                self._shapes[name] = tuple(entry["shape"])

    def names(self) -> list[str]:
        """The names of all tensors, as the unquantized model has them."""
        plain = [name for name in self._home if not name.endswith((_PACKED, *_PARTS))]
        return plain + [self._plain(name) for name in self._home if name.endswith(_PACKED)]

    @staticmethod
    def _plain(name: str) -> str:
        return name.removesuffix(_PACKED) + ".weight"

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header."""
        packed = name.removesuffix(".weight") + _PACKED
        if packed not in self._shapes:
            return self._shapes[name]
        words, rows = self._shapes[packed]
        return rows, words * 32 // self._bits

    def dtype(self, name: str) -> torch.dtype:
        """float32 for every tensor."""
        return torch.float32

    def storage_dtype(self) -> torch.dtype:
        """float16, the type of the scales."""
        return torch.float16

    def read(self, name: str) -> Tensor:
        """One tensor in float32; a quantized weight as ``[N, K]``."""
        module = name.removesuffix(".weight")
        if module + _PACKED not in self._home:
            return self._stored(name).float()
        words, zeros, scales = (self._stored(module + kind) for kind in (_PACKED, *_PARTS[:2]))
        shifts = torch.arange(0, 32, self._bits, dtype=torch.int32)
        mask = (1 << self._bits) - 1
        codes = ((words[:, None, :] >> shifts[None, :, None]) & mask).flatten(0, 1)
        points = ((zeros[:, :, None] >> shifts) & mask).flatten(1) + self._added
        group = self._groups(module, len(codes), len(scales))
        return (scales.float()[group] * (codes - points[group])).t().contiguous()

    def _groups(self, module: str, columns: int, groups: int) -> Tensor:
        """The group of every input of a module."""
        if module + _PARTS[2] in self._home:
            return self._stored(module + _PARTS[2]).long()
        if self._ordered:
            return torch.arange(columns) // (columns // groups)
        raise InputError("--model", self._folder, f"lacks the tensor {module}{_PARTS[2]}, which desc_act needs")

    def _stored(self, name: str) -> Tensor:
        with safe_open(self._home[name], framework="pt") as handle:
            tensor: Tensor = handle.get_tensor(name)
        return tensor.clone()


def open_gptq(folder: Path) -> ModelView:
    """A GPTQ checkpoint as a model to read from.

    Raises:
        InputError: see :class:`GptqCheckpoint`; or the family isn't supported.
    """
    config = AutoConfig.from_pretrained(str(folder))
    checkpoint = GptqCheckpoint(folder)
    del config.quantization_config
    return view_of(config, checkpoint, folder)
