"""Layers that share attention, in a transformers model in memory: an owner stays what it is, a consumer is exchanged.

A consumer of mode ``attn`` has a value and an output projection only and caches its values; one of mode ``kv`` has a
query and an output projection and caches nothing. Owners hand over through :class:`compress.share.echo.Echo`, which
the attention function ``compress_plan`` fills.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import rotate_half

from compress.families import FAMILIES, Family
from compress.fingerprint import fingerprint_of
from compress.kv.attention import NAME
from compress.kv.growing import GrowingLayer
from compress.plan import Share
from compress.share.echo import ECHO, Echo, Led, Own


class Consumer(nn.Module):
    """What all consumers have.

    Args:
        former: the layer's attention module, whose projections are taken over.
        share: what is taken, and from which layer.
        echo: of the model.
    """

    def __init__(self, former: Any, share: Share, echo: Echo) -> None:
        super().__init__()
        self.config, self.layer_idx, self.head_dim = former.config, former.layer_idx, former.head_dim
        self.scaling, self.source = former.scaling, share.source
        self.o_proj = former.o_proj
        self.echo = echo
        self.register_buffer("head_map", None if share.head_map is None else torch.tensor(share.head_map), False)
        self.head_map: Tensor | None

    def _projected(self, mixed: Tensor) -> Tensor:
        """The output of attention [B, H, R, D] as hidden states [B, R, hidden]."""
        batch, _, rows, _ = mixed.shape
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, rows, -1))


class AttentionConsumer(Consumer):
    """Probabilities of an earlier layer times its own values."""

    def __init__(self, former: Any, share: Share, echo: Echo) -> None:
        super().__init__(former, share, echo)
        self.v_proj = former.v_proj

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """The layer's attention output [B, R, hidden]; the signature is transformers'."""
        batch, rows, _width = hidden_states.shape
        value = self.v_proj(hidden_states).view(batch, rows, -1, self.head_dim).transpose(1, 2)
        if past_key_values is not None:
            value = self.kept(value, past_key_values)
        return self._projected(self.mixed(value)), None

    def mixed(self, value: Tensor, *_: Any) -> Tensor:
        """Its attention [B, H, R, D] of its values [B, Hkv, T, D]."""
        led: Led = self.echo.of(self.source)
        return led.echoed(value, self.head_map)

    def looks(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Queries [B, H, R, D] and keys of its attention."""
        return self.echo.of(self.source).mapped(self.head_map)

    def kept(self, value: Tensor, past: Any) -> Tensor:
        """All values [B, Hkv, T, D] that a cache holds, with new ones among them."""
        layer = past.layers[self.layer_idx] if self.layer_idx < len(past.layers) else None
        width = 0 if isinstance(layer, GrowingLayer) else 1  # transformers counts and reorders tokens by their keys
        held: Tensor = past.update(value[..., :width], value, self.layer_idx)[1]
        return held


