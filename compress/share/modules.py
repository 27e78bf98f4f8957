"""Layers that share attention, in a transformers model in memory: an owner stays what it is, a consumer is exchanged.

A consumer of mode ``attn`` has a value and an output projection only and caches its values; one of mode ``kv`` has a
query and an output projection and caches nothing. Owners hand over through :class:`compress.share.echo.Echo`, which
the attention function ``compress_plan`` fills.
"""

from collections.abc import Mapping
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
from compress.share.echo import ECHO, Echo, Led


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

    def forward(self, hidden_states: Tensor, past_key_values: Any = None, **_: Any) -> tuple[Tensor, None]:
        """The layer's attention output [B, R, hidden]; the signature is transformers'."""
        batch, rows, _width = hidden_states.shape
        value = self.v_proj(hidden_states).view(batch, rows, -1, self.head_dim).transpose(1, 2)
        if past_key_values is not None:
            value = self.kept(value, past_key_values)
        led: Led = self.echo.of(self.source)
        return self._projected(led.echoed(value, self.head_map)), None

    def looks(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Queries [B, H, R, D] and keys of its attention."""
        return self.echo.of(self.source).mapped(self.head_map)

    def kept(self, value: Tensor, past: Any) -> Tensor:
        """All values [B, Hkv, T, D] that a cache holds, with new ones among them."""
        layer = past.layers[self.layer_idx] if self.layer_idx < len(past.layers) else None
        width = 0 if isinstance(layer, GrowingLayer) else 1  # transformers counts and reorders tokens by their keys
        held: Tensor = past.update(value[..., :width], value, self.layer_idx)[1]
        return held


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
        consumer = CONSUMERS[share.mode](former, share, echo).train(former.training)
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
