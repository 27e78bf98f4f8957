"""The fused steps of a decoder's layers, and what they were made of.

For every token the decoder asks a :class:`Fusion` whether it still holds what the steps point into; it is made anew
where a part was exchanged, and has no steps where a layer isn't what they compute.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import repeat
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from compress.families import FAMILIES, Family
from compress.kernels import native
from compress.kernels.block import Block, Linear, Prepared, attention_mix, attention_row, decode_attention, prepared
from compress.kv.attention import NAME
from compress.runtime.linear import PackedLinear, StoredLinear
from compress.share.echo import ECHO
from compress.share.modules import AttentionConsumer, KeyValueConsumer

GATES: Mapping[str, Literal["silu", "gelu_tanh"]] = MappingProxyType(
    {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
)
SLIDING = "sliding_attention"
_HOOKS, _PRE_HOOKS = operator.itemgetter("_forward_hooks"), operator.itemgetter("_forward_pre_hooks")
_WANTS_GRADIENT = operator.attrgetter("requires_grad")


@dataclass(frozen=True)
class Left:
    """What a layer leaves for those that take its attention, or its keys and values.

    Attributes:
        weights: probabilities [batch, heads, tokens].
        keys: [batch, KV heads, tokens, head_dim].
        values: alike.
        mask: [batch, tokens] bool or float, or None.
    """

    weights: Tensor
    keys: Tensor
    values: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class Answer:
    """The token that is answered, one of each sequence.

    Attributes:
        rope: cosines and sines [batch, rotary dimensions].
        past: the cache.
        masks: by kind, each [batch, 1, 1, tokens] or [batch, tokens], or None.
        name: of the attention function.
        left: by layer.
    """

    rope: tuple[Tensor, Tensor]
    past: Any
    masks: dict[str, Tensor | None]
    name: str
    left: dict[int, Left]


@dataclass(frozen=True)
class Step:
    """One layer's fused steps.

    Attributes:
        block: the two C++ calls.
        attention: the layer's attention module, for the function between them.
        kind: of its mask, as ``config.layer_types`` calls it.
        window: tokens that it sees at most, or None.
    """

    block: Prepared
    attention: Any
    kind: str
    window: int | None

    def __call__(self, hidden: Tensor, answer: Answer) -> Tensor:
        """The next hidden states of [batch, hidden]."""
        return self.block.after(self._attended(hidden, answer).reshape(hidden.shape[0], -1), hidden)

    def _attended(self, hidden: Tensor, answer: Answer) -> Tensor:
        q, k, v = self.block.before(hidden, *answer.rope)
        keys, values = answer.past.update(k.unsqueeze(2), v.unsqueeze(2), self.attention.layer_idx)
        mask = answer.masks[self.kind]
        if answer.name in ("sdpa", NAME) and _plain(keys, values, mask):
            return decode_attention(q, keys, values, _row(mask, keys), self.attention.scaling)
        mixed, _ = ALL_ATTENTION_FUNCTIONS[answer.name](
            self.attention,
            q.unsqueeze(2),
            keys,
            values,
            mask,
            dropout=0.0,
            scaling=self.attention.scaling,
            sliding_window=self.window,
        )
        return mixed


class OwnerStep(Step):
    """Of a layer that others take from."""

    def _attended(self, hidden: Tensor, answer: Answer) -> Tensor:
        q, k, v = self.block.before(hidden, *answer.rope)
        keys, values = answer.past.update(k.unsqueeze(2), v.unsqueeze(2), self.attention.layer_idx)
        mask = _row(answer.masks[self.kind], keys)
        mixed, weights = attention_row(q, keys, values, mask, self.attention.scaling)
        answer.left[self.attention.layer_idx] = Left(weights, keys, values, mask)
        return mixed


class AttentionConsumerStep(Step):
    """Of a layer that takes probabilities."""

    def _attended(self, hidden: Tensor, answer: Answer) -> Tensor:
        values = self.attention.kept(self.block.values(hidden).unsqueeze(2), answer.past)
        return attention_mix(answer.left[self.attention.source].weights, values, self.attention.head_map)


class KeyValueConsumerStep(Step):
    """Of a layer that takes keys and values."""

    def _attended(self, hidden: Tensor, answer: Answer) -> Tensor:
        left = answer.left[self.attention.source]
        q = self.block.queries(hidden, *answer.rope)
        return decode_attention(q, left.keys, left.values, left.mask, self.attention.scaling)


CONSUMER_STEPS: Mapping[type, type[Step]] = MappingProxyType(
    {AttentionConsumer: AttentionConsumerStep, KeyValueConsumer: KeyValueConsumerStep}
)


@dataclass(frozen=True)
class Fusion:
    """The steps of a decoder, and what they were made of; looked at for every token, hence flat and without loops.

    Attributes:
        places: the dictionaries that hold the modules and tensors that the steps stand for.
        names: of each in its place.
        held: what was there.
        modules: those of ``held`` that are modules.
        kinds: their classes.
        attributes: their own dictionaries.
        tensors: those of ``held`` that are tensors.
        addresses: of their data.
        steps: by layer, or None where one can't be fused.
    """

    places: tuple[dict[str, Any], ...]
    names: tuple[str, ...]
    held: tuple[nn.Module | Tensor | None, ...]
    modules: tuple[nn.Module, ...]
    kinds: list[type]
    attributes: tuple[dict[str, Any], ...]
    tensors: tuple[Tensor, ...]
    addresses: list[int]
    steps: tuple[Step, ...] | None

    def current(self) -> bool:
        """Whether the decoder still holds what the steps were made of."""
        return (
            all(map(operator.is_, map(dict.get, self.places, self.names), self.held))
            and list(map(type, self.modules)) == self.kinds
            and list(map(Tensor.data_ptr, self.tensors)) == self.addresses
        )

    def patched(self) -> bool:
        """Whether a module does more than its class says: a hook, or a ``forward`` of its own."""
        return bool(
            torch_module._global_forward_hooks
            or torch_module._global_forward_pre_hooks
            or any(map(_HOOKS, self.attributes))
            or any(map(_PRE_HOOKS, self.attributes))
            or any(map(dict.__contains__, self.attributes, repeat("forward")))
        )

    def trained(self) -> bool:
        """Whether a tensor of the layers wants a gradient."""
        return any(map(_WANTS_GRADIENT, self.tensors))


def fusion_of(decoder: Any) -> Fusion:
    """The steps of a decoder as it is now."""
    held: dict[str, Any] = decoder._modules
    layers: dict[str, Any] = decoder.layers._modules
    places = [(held, "layers"), *((layers, name) for name in layers)]
    for layer in layers.values():
        for parent in (layer, *layer._modules.values()):
            places += [(parent._modules, name) for name, part in parent._modules.items() if part is not None]
    modules = tuple(parts[name] for parts, name in places)
    kinds = [type(part) for part in modules]
    places += [(own, name) for part in modules for own in (part._parameters, part._buffers) for name in own]
    found = tuple(own[name] for own, name in places)
    tensors = tuple(part for part in found if isinstance(part, Tensor))
    addresses = [tensor.data_ptr() for tensor in tensors]
    steps = _steps(decoder) if all(tensor.device.type == "cpu" for tensor in tensors) else None
    holders, names = zip(*places, strict=True)
    return Fusion(holders, names, found, modules, kinds, tuple(map(vars, modules)), tensors, addresses, steps)


def _steps(decoder: Any) -> tuple[Step, ...] | None:
    """The steps of all layers, or None where one can't be fused."""
    if native.library() is None:
        return None
    family = FAMILIES[decoder.config.model_type]
    steps = [_step(layer, decoder.config, family) for layer in decoder.layers]
    return None if None in steps or not steps else tuple(step for step in steps if step is not None)