class ResidualConsumer(AttentionConsumer):
    """Scores of an earlier layer and its own in a few rotary planes, times its own values.

    Queries and keys are rows of the projections that it had, and scales belong to the plan.

    Raises:
        ValueError: its queries and keys have norms, which need all of their channels; packed projections.
    """

    def __init__(self, former: Any, share: Share, echo: Echo) -> None:
        super().__init__(former, share, echo)
        own = share.residual
        assert own is not None
        if hasattr(former, "q_norm"):
            raise ValueError(f"layer {self.layer_idx}: queries and keys with norms have no score residual")
        planes = torch.tensor(own.planes)
        channels = torch.cat([planes, planes + self.head_dim // 2], 1)  # [Hkv, r]
        heads, group = len(own.gain), len(own.gain) // len(own.planes)
        owner = torch.arange(heads) // group
        self.q_proj = _rows(former.q_proj, (torch.arange(heads)[:, None] * self.head_dim + channels[owner]).flatten())
        self.k_proj = _rows(former.k_proj, (torch.arange(len(planes))[:, None] * self.head_dim + channels).flatten())
        self.rank, self.group = own.rank, group
        self.register_buffer("channels", channels, False)
        self.register_buffer("gain", torch.tensor(own.gain), False)
        self.register_buffer("scale", torch.tensor(own.scale).repeat(1, 2), False)  # [H, r]
        self.channels: Tensor
        self.gain: Tensor
        self.scale: Tensor

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """The layer's attention output [B, R, hidden]; the signature is transformers'."""
        assert position_embeddings is not None
        batch, rows, _width = hidden_states.shape
        value = self.v_proj(hidden_states).view(batch, rows, -1, self.head_dim).transpose(1, 2)
        own = self._own(hidden_states, position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(own.key, value, self.layer_idx)
            own = replace(own, key=key)
        return self._projected(self.echo.of(self.source).corrected(value, self.head_map, own)), None

    def mixed(self, value: Tensor, *given: Any) -> Tensor:
        """Its attention of its values [B, Hkv, T, D], for hidden states [B, T, hidden] and their positions."""
        return self.echo.of(self.source).corrected(value, self.head_map, self._own(*given))

    def looks(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Queries and keys [B, H, R, D + r] of its attention."""
        own = self._own(hidden_states, position_embeddings)
        return self.echo.of(self.source).joined(self.head_map, own)

    def _own(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Own:
        batch, rows, _width = hidden_states.shape
        cos, sin = (table[..., self.channels].transpose(1, 2) for table in position_embeddings)  # [B, Hkv, R, r]
        query, key = (
            part(hidden_states).view(batch, rows, -1, self.rank).transpose(1, 2) for part in (self.q_proj, self.k_proj)
        )
        key = key * cos + rotate_half(key) * sin
        cos, sin = (table.repeat_interleave(self.group, dim=1) for table in (cos, sin))
        query = (query * cos + rotate_half(query) * sin) * self.scale[:, None].to(query)
        return Own(query, key, self.gain)


def _rows(linear: Any, rows: Tensor) -> nn.Linear:
    """A linear layer of some outputs of another, dense one; on the meta device without weights."""
    if not isinstance(linear, nn.Linear):
        raise ValueError(f"a score residual is made of dense projections, not of {type(linear).__name__}")
    found = nn.Linear(
        linear.in_features, len(rows), bias=linear.bias is not None, device="meta", dtype=linear.weight.dtype
    )
    if linear.weight.device.type == "meta":
        return found
    for name, tensor in list(linear.named_parameters()):
        picked = tensor.detach()[rows.to(tensor.device)].clone()
        setattr(found, name, nn.Parameter(picked, requires_grad=tensor.requires_grad))
    return found


class KeyValueConsumer(Consumer):
    """Its own queries over keys and values of an earlier layer."""

    def __init__(self, former: Any, share: Share, echo: Echo) -> None:
        super().__init__(former, share, echo)
        self.q_proj, self.num_key_value_groups, self.is_causal = former.q_proj, former.num_key_value_groups, True
        self.q_norm = getattr(former, "q_norm", None)

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: Any
    ) -> tuple[Tensor, None]:
        """The layer's attention output [B, R, hidden]; the signature is transformers'."""
        query = self.looks(hidden_states, position_embeddings)[0]
        return self._projected(self.echo.of(self.source).queried(query)), None

    def looks(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Queries [B, H, R, D] and keys [B, Hkv, T, D] of its attention."""
        batch, rows, _width = hidden_states.shape
        query = self.q_proj(hidden_states).view(batch, rows, -1, self.head_dim)
        if self.q_norm is not None:
            query = self.q_norm(query)
        cos, sin = (table.unsqueeze(1) for table in position_embeddings)
        query = query.transpose(1, 2)
        return query * cos + rotate_half(query) * sin, self.echo.of(self.source).key


CONSUMERS: Mapping[str, type[Consumer]] = {"attn": AttentionConsumer, "kv": KeyValueConsumer}


def consumer_of(former: Any, share: Share, echo: Echo) -> Consumer:
    """What takes the place of an attention module.

    Args:
        former: the module.
        share: what is taken, and from which layer.
        echo: of the model.
    """
    kind = CONSUMERS[share.mode] if share.residual is None else ResidualConsumer
    return kind(former, share, echo)


def share_layers(model: PreTrainedModel, shares: Mapping[int, Share]) -> None:
    """Exchange the attention modules of layers that share; what they don't need any more is gone from the model.

    The model attends through ``compress_plan`` from then on. Layers of mode ``mask`` stay as they are.

    Args:
        model: of a family in ``compress.families``; dense or packed, in any state of training.
        shares: by layer; sources are layers that share nothing themselves, and come before.

    Raises:
        ValueError: a layer that isn't there, a source that isn't before its consumer, a chain, a layer with a sliding
            window, a map that names heads that aren't there, a layer that has been exchanged before.
    """
    taken = {layer: share for layer, share in shares.items() if share.mode in CONSUMERS}
    if not taken:
        return
    decoder: Any = model.base_model
    family = FAMILIES[decoder.config.model_type]
    echo = Echo()
    for layer, share in sorted(taken.items()):
        _check(decoder, family, layer, share, shares)
    for source in {share.source for share in taken.values()}:
        setattr(_attention(decoder, family, source), ECHO, echo)
    for layer, share in taken.items():
        former = _attention(decoder, family, layer)
        consumer = consumer_of(former, share, echo).train(former.training)
        setattr(decoder.layers[layer], family.attention, consumer)
    decoder.register_forward_hook(_Forget(echo), always_call=True)
    model.set_attn_implementation(NAME)


def is_shared(model: PreTrainedModel) -> bool:
    """Whether some layers of a model take attention, or keys and values, from others."""
    return any(isinstance(module, Consumer) for module in model.modules())


def shares(attention: nn.Module) -> bool:
    """Whether an attention module takes from another one, or others take from it."""
    return isinstance(attention, Consumer) or hasattr(attention, ECHO)


class _Forget:
    """After a pass, activations aren't held; autograd holds what it needs itself."""

    def __init__(self, echo: Echo) -> None:
        self.echo = echo

    def __call__(self, *_: Any) -> None:
        self.echo.clear()


def _attention(decoder: Any, family: Family, layer: int) -> Any:
    return decoder.layers[layer].get_submodule(family.attention)


def _check(decoder: Any, family: Family, layer: int, share: Share, shares: Mapping[int, Share]) -> None:
    count, heads = len(decoder.layers), decoder.config.num_attention_heads
    if not 0 <= layer < count:
        raise ValueError(f"layer {layer} isn't there: the model has {count}")
    if not 0 <= share.source < layer:
        raise ValueError(f"layer {layer} takes from layer {share.source}, which isn't before it")
    if share.source in shares:
        raise ValueError(f"layer {layer} takes from layer {share.source}, which shares itself: a chain")
    for index in (layer, share.source):
        module = _attention(decoder, family, index)
        if type(module) is not family.load_class("Attention"):
            raise ValueError(f"layer {index}: its attention is {type(module).__name__}, which can't be shared again")
        if index in fingerprint_of(decoder.config).sliding:
            raise ValueError(f"layer {index} has a sliding window, layers with different windows can't share")
    if share.head_map is not None and (
        len(share.head_map) != heads or not all(0 <= head < heads for head in share.head_map)
    ):
        raise ValueError(f"layer {layer} maps heads {share.head_map}, the model has {heads}")
    if (misfit := share.misfit(fingerprint_of(decoder.config))) is not None:
        raise ValueError(f"layer {layer} has {misfit}")
