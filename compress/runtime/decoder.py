"""A decoder that answers one new token in fused steps on a CPU.

A decoder layer of the common block costs two dozen calls into PyTorch for one token, most of them tiny. Here it costs
four: one C++ call from the hidden state to queries and keys after RoPE, the cache's ``update``, attention, and one C++
call from its output to the next layer's hidden state (``kernels/block``).

The decoder is the family's own class with another ``forward``, so all around it stays transformers': ``generate``,
positions, masks, the cache. It takes the fused way for a call where that is exact, and for every other call (a prompt,
gradients, hooks, hidden states or attention weights asked for, parts that were exchanged, another device or type) runs
what it inherits. Attention isn't part of the fused steps: it reads what the cache returned, through the function that
``attn_implementation`` names. That of ``sdpa`` alone is replaced by ours, for the same keys, values and mask.
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import repeat
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from compress.families import FAMILIES, LINEAR_ROLES, Family
from compress.kernels import native
from compress.kernels.block import Block, Linear, Prepared, decode_attention, prepared
from compress.plan import AttentionPlan
from compress.runtime.cache import GrowingCache
from compress.runtime.linear import PackedLinear, StoredLinear
from compress.runtime.plan_cache import PlanCache

GATES: Mapping[str, Literal["silu", "gelu_tanh"]] = MappingProxyType(
    {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
)
MOST_ROWS = 8  # sequences that answer at once; more are faster as a matrix product
_SLIDING = "sliding_attention"
_HOOKS, _PRE_HOOKS = operator.itemgetter("_forward_hooks"), operator.itemgetter("_forward_pre_hooks")
_WANTS_GRADIENT = operator.attrgetter("requires_grad")
_MASKS: dict[str, Callable[..., Tensor | None]] = {
    "full_attention": create_causal_mask,
    _SLIDING: create_sliding_window_causal_mask,
}


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

    def __call__(
        self, hidden: Tensor, rope: tuple[Tensor, Tensor], past: Any, masks: dict[str, Tensor | None], name: str
    ) -> Tensor:
        """The next hidden states.

        Args:
            hidden: [batch, hidden], of one new token of each sequence.
            rope: cosines and sines [batch, rotary dimensions].
            past: the cache.
            masks: by kind, each [batch, 1, 1, tokens] or None.
            name: of the attention function.
        """
        q, k, v = self.block.before(hidden, *rope)
        keys, values = past.update(k.unsqueeze(2), v.unsqueeze(2), self.attention.layer_idx)
        mask = masks[self.kind]
        if name == "sdpa" and _plain(keys, values, mask):
            rows = None if mask is None else mask[:, 0, 0]
            mixed = decode_attention(q, keys, values, rows, self.attention.scaling)
        else:
            mixed, _ = ALL_ATTENTION_FUNCTIONS[name](
                self.attention,
                q.unsqueeze(2),
                keys,
                values,
                mask,
                dropout=0.0,
                scaling=self.attention.scaling,
                sliding_window=self.window,
            )
        return self.block.after(mixed.reshape(hidden.shape[0], -1), hidden)


@dataclass(frozen=True)
class Plan:
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


class FusedDecoder(nn.Module):
    """What is put before the family's decoder class; see the module's text."""

    config: Any
    embed_tokens: nn.Module
    layers: nn.ModuleList
    norm: nn.Module
    rotary_emb: nn.Module
    attention_plan: AttentionPlan | None = None
    _plan: Plan | None = None  # one value, so that threads never see the steps of one state and the parts of another

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """What the family's decoder returns for the same arguments, with a cache of ours where it would make one."""
        caching = self.config.use_cache if use_cache is None else use_cache
        if past_key_values is None and caching and not learns(self, inputs_embeds):
            plan = self.attention_plan
            past_key_values = GrowingCache(self.config) if plan is None else PlanCache(self.config, plan)
        if past_key_values is not None and inputs_embeds is None and self._asked(input_ids, attention_mask, kwargs):
            assert input_ids is not None
            steps = self._current_steps(past_key_values)
            if steps is not None:
                inputs_embeds, input_ids = self.embed_tokens(input_ids), None
                if _readable(inputs_embeds):
                    return self._answer(steps, inputs_embeds, attention_mask, position_ids, past_key_values)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

    def _asked(self, ids: Tensor | None, mask: Any, kwargs: dict[str, Any]) -> bool:
        """Whether the fused steps can answer these arguments."""
        if ids is None or ids.dim() != 2 or ids.shape[1] != 1 or ids.shape[0] > MOST_ROWS or ids.device.type != "cpu":
            return False
        if kwargs.get("return_dict") is False or any(
            value is not None and value is not False for key, value in kwargs.items() if key != "return_dict"
        ):
            return False
        config = self.config
        if config._attn_implementation == "eager" or self.training or config.output_hidden_states:
            return False  # eager attention is asked for to look at its weights
        return mask is None or isinstance(mask, Tensor)

    def _current_steps(self, past: Any) -> tuple[Step, ...] | None:
        """The steps if they give what the inherited way gives, made anew where a part was exchanged."""
        plan = self._plan
        if plan is None or not plan.current():
            self._plan = plan = _plan(self)
        if plan.steps is None or plan.patched():
            return None
        if torch.is_grad_enabled() and (plan.trained() or _differentiable(past)):
            return None
        return plan.steps

    def _answer(
        self, steps: tuple[Step, ...], hidden: Tensor, attention_mask: Any, position_ids: Tensor | None, past: Any
    ) -> Any:
        batch = hidden.shape[0]
        if position_ids is None:
            position_ids = torch.full((1, 1), past.get_seq_length())
        masks = {
            kind: _MASKS[kind](
                config=self.config,
                inputs_embeds=hidden,
                attention_mask=attention_mask,
                past_key_values=past,
                position_ids=position_ids,
            )
            for kind in dict.fromkeys(step.kind for step in steps)
        }
        cos, sin = (
            table.view(table.shape[0], -1).expand(batch, -1).contiguous()
            for table in self.rotary_emb(hidden, position_ids=position_ids)
        )
        name = self.config._attn_implementation
        flat = hidden.view(batch, -1).clone()  # the layers write into it, and the embedding's output isn't theirs
        for step in steps:
            flat = step(flat, (cos, sin), past, masks, name)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(flat.unsqueeze(1)), past_key_values=past)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._plan = None  # the steps point into tensors that are now replaced
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_plan": None}  # addresses aren't those of a copy


