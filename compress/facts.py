"""What is known of a model before any of its weights is read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from transformers import PreTrainedConfig

from compress.families import Family
from compress.plan import Share
from compress.share.config import kept


@dataclass(frozen=True)
class LinearFacts:
    """One linear layer: its full module name, ``weight`` is ``[out_features, in_features]``."""

    name: str
    out_features: int
    in_features: int
    bias: bool


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model before any of its weights is read.

    Attributes:
        source: how the user named the model.
        name: Hub id, folder name, or the name in the GGUF file.
        config: transformers' config, without a quantization_config.
        family: the facts of its architecture.
        dtype: the type the weights are stored in; float16 for a quantized GGUF file.
        tied: the output head is the embedding matrix.
        layer_shapes: shapes of the parameters of one decoder layer, by names relative to it; all layers are alike, but
            for what ``shares`` takes away.
        checkpoint_bytes: size of the weight files (the size in ``dtype`` if the Hub wouldn't say).
        packed: the weights are those of an artifact, quantized already; they are read as what they stand for.
        shares: layers that take from others what they would need more weights for.
    """

    source: str
    name: str
    config: PreTrainedConfig
    family: Family
    dtype: torch.dtype
    tied: bool
    layer_shapes: Mapping[str, tuple[int, ...]]
    checkpoint_bytes: int
    packed: bool = False
    shares: Mapping[int, Share] = field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return int(self.config.num_hidden_layers)

    @property
    def head_dim(self) -> int:
        """Width of one attention head; not always ``hidden_size / num_attention_heads``."""
        return int(getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads)

    @property
    def num_params(self) -> int:
        """Number of parameters; a tied head counts once."""
        return sum(prod(shape) for shape in self.tensor_shapes().values())

    @property
    def sharing(self) -> frozenset[int]:
        """The layers that take attention, or keys and values, and those that they take it from."""
        return frozenset(self.shares) | {share.source for share in self.shares.values()}

    def linears(self, layer: int) -> dict[str, LinearFacts]:
        """The linear layers of one decoder layer, by role: those of q, k, v, o, gate, up, down that it has."""
        found, shapes = {}, self.shapes(layer)
        for role, module in self.family.roles.items():
            if f"{module}.weight" in shapes:
                rows, columns = shapes[f"{module}.weight"]
                name = f"{self.family.layers}.{layer}.{module}"
                found[role] = LinearFacts(name, rows, columns, f"{module}.bias" in shapes)
        return found

    def shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters that one decoder layer has, by names relative to it."""
        return kept(self.layer_shapes, self.family, self.shares.get(layer))

    def window(self, layer: int) -> int | None:
        """The number of tokens (itself included) that a token of this layer sees, or None for all before it."""
        sliding = self.family.window == "all" or (
            self.family.window == "typed" and self.config.layer_types[layer] == "sliding_attention"
        )
        return self.config.sliding_window if sliding else None

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor the model needs, by name; without the head when it is tied."""
        hidden, vocab = self.config.hidden_size, self.config.vocab_size
        shapes: dict[str, tuple[int, ...]] = {f"{self.family.embed}.weight": (vocab, hidden)}
        for layer in range(self.num_layers):
            shapes |= {f"{self.family.layers}.{layer}.{name}": shape for name, shape in self.shapes(layer).items()}
        shapes[f"{self.family.final_norm}.weight"] = (hidden,)
        if not self.tied:
            shapes[f"{self.family.head}.weight"] = (vocab, hidden)
        return shapes