def _step(layer: Any, config: Any, family: Family) -> Step | None:
    """The fused steps of a layer, or None where its parts aren't those that they compute."""
    attention = layer.get_submodule(family.attention)
    linear = {role: layer.get_submodule(name) for role, name in family.roles.items() if _there(layer, name)}
    ends = {"attention_norm": family.input_norm, "mlp_norm": family.post_norm}
    norms = {name: layer.get_submodule(norm) for name, norm in ends.items()}
    norms |= {name: norm for name in ("q_norm", "k_norm") if (norm := getattr(attention, name, None)) is not None}
    mlp = layer.get_submodule(family.mlp)
    if (
        config.hidden_act not in GATES
        or type(layer) is not family.load_class("DecoderLayer")
        or type(attention) not in (family.load_class("Attention"), *CONSUMER_STEPS)
        or type(mlp) is not family.load_class("MLP")
        or type(mlp.act_fn) is not type(ACT2FN[config.hidden_act])
        or any(type(part) not in (PackedLinear, StoredLinear) for part in linear.values())
        or any(type(n) is not family.load_class("RMSNorm") or n.weight.dtype != torch.float32 for n in norms.values())
        or len({norm.variance_epsilon for norm in norms.values()}) != 1
    ):
        return None
    window = _window(config, family, attention.layer_idx)
    threads = max((part.threads for part in linear.values() if isinstance(part, PackedLinear)), default=1)
    block = prepared(_block(linear, norms, config, attention), threads)
    kind = CONSUMER_STEPS.get(type(attention), OwnerStep if hasattr(attention, ECHO) else Step)
    return kind(block, attention, "full_attention" if window is None else SLIDING, window)


