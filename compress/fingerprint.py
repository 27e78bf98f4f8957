"""Which model an attention plan or a profile of heads was made for."""

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Fingerprint:
    """The model that a plan was made for."""

    config_hash: str
    layers: Count
    heads: Count
    kv_heads: Count
    head_dim: Count
    rope: str
    sliding: tuple[int, ...] = ()

    def __str__(self) -> str:
        return (
            f"{self.layers} layers, {self.heads} query and {self.kv_heads} KV heads of {self.head_dim}, "
            f"rope {self.rope}, config {self.config_hash[:12]}"
        )


def fingerprint_of(config: Any) -> Fingerprint:
    """The fingerprint of a model, from its transformers config."""
    text = config.get_text_config(decoder=True)
    kv_heads, width = kv_shape(config)
    rope = getattr(text, "rope_parameters", None) or {}
    facts = {
        key: getattr(text, key, None)
        for key in ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    }
    facts |= {"head_dim": width, "rope": rope, "layer_types": getattr(text, "layer_types", None)}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    theta = rope.get("rope_theta") if isinstance(rope, Mapping) else None
    kind = rope.get("rope_type", "default") if isinstance(rope, Mapping) else "default"
    return Fingerprint(
        config_hash=digest,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=kv_heads,
        head_dim=width,
        rope=f"{kind} {theta:g}" if theta else str(kind),
        sliding=sliding_layers(text),
    )


def kv_shape(config: Any) -> tuple[int, int]:
    """KV heads of a layer, and their head_dim; a config without grouped queries names neither."""
    text = config.get_text_config(decoder=True)
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return kv_heads, getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def sliding_layers(config: Any) -> tuple[int, ...]:
    """Layers that don't attend to everything, which a plan leaves alone."""
    from transformers.cache_utils import get_layer_types_and_kwargs

    kinds, _ = get_layer_types_and_kwargs(config)
    return tuple(index for index, kind in enumerate(kinds) if kind != "full_attention")
