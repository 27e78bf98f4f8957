"""The families of decoder models, as one table of facts, and the reasons why the others are refused.

Everything the methods need to know about an architecture stands here: which transformers classes run it, how its
modules are called, and where a sliding window applies. A family is in the table only if norm fusion and rotation are
exact for it: RMSNorm before attention and before the MLP, nothing behind them, one MLP, separate q, k and v.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from compress.calibrate.errors import InputError

LINEAR_ROLES: Mapping[str, str] = MappingProxyType(
    {
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    }
)


@dataclass(frozen=True)
class Family:
    """What is known of one architecture; module names are relative to the decoder layer, or to the model.

    Attributes:
        name: transformers' ``model_type``.
        module: the transformers module that holds its classes.
        prefix: how the names of these classes begin.
        qk_norm: queries and keys are normalised per head, before RoPE.
        window: which layers attend through a sliding window: none, all, or those that ``config.layer_types`` names.
        gguf_archs: values of ``general.architecture`` in a GGUF file that mean this family.
        gguf_permuted: llama.cpp reorders the rows of q and k of this family for its interleaved RoPE.
    """

    name: str
    module: str
    prefix: str
    qk_norm: bool = False
    window: Literal["none", "all", "typed"] = "none"
    gguf_archs: tuple[str, ...] = ()
    gguf_permuted: bool = False
    roles: Mapping[str, str] = field(default_factory=lambda: LINEAR_ROLES)
    input_norm: str = "input_layernorm"
    attention: str = "self_attn"
    post_norm: str = "post_attention_layernorm"
    mlp: str = "mlp"
    embed: str = "model.embed_tokens"
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    rotary: str = "model.rotary_emb"
    head: str = "lm_head"

    @property
    def architecture(self) -> str:
        """The name of the whole model's class, as ``config.architectures`` has it."""
        return f"{self.prefix}ForCausalLM"

    def load_class(self, suffix: str) -> type[Any]:
        """The transformers class ``prefix + suffix``, with suffix ForCausalLM, DecoderLayer or RotaryEmbedding."""
        cls: type[Any] = getattr(importlib.import_module(self.module), self.prefix + suffix)
        return cls


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        family.name: family
        for family in (
            Family(
                "llama",
                "transformers.models.llama.modeling_llama",
                "Llama",
                gguf_archs=("llama",),
                gguf_permuted=True,
            ),
            Family("mistral", "transformers.models.mistral.modeling_mistral", "Mistral", window="all"),
            Family("qwen2", "transformers.models.qwen2.modeling_qwen2", "Qwen2", window="typed", gguf_archs=("qwen2",)),
            Family(
                "qwen3",
                "transformers.models.qwen3.modeling_qwen3",
                "Qwen3",
                qk_norm=True,
                window="typed",
                gguf_archs=("qwen3",),
            ),
        )
    }
)

_MOST_LAYERS = 1000  # the deepest published models have about 130; a damaged header may claim billions
_SANDWICH = "its norms stand after attention and MLP too, so a rotation can't be fused exactly"
_OFFSET_NORM = "its norms multiply by 1 + weight and its embeddings are scaled, which norm fusion doesn't treat yet"
_POST_NORM = "its norms stand after attention and MLP instead of before them, so a rotation can't be fused exactly"
_FUSED = "its q, k, v and gate, up are stored as fused matrices, which the table of roles doesn't describe yet"
_EXPERTS = "its MLP is a mixture of experts, and experts see too few calibration tokens to be treated like one MLP"
_LAYER_NORM = "its LayerNorm subtracts the mean, so a rotation can't be fused exactly"
_SCALED = "it scales embeddings, residuals and logits by constants of its own, which the table doesn't describe yet"
_VISION = "it is a vision-language model"
_RECURRENT = "it mixes tokens by a recurrence instead of attention"

REFUSALS: Mapping[str, str] = MappingProxyType(
    {
        name: reason
        for reason, names in (
            (_SANDWICH, "gemma2 gemma3 gemma3_text gemma3n gemma4 gemma4_text glm4"),
            (_OFFSET_NORM, "gemma"),
            (_POST_NORM, "olmo2 olmo3 exaone4"),
            (_FUSED, "phi3 glm chatglm internlm2 baichuan qwen"),
            (
                _EXPERTS,
                "mixtral qwen2_moe qwen2moe qwen3_moe qwen3moe deepseek_v2 deepseek_v3 deepseek2 gpt_oss gpt-oss dbrx "
                "olmoe phimoe llama4 llama4_text granitemoe glm4_moe minimax_m2",
            ),
            (
                _LAYER_NORM,
                "gpt2 gpt_neo gpt_neox gptj opt bloom falcon mpt phi starcoder2 stablelm cohere cohere2 command-r "
                "olmo gpt_bigcode nemotron",
            ),
            (_SCALED, "granite minicpm minicpm3"),
            (_VISION, "mistral3 mllama llava qwen2_vl qwen2_5_vl qwen3_vl idefics3 smolvlm"),
            (_RECURRENT, "mamba mamba2 rwkv recurrent_gemma falcon_mamba lfm2 jamba qwen3_next qwen35"),
        )
        for name in names.split()
    }
)


def refusal(model_type: str, source: str) -> InputError:
    """The error that names a family outside the table and says why it isn't in it."""
    reason = REFUSALS.get(model_type, "its structure isn't in the table of families, so no method is known to be exact")
    return InputError(
        "--model", source, f"the family {model_type!r} isn't supported: {reason}", allowed=", ".join(FAMILIES)
    )


def family_of(config: Mapping[str, Any], source: str) -> Family:
    """The family of a model.

    Args:
        config: the content of ``config.json``.
        source: how the user named the model, for the error.

    Raises:
        InputError: the family isn't in the table; the reason is in the text.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise InputError("--model", source, "its config.json names no model_type, so the family is unknown")
    if model_type not in FAMILIES:
        raise refusal(model_type, source)
    return FAMILIES[model_type]


def check_config(config: Mapping[str, Any], family: Family, source: str) -> None:
    """Refuse a model of a known family whose config asks for something the family's facts don't cover.

    Raises:
        InputError: the model is quantized already, isn't a causal language model of this family, or its heads
            don't fit.
    """
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "an unnamed method") if isinstance(quantization, Mapping) else "?"
        raise InputError(
            "--model", source, f"it is quantized already ({method})", fix="give the original, unquantized model"
        )
    architectures = config.get("architectures") or [family.architecture]
    if family.architecture not in architectures:
        raise InputError(
            "--model", source, f"it is a {architectures[0]}, not a causal language model", allowed=family.architecture
        )
    if config.get("is_causal") is False:
        raise InputError("--model", source, "its attention isn't causal (is_causal is false in config.json)")
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and not 1 <= layers <= _MOST_LAYERS:
        raise InputError("--model", source, f"it claims {layers} layers", allowed=f"1 to {_MOST_LAYERS}")
    heads, kv_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(kv_heads, int) and kv_heads and heads % kv_heads:
        raise InputError("--model", source, f"{heads} attention heads don't divide by {kv_heads} key/value heads")
    unknown = set(config.get("layer_types") or ()) - {"full_attention", "sliding_attention"}
    if unknown and family.window == "typed":
        raise InputError("--model", source, f"it has layers of the unknown type {min(unknown)!r}")