def _there(layer: nn.Module, name: str) -> bool:
    parent, _, own = name.rpartition(".")
    return hasattr(layer.get_submodule(parent), own)


def _window(config: Any, family: Family, layer: int) -> int | None:
    """Tokens that a layer sees at most, by the family's rule."""
    slides = family.window == "all" or (family.window == "typed" and config.layer_types[layer] == SLIDING)
    window: int | None = config.sliding_window if slides else None
    return window


def _block(linear: dict[str, Any], norms: dict[str, Any], config: Any, attention: Any) -> Block:
    """A layer's own tensors, as the fused steps take them."""
    layers: dict[str, Any] = {
        role: Linear(part.packed if isinstance(part, PackedLinear) else part.weight, part.bias)
        for role, part in linear.items()
    }
    packed = [part for part in linear.values() if isinstance(part, PackedLinear)]
    gains: dict[str, Any] = {name: norm.weight for name, norm in norms.items()}
    missing: dict[str, Any] = dict.fromkeys(("q", "k", "v", "q_norm", "k_norm"))
    return Block(
        **missing | layers | gains,
        epsilon=norms["mlp_norm"].variance_epsilon,
        head_dim=attention.head_dim,
        rotary_dim=attention.head_dim,
        act=GATES[config.hidden_act],
        activations=packed[0].activations if packed else "float",
    )


def _plain(keys: Any, values: Any, mask: Any) -> bool:
    """Whether keys, values and mask are what the C++ attention reads."""
    if not isinstance(keys, Tensor) or not isinstance(values, Tensor):
        return False
    if keys.dtype != torch.float32 or values.dtype != torch.float32 or keys.stride(-1) != 1 or values.stride(-1) != 1:
        return False
    if mask is None:
        return True
    batch, tokens = keys.shape[0], keys.shape[2]
    return (
        mask.dtype in (torch.bool, torch.float32)
        and mask.shape in ((batch, 1, 1, tokens), (batch, tokens))
        and mask.stride(-1) == 1
    )


def _row(mask: Tensor | None, keys: Tensor) -> Tensor | None:
    """The mask of one new token of each sequence, [batch, tokens]."""
    if mask is None or mask.dim() == 2:
        return mask
    return mask.expand(len(keys), 1, 1, keys.shape[2])[:, 0, 0]
