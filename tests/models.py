"""Tiny random models with a tokenizer, saved as transformers and llama.cpp save them.

The sizes are chosen so that every path of the methods is walked: hidden sizes whose Hadamard matrices need different
Paley bases (96 and 48 from 12, 72 from 36, 64 from 1), grouped-query attention, heads wider than hidden / heads, biases
on all and on some linear layers, norms per head, sliding windows, tied and untied heads. All divide by groups of 8;
gains and biases are random, so that one that is forgotten shows.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.gguf_writer import GGUFValue
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCAB = 300
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = [("h", "e"), ("Ġ", "t"), ("Ġt", "he"), ("i", "n"), ("a", "n"), ("Ġ", "a")]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "num_hidden_layers": 3,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "llama_untied": {
        "model_type": "llama",
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
    },
    "mistral": {
        "model_type": "mistral",
        "hidden_size": 72,
        "intermediate_size": 144,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "sliding_window": 8,
        "tie_word_embeddings": False,
    },
    "qwen2": {
        "model_type": "qwen2",
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen3": {
        "model_type": "qwen3",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "tie_word_embeddings": False,
    },
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that encodes any text, with three special tokens and a chat template."""
    tokens = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in MERGES)]
    backend = Tokenizer(BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=SPECIALS[0], eos_token=SPECIALS[2], pad_token=SPECIALS[0]
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [SPECIALS[1]]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random float32 model of one of ``CONFIGS``, whose logits depend on every one of its parameters.

    ``changes`` are further settings, or other values.
    """
    settings = {**_COMMON, **CONFIGS[name], **changes}
    config = CONFIG_MAPPING[settings.pop("model_type")](**settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if key.endswith("norm.weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif key.endswith(".bias"):
                parameter.copy_(0.2 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    return model.eval()


def save_tiny(name: str, folder: Path, dtype: torch.dtype = torch.float32, shard: str = "5GB", **changes: Any) -> Path:
    """Save a tiny model and its tokenizer in ``folder``; ``shard`` is the largest size of a file."""
    build_model(name, **changes).to(dtype).save_pretrained(folder, max_shard_size=shard)
    build_tokenizer().save_pretrained(folder)
    return folder


_VALUE_TYPES = {
    str: gguf.GGUFValueType.STRING,
    int: gguf.GGUFValueType.UINT32,
    float: gguf.GGUFValueType.FLOAT32,
}
_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _gguf_name(name: str) -> str:
    module, _, kind = name.rpartition(".")
    if module.startswith("model.layers."):
        _, _, layer, module = module.split(".", 3)
        return f"blk.{layer}.{_GGUF_NAMES[module]}.{kind}"
    return f"{_GGUF_NAMES[module]}.{kind}"


def _permuted(weights: np.ndarray, heads: int) -> np.ndarray:
    """The order of q and k rows that llama.cpp's converter writes for llama."""
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def save_tiny_gguf(
    name: str,
    path: Path,
    qtype: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    *,
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    without: str = "",
) -> Path:
    """Save a tiny model as GGUF: matrices as ``qtype``, norms and biases as F32.

    Args:
        name: one of ``CONFIGS`` that llama.cpp knows: llama, llama_untied, qwen2, qwen3.
        path: the file.
        qtype: how matrices are stored.
        metadata: more metadata, or another value for what is there.
        tensors: more tensors.
        without: the name of a tensor to leave out.
    """
    model = build_model(name)
    writer = gguf.GGUFWriter(path, model.config.model_type)
    _add_config(writer, model.config)
    writer.add_name(f"tiny {name}")
    writer.add_license("apache-2.0")
    _add_tokenizer(writer)
    for key, value in (metadata or {}).items():
        writer.kv_data[0][key] = GGUFValue(value, _VALUE_TYPES[type(value)])
    for key, data in (_gguf_tensors(model) | (tensors or {})).items():
        kind = qtype if data.ndim > 1 else gguf.GGMLQuantizationType.F32
        if key != without:
            writer.add_tensor(key, gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_config(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.model_type == "qwen3":
        writer.add_key_length(config.head_dim)


def _gguf_tensors(model: PreTrainedModel) -> dict[str, np.ndarray]:
    config, found = model.config, {}
    for key, tensor in model.state_dict().items():
        data = tensor.numpy()
        if config.model_type == "llama" and "q_proj" in key:
            data = _permuted(data, config.num_attention_heads)
        if config.model_type == "llama" and "k_proj" in key:
            data = _permuted(data, config.num_key_value_heads)
        if key != "lm_head.weight" or not config.tie_word_embeddings:
            found[_gguf_name(key)] = data
    return found


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    tokenizer = build_tokenizer()
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([by_id.get(index, f"[PAD{index}]") for index in range(VOCAB)])
    writer.add_token_types(
        [gguf.TokenType.CONTROL if by_id.get(i) in SPECIALS else gguf.TokenType.NORMAL for i in range(VOCAB)]
    )
    writer.add_token_merges([" ".join(merge) for merge in MERGES])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)
