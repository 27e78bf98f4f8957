"""A GGUF file as a checkpoint: transformers' names, transformers' row order, float32, one tensor at a time."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from compress.calibrate.errors import InputError
from compress.checkpoint import FileSet
from compress.families import FAMILIES, Family, refusal
from compress.gguf_header import GgufHeader, GgufTensor, read_header

_MODEL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BIAS_FLAGS = {"attention_bias": "self_attn.o_proj", "mlp_bias": "mlp.down_proj"}
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_ROPE_FACTORS = "rope_freqs.weight"
_CHUNK = 1 << 20  # weights dequantised at a time: gguf.quants needs several temporary copies


class GgufCheckpoint(FileSet):
    """The tensors of a ``.gguf`` file, dequantised to float32 when they are read.

    Args:
        path: the file.
        source: how the user named the model, for errors.

    Raises:
        InputError: the file is damaged or truncated, or its architecture isn't supported.
    """

    def __init__(self, path: Path, source: str) -> None:
        super().__init__([path])
        self._path = path
        self._source = source
        self.header: GgufHeader = read_header(path, source)
        self.family: Family = _family(self.header, source)
        self._tensors = {
            name: tensor for raw, tensor in self.header.tensors.items() if (name := _transformers_name(raw)) is not None
        }

    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """float32 for every tensor: that is what dequantisation gives."""
        return torch.float32

    def storage_dtype(self) -> torch.dtype:
        """The type of the matrices if they are plain floats, else float16, the type of the blocks' scales."""
        types = {tensor.qtype for tensor in self._tensors.values() if len(tensor.shape) > 1}
        if types == {GGMLQuantizationType.F32}:
            return torch.float32
        return torch.bfloat16 if types == {GGMLQuantizationType.BF16} else torch.float16

    def read(self, name: str) -> Tensor:
        """One tensor in float32, with q and k rows in transformers' order."""
        weights = torch.from_numpy(_dequantized(self._path, self._tensors[name]))
        if self.family.gguf_permuted and ".self_attn.q_proj." in name:
            return _unpermuted(weights, self._number("attention.head_count"))
        if self.family.gguf_permuted and ".self_attn.k_proj." in name:
            return _unpermuted(weights, self._number("attention.head_count_kv", self._number("attention.head_count")))
        return weights

    def _number(self, key: str, default: float | None = None) -> Any:
        """The positive number ``architecture.key`` in the metadata; without a default it must be there."""
        architecture = self.header.metadata["general.architecture"]
        value = self.header.metadata.get(f"{architecture}.{key}", default)
        if isinstance(value, list) and len(set(value)) == 1:  # a value for every layer
            value = value[0]
        if not isinstance(value, (int, float)) or not value > 0:
            problem = f"its header needs a positive number as {architecture}.{key}, and has {value}"
            raise InputError("--model", self._source, problem)
        return value

    def config(self) -> dict[str, Any]:
        """The content that ``config.json`` would have, from the metadata and the tensor table.

        Raises:
            InputError: a value is missing, or the RoPE scaling has no counterpart in transformers.
        """
        heads, hidden = self._number("attention.head_count"), self._number("embedding_length")
        head_dim = self._number("attention.key_length", self._number("rope.dimension_count", hidden // heads))
        tokens = {
            f"{ours}_token_id": self.header.metadata.get(f"tokenizer.ggml.{theirs}_token_id")
            for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        }
        if "model.embed_tokens.weight" not in self._tensors:
            raise InputError("--model", self._source, "it holds no token embedding (token_embd.weight)")
        return {
            "model_type": self.family.name,
            "architectures": [self.family.architecture],
            "vocab_size": self.shape("model.embed_tokens.weight")[0],
            "hidden_size": hidden,
            "intermediate_size": self._number("feed_forward_length"),
            "num_hidden_layers": self._number("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._number("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "max_position_embeddings": self._number("context_length"),
            "rms_norm_eps": self._number("attention.layer_norm_rms_epsilon"),
            "rope_parameters": self._rope(head_dim),
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "dtype": str(self.storage_dtype()).removeprefix("torch."),
            **tokens,
            **{flag: True for flag, name in _BIAS_FLAGS.items() if f"model.layers.0.{name}.bias" in self._tensors},
        }

    def _rope(self, head_dim: int) -> dict[str, Any]:
        theta = self._number("rope.freq_base", 10000.0)
        scaling = self.header.metadata.get(f"{self.header.metadata['general.architecture']}.rope.scaling.type", "none")
        if _ROPE_FACTORS in self.header.tensors:
            factors = _dequantized(self._path, self.header.tensors[_ROPE_FACTORS])
            return _llama3_rope(factors, theta, head_dim, self._source)
        if scaling == "linear":
            factor = self._number("rope.scaling.factor")
            return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
        if scaling != "none":
            problem = f"its RoPE is scaled by {scaling!r}, which a GGUF file doesn't describe completely"
            raise InputError("--model", self._source, problem, fix="give the original model")
        return {"rope_type": "default", "rope_theta": theta}


def _family(header: GgufHeader, source: str) -> Family:
    architecture = header.metadata.get("general.architecture", "unknown")
    if header.metadata.get(f"{architecture}.expert_count", 0):
        raise refusal("mixtral", source)
    for family in FAMILIES.values():
        if architecture in family.gguf_archs:
            return family
    raise refusal(architecture, source)


def _transformers_name(name: str) -> str | None:
    """transformers' name of a tensor, or None for a tensor that isn't a weight."""
    if match := _LAYER.fullmatch(name):
        layer, module, kind = match.groups()
        return f"model.layers.{layer}.{_LAYER_NAMES[module]}.{kind}" if module in _LAYER_NAMES else None
    module, _, kind = name.rpartition(".")
    return f"{_MODEL_NAMES[module]}.{kind}" if module in _MODEL_NAMES else None


def gguf_name(name: str) -> str:
    """The name in a GGUF file of a tensor that transformers calls ``name``."""
    module, _, kind = name.rpartition(".")
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module):
        return f"blk.{match[1]}.{_inverse(_LAYER_NAMES)[match[2]]}.{kind}"
    return f"{_inverse(_MODEL_NAMES)[module]}.{kind}"


def _inverse(names: dict[str, str]) -> dict[str, str]:
    return {theirs: ours for ours, theirs in names.items()}


def _dequantized(path: Path, tensor: GgufTensor) -> np.ndarray:
    """A tensor in float32, dequantised a few rows at a time; the file isn't mapped, so no page of it stays."""
    rows = int(np.prod(tensor.shape[:-1], dtype=np.int64))
    out = np.empty((rows, tensor.shape[-1]), dtype=np.float32)
    row_bytes = tensor.nbytes // rows
    step = max(1, _CHUNK // tensor.shape[-1])
    with path.open("rb") as stream:
        stream.seek(tensor.offset)
        for start in range(0, rows, step):
            count = min(step, rows - start)
            raw = np.frombuffer(stream.read(count * row_bytes), dtype=np.uint8).reshape(count, row_bytes)
            out[start : start + count] = dequantize(raw, tensor.qtype)
    return out.reshape(tensor.shape)


def _unpermuted(weights: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's order of q and k rows: pairs (i, i + d/2) of a head stand together there, for interleaved RoPE.

    Args:
        weights: ``[heads * head_dim, ...]``, weight or bias.
        heads: number of heads in the rows.
    """
    pairs = weights.view(heads, weights.shape[0] // heads // 2, 2, *weights.shape[1:])
    return pairs.transpose(1, 2).reshape(weights.shape)


def _llama3_rope(factors: np.ndarray, theta: float, head_dim: int, source: str) -> dict[str, Any]:
    """The llama3 scaling whose frequency divisors llama.cpp has stored, checked against transformers' formula.

    All published Llama 3.1 to 3.3 models share three of the four parameters; the fourth is the largest divisor.
    """
    low, high, original = 1.0, 4.0, 8192
    factor = float(factors.max())
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    smooth = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    if factors.shape != smooth.shape or not np.allclose(1 / factors, (1 - smooth) / factor + smooth, rtol=1e-4):
        problem = "its RoPE frequencies are scaled in a way that transformers' config can't express"
        raise InputError("--model", source, problem, fix="give the original model")
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
