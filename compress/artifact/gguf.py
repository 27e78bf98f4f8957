"""A GGUF file for llama.cpp, from the codes of finished layers: Q4_0 and Q8_0 blocks hold them without loss.

Both formats are symmetric with a signed float16 scale for 32 columns, so codes and scales go over unchanged. Matrices
that aren't quantized are F16, vectors F32. Names, metadata and the order of q and k rows are those of llama.cpp's own
converter; rotations are fused already, so the architecture is the original's.

llama.cpp has no sliding window for these families. Within the window full attention is the same thing, so a file of a
model with one says that its context is the window.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFValueType, LlamaFileType
from safetensors.torch import load_file
from torch import Tensor

from compress.artifact.gguf_tokenizer import tokenizer_metadata
from compress.artifact.shards import tensor_header
from compress.gguf_reader import gguf_name
from compress.job import Job, Result
from compress.kernels.packing import to_q4_0, to_q8_0, unpack
from compress.model import ModelFacts, ModelView
from compress.origin import origin_of

GROUP_SIZE = 32
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
ROPE_TYPES = ("default", "linear", "llama3")
# The file holds divisors, not these; every published model has them, and our reader takes them for granted.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_TYPES = {4: GGMLQuantizationType.Q4_0, 8: GGMLQuantizationType.Q8_0}
_FILE_TYPES = {4: LlamaFileType.MOSTLY_Q4_0, 8: LlamaFileType.MOSTLY_Q8_0}
_SCALARS = {str: GGUFValueType.STRING, bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32}
_ITEMS = {str: GGUFValueType.STRING, int: GGUFValueType.INT32, float: GGUFValueType.FLOAT32}


@dataclass(frozen=True)
class _Entry:
    """One tensor of the file: its name there, shape and type, and the tensor or module of the part it comes from."""

    name: str
    source: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType

    @property
    def nbytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        return prod(self.shape) // block * size


def write_gguf(job: Job, result: Result, path: Path) -> None:
    """Write the file, a part of the model at a time in memory.

    Raises:
        InputError: llama.cpp has no tokenizer like the model's.
    """
    view = job.view
    entries = {part: _entries(part, result) for part in result.parts}
    writer = gguf.GGUFWriter(path, ARCHITECTURES[view.family.name])
    _add_metadata(writer, view, result)
    factors = rope_factors(view.facts)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for entry in (entry for part in entries.values() for entry in part):
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), entry.nbytes, raw_dtype=entry.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for part, listed in entries.items():
        for data in _data(listed, load_file(part), view):
            writer.write_tensor_data(data)
    writer.close()


def _entries(part: Path, result: Result) -> list[_Entry]:
    found = []
    for key, facts in tensor_header(part)[0].items():
        name, _, kind = key.rpartition(".")
        shape = tuple(facts["shape"])
        if name not in result.schemes or kind == "bias":
            plain = GGMLQuantizationType.F16 if len(shape) > 1 else GGMLQuantizationType.F32
            found.append(_Entry(gguf_name(key), key, shape, plain))
        elif kind == "weight_packed":
            bits = result.schemes[name].bits
            whole = (shape[0], shape[1] * 32 // bits)
            found.append(_Entry(gguf_name(f"{name}.weight"), name, whole, _TYPES[bits]))
    return found


def _data(entries: list[_Entry], tensors: Mapping[str, Tensor], view: ModelView) -> Iterator[np.ndarray]:
    """The bytes of every entry of a part."""
    for entry in entries:
        order = _row_order(entry, view.facts)
        if entry.kind in _TYPES.values():
            bits = 4 if entry.kind == GGMLQuantizationType.Q4_0 else 8
            words, scale = tensors[f"{entry.source}.weight_packed"], tensors[f"{entry.source}.weight_scale"]
            codes = unpack(words, bits, entry.shape[1])
            tensor = (to_q4_0 if bits == 4 else to_q8_0)(codes[order], scale[order])
        else:
            wanted = torch.float16 if entry.kind == GGMLQuantizationType.F16 else torch.float32
            tensor = tensors[entry.source][order].to(wanted)
        yield np.ascontiguousarray(tensor.numpy())


def _row_order(entry: _Entry, facts: ModelFacts) -> Tensor | slice:
    """The order of rows in the file: for llama, pairs (i, i + d/2) of a q or k head stand together."""
    heads = {".attn_q.": facts.config.num_attention_heads, ".attn_k.": facts.config.num_key_value_heads}
    found = [count for part, count in heads.items() if part in entry.name]
    if not found or ARCHITECTURES[facts.family.name] != "llama":
        return slice(None)
    rows = torch.arange(entry.shape[0]).view(found[0], 2, -1)
    return rows.transpose(1, 2).flatten()


def context_length(facts: ModelFacts) -> int:
    """The longest text on which llama.cpp computes what the model does: the window of layers that have one."""
    context: int = facts.config.max_position_embeddings
    window = getattr(facts.config, "sliding_window", None)
    typed = facts.family.window == "typed" and "sliding_attention" in facts.config.layer_types
    return min(context, window) if window and (typed or facts.family.window == "all") else context


def rope_factors(facts: ModelFacts) -> np.ndarray | None:
    """The divisors of RoPE's frequencies that ``llama3`` scaling means, float32 ``[head_dim / 2]``, else None.

    Frequencies whose wavelength is short for the original context stay, long ones are divided by ``factor``, and those
    between are interpolated.
    """
    rope = facts.config.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    wavelength = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, facts.head_dim, 2, dtype=np.float64) / facts.head_dim)
    turns = rope["original_max_position_embeddings"] / wavelength
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    divisors: np.ndarray = (1 / (kept + (1 - kept) / rope["factor"])).astype(np.float32)
    return divisors


def _add_metadata(writer: gguf.GGUFWriter, view: ModelView, result: Result) -> None:
    config, facts = view.config, view.facts
    bits = [scheme.bits for scheme in result.schemes.values()]
    writer.add_type("model")
    writer.add_name(view.name())
    if isinstance(license_name := origin_of(view).license, str):
        writer.add_license(license_name)
    writer.add_file_type(_FILE_TYPES[max(bits, key=bits.count)] if bits else LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context_length(facts))
    writer.add_block_count(view.num_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(facts.head_dim)
    writer.add_value_length(facts.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(facts.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.rope_parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
    for key, value in tokenizer_metadata(view).items():
        _add(writer, key, value)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        if value:  # an empty array has no type
            writer.add_key_value(key, value, GGUFValueType.ARRAY, sub_type=_ITEMS[type(value[0])])
    else:
        writer.add_key_value(key, value, _SCALARS[type(value)])