def learns(decoder: nn.Module, embeds: Tensor | None) -> bool:
    """Whether a gradient may go through a cache, which then can't be one that is written in place."""
    if not torch.is_grad_enabled():
        return False
    return (embeds is not None and embeds.requires_grad) or any(p.requires_grad for p in decoder.parameters())


def fused_class(family: Family) -> type[Any]:
    """The family's decoder class with a fused way."""
    base: Any = family.load_class("Model")
    return _fused(base)


@cache
def _fused(base: Any) -> type[Any]:
    members = {"__module__": __name__, "__doc__": f"{base.__name__} with fused steps."}
    return type(f"Fused{base.__name__}", (FusedDecoder, base), members)


def _plan(decoder: FusedDecoder) -> Plan:
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
    return Plan(holders, names, found, modules, kinds, tuple(map(vars, modules)), tensors, addresses, steps)


def _steps(decoder: FusedDecoder) -> tuple[Step, ...] | None:
    """The steps of all layers, or None where one can't be fused."""
    if native.library() is None:
        return None
    family = FAMILIES[decoder.config.model_type]
    steps = [_step(layer, decoder.config, family) for layer in decoder.layers]
    return None if None in steps or not steps else tuple(step for step in steps if step is not None)


def _step(layer: Any, config: Any, family: Family) -> Step | None:
    """The fused steps of a layer, or None where its parts aren't those that they compute."""
    attention = layer.get_submodule(family.attention)
    linear = {role: layer.get_submodule(name) for role, name in LINEAR_ROLES.items()}
    norms = [layer.get_submodule(family.input_norm), layer.get_submodule(family.post_norm)]
    if family.qk_norm:
        norms += [attention.q_norm, attention.k_norm]
    mlp = layer.get_submodule(family.mlp)
    if (
        config.hidden_act not in GATES
        or type(layer) is not family.load_class("DecoderLayer")
        or type(attention) is not family.load_class("Attention")
        or type(mlp) is not family.load_class("MLP")
        or type(mlp.act_fn) is not type(ACT2FN[config.hidden_act])
        or any(type(part) not in (PackedLinear, StoredLinear) for part in linear.values())
        or any(type(norm) is not family.load_class("RMSNorm") or norm.weight.dtype != torch.float32 for norm in norms)
        or len({norm.variance_epsilon for norm in norms}) != 1
    ):
        return None
    window = _window(config, family, attention.layer_idx)
    threads = max((part.threads for part in linear.values() if isinstance(part, PackedLinear)), default=1)
    block = prepared(_block(linear, norms, config, attention), threads)
    return Step(block, attention, "full_attention" if window is None else _SLIDING, window)


def _window(config: Any, family: Family, layer: int) -> int | None:
    """Tokens that a layer sees at most, by the family's rule."""
    slides = family.window == "all" or (family.window == "typed" and config.layer_types[layer] == _SLIDING)
    window: int | None = config.sliding_window if slides else None
    return window


def _block(linear: dict[str, Any], norms: list[Any], config: Any, attention: Any) -> Block:
    """A layer's own tensors, as the fused steps take them."""
    layers: dict[str, Any] = {
        role: Linear(part.packed if isinstance(part, PackedLinear) else part.weight, part.bias)
        for role, part in linear.items()
    }
    packed = [part for part in linear.values() if isinstance(part, PackedLinear)]
    gains: list[Any] = [norm.weight for norm in norms]
    return Block(
        **layers,
        attention_norm=gains[0],
        mlp_norm=gains[1],
        q_norm=gains[2] if gains[2:] else None,
        k_norm=gains[3] if gains[2:] else None,
        epsilon=norms[0].variance_epsilon,
        head_dim=attention.head_dim,
        rotary_dim=attention.head_dim,
        act=GATES[config.hidden_act],
        activations=packed[0].activations if packed else "float",
    )


def _readable(hidden: Tensor) -> bool:
    """Whether hidden states are what the first step reads; a hook may have changed those of the embedding."""
    if hidden.requires_grad and torch.is_grad_enabled():
        return False
    return hidden.dtype == torch.float32 and hidden.device.type == "cpu" and hidden.is_contiguous()


def _differentiable(past: Any) -> bool:
    """Whether a cache holds keys or values that want a gradient."""
    held = (getattr(layer, name, None) for layer in getattr(past, "layers", ()) for name in ("keys", "values"))
    return any(isinstance(states, Tensor) and states.requires_grad for states in held)


def _plain(keys: Any, values: Any, mask: Any) -> bool:
    """Whether keys, values and mask are what the C++ attention reads."""
    if not isinstance(keys, Tensor) or not isinstance(values, Tensor):
        return False
    if keys.dtype != torch.float32 or values.dtype != torch.float32 or keys.stride(-1) != 1 or values.stride(-1) != 1:
        return False
    if mask is None:
        return True
    shape = (keys.shape[0], 1, 1, keys.shape[2])
    return mask.dtype in (torch.bool, torch.float32) and mask.shape == shape and mask.stride(-1) == 1
