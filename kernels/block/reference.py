"""A decoder layer of the Llama family around its attention, in plain PyTorch."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from compress.kernels.quant_linear import reference as packed
from compress.kernels.quant_linear.weight import QuantWeight
from torch import Tensor

Gate = Literal["silu", "gelu_tanh"]
Activations = Literal["float", "int8"]


@dataclass(frozen=True)
class Linear:
    """A linear layer: packed weights in layout "rows", or a plain matrix [N, K]; bias [N] float32 or None."""

    weight: QuantWeight | Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class Block:
    """The weights of one decoder layer without its attention.

    Attributes:
        q, k, v: its linear layers; None where it takes what they make from an earlier layer: q and k, or k and v.
        o, gate, up, down: its other linear layers.
        attention_norm, mlp_norm: [hidden] float32, what the normed values are multiplied by.
        q_norm, k_norm: [head_dim] float32, norms of each head before RoPE, or None.
        epsilon: of every RMSNorm.
        head_dim: dimensions of a head; the numbers of heads follow from the columns of o and the rows of k or v.
        rotary_dim: the first dimensions of a head that RoPE turns; even.
        act: of the gate.
        activations: "int8" rounds what every packed layer reads to 8 bits over 32 inputs.
    """

    q: Linear | None
    k: Linear | None
    v: Linear | None
    o: Linear
    gate: Linear
    up: Linear
    down: Linear
    attention_norm: Tensor
    mlp_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    epsilon: float
    head_dim: int
    rotary_dim: int
    act: Gate = "silu"
    activations: Activations = "float"


def linear(x: Tensor, layer: Linear, activations: Activations = "float") -> Tensor:
    """x W^T + bias."""
    if isinstance(layer.weight, Tensor):
        return F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))
    return packed.quant_linear(x, layer.weight, layer.bias, activations)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight, over the last dimension."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight.to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first dimensions of each head: x [M, heads, head_dim], cos and sin [M, rotary_dim]."""
    size = cos.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    swapped = torch.cat([-turned[..., size // 2 :], turned[..., : size // 2]], dim=-1)
    return torch.cat([turned * cos[:, None] + swapped * sin[:, None], rest], dim=-1)


def before(block: Block, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From a layer's input to what its attention reads.

    Args:
        block: the layer.
        hidden: [M, hidden], one new token of each of M sequences.
        cos: [M, rotary_dim], as transformers gives it (the second half repeats the first).
        sin: same.

    Returns:
        q [M, heads, head_dim], k and v [M, kv_heads, head_dim].
    """
    x = rms_norm(hidden, block.attention_norm, block.epsilon)
    k = _heads(block, x, block.k)
    if block.k_norm is not None:
        k = rms_norm(k, block.k_norm, block.epsilon)
    return _queries(block, x, cos, sin), rope(k, cos, sin), _heads(block, x, block.v)


def queries(block: Block, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The queries of :func:`before` alone, [M, heads, head_dim], of a layer that takes keys and values."""
    return _queries(block, rms_norm(hidden, block.attention_norm, block.epsilon), cos, sin)


def values(block: Block, hidden: Tensor) -> Tensor:
    """The values of :func:`before` alone, [M, kv_heads, head_dim], of a layer that takes probabilities."""
    return _heads(block, rms_norm(hidden, block.attention_norm, block.epsilon), block.v)


def _queries(block: Block, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    q = _heads(block, x, block.q)
    return rope(q if block.q_norm is None else rms_norm(q, block.q_norm, block.epsilon), cos, sin)


def _heads(block: Block, x: Tensor, layer: Linear | None) -> Tensor:
    if layer is None:
        raise ValueError("this layer takes from an earlier one what it is asked for")
    return linear(x, layer, block.activations).unflatten(-1, (-1, block.head_dim))


def after(block: Block, attention: Tensor, hidden: Tensor) -> Tensor:
    """From the attention's output [M, heads * head_dim] and the layer's input [M, hidden] to its output [M, hidden]."""
    x = hidden + linear(attention, block.o, block.activations)
    normed = rms_norm(x, block.mlp_norm, block.epsilon)
    gate = linear(normed, block.gate, block.activations)
    acted = F.silu(gate) if block.act == "silu" else F.gelu(gate, approximate="tanh")
    return x + linear(acted * linear(normed, block.up, block.activations), block.down, block.activations)


def norm_linear(
    layer: Linear, norm: Tensor, epsilon: float, hidden: Tensor, activations: Activations = "float"
) -> Tensor:
    """The end of a model: linear(RMSNorm(hidden)), [M, hidden] to [M, N]."""
    return linear(rms_norm(hidden, norm, epsilon), layer, activations)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """softmax(scaling q k^T + mask) v for one query token a sequence.

    Args:
        q: [B, heads, D].
        k: [B, kv_heads, T, D]; query head h reads KV head h // (heads // kv_heads).
        v: same.
        mask: [B, T], bool (True: look) or float to be added; None: look everywhere.
        scaling: of the scores.

    Returns:
        [B, heads, D]; zeros where the mask leaves nothing.
    """
    return attention_row(q, k, v, mask, scaling)[0]


def attention_row(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> tuple[Tensor, Tensor]:
    """:func:`decode_attention`, and its probabilities [B, heads, T], zeros where the mask leaves nothing."""
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = scaling * torch.einsum("bhd,bhtd->bht", q, keys)
    if mask is not None:
        added = (
            torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask
        )
        scores = scores + added[:, None]
    seen = (scores > -torch.inf).any(-1, keepdim=True)
    weights = torch.where(seen, scores, 0).softmax(-1) * seen
    return attention_mix(weights, v), weights


def attention_mix(weights: Tensor, v: Tensor, head_map: Tensor | None = None) -> Tensor:
    """Attention by the probabilities of another layer (EchoAtt, arXiv 2409.14595).

    Args:
        weights: [B, heads, T].
        v: [B, kv_heads, T, D].
        head_map: [heads] int64, the row of `weights` for each head; None for its own.

    Returns:
        [B, heads, D].
    """
    own = weights if head_map is None else weights[:, head_map]
    return torch.einsum("bht,bhtd->bhd", own, v.repeat_interleave(own.shape[1] // v.shape[1], dim=1))
