"""What a layer leaves for the layers behind it that take its attention, or its keys and values, instead of their own.

An owner's queries, keys, values and mask are held until the next forward pass, one set for each thread, so that a
model can answer in several. Where one token is written, the owner computes its row of probabilities itself and the
consumers multiply it with their own values (EchoAtt, arXiv 2409.14595); the rows of a prompt are never materialised,
a consumer attends with the owner's queries and keys.
"""

import threading
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

ECHO = "echo"
"""The attribute by which an owner's attention module holds its :class:`Echo`."""


@dataclass(frozen=True)
class Led:
    """One owner's attention.

    Attributes:
        query: after rotary embedding, [B, H, R, D].
        key: [B, Hkv, T, D].
        value: [B, Hkv, T, D].
        mask: as sdpa takes it, [B, 1, R, T] bool or float, or None for causal attention of the last R tokens.
        scaling: factor of the scores.
        weights: probabilities [B, H, 1, T] where R is 1, else None.
        scores: what they are the softmax of, without the mask.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    weights: Tensor | None
    scores: Tensor | None = None

    def output(self) -> Tensor:
        """The owner's own attention of one token, [B, H, 1, D]."""
        assert self.weights is not None
        return mixed(self.weights, self.value)

    def echoed(self, value: Tensor, head_map: Tensor | None) -> Tensor:
        """``softmax(Q_s K_s^T) V``: a consumer's attention, [B, H, R, D].

        Args:
            value: the consumer's own values [B, Hkv, T, D].
            head_map: the owner's query head for each of the consumer's, [H]; None for the same.
        """
        if self.weights is not None:
            weights = self.weights if head_map is None else self.weights[:, head_map]
            return mixed(weights, value)
        query, key = self.mapped(head_map)
        values = value if head_map is None else value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        return self._attended(query, key, values)

    def corrected(self, value: Tensor, head_map: Tensor | None, own: "Own") -> Tensor:
        """``softmax(gain Q_s K_s^T + Q K^T) V``: the attention of a consumer with a score residual, [B, H, R, D].

        Args:
            value: the consumer's own values [B, Hkv, T, D].
            head_map: as :meth:`echoed` has it.
            own: the residual.
        """
        if self.scores is not None:
            taken = self.scores if head_map is None else self.scores[:, head_map]
            scores = taken * own.gain[:, None, None].to(taken) + scored(own.query, own.key, self.scaling)
            return mixed(normalized(scores, self.mask), value)
        query, key = self.joined(head_map, own)
        values = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        wide = torch.nn.functional.pad(values, (0, query.shape[3] - value.shape[3]))  # flash attention wants one width
        return self._attended(query, key, wide)[..., : value.shape[3]]

    def joined(self, head_map: Tensor | None, own: "Own") -> tuple[Tensor, Tensor]:
        """Queries [B, H, R, D + r] and keys [B, H, T, D + r] of the same attention, of every head."""
        query, key = self.mapped(head_map)
        heads = query.shape[1]
        taken = query * own.gain[:, None, None].to(query)
        keys = [part.repeat_interleave(heads // part.shape[1], dim=1) for part in (key, own.key)]
        return torch.cat([taken, own.query], 3), torch.cat(keys, 3)

    def mapped(self, head_map: Tensor | None) -> tuple[Tensor, Tensor]:
        """Queries [B, H, R, D] and keys [B, Hkv, T, D] of a consumer's attention; with a map keys of every head."""
        if head_map is None:
            return self.query, self.key
        return self.query[:, head_map], self.key[:, head_map // (self.query.shape[1] // self.key.shape[1])]

    def queried(self, query: Tensor) -> Tensor:
        """``softmax(Q K_s^T) V_s``: a consumer's queries [B, H, R, D] over the owner's keys and values."""
        return self._attended(query, self.key, self.value)

    def _attended(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        module: Any = SimpleNamespace(num_key_value_groups=query.shape[1] // key.shape[1], is_causal=True)
        out, _ = sdpa_attention_forward(module, query, key, value, self.mask, scaling=self.scaling)
        return out.transpose(1, 2)


@dataclass(frozen=True)
class Own:
    """What a consumer adds to the scores that it takes.

    Attributes:
        query: scaled, after rotary embedding, [B, H, R, r].
        key: [B, Hkv, T, r].
        gain: of what is taken, [H].
    """

    query: Tensor
    key: Tensor
    gain: Tensor


class Echo(threading.local):
    """The owners' attention of the pass at hand, by layer; a copy of a model has one of its own."""

    def __init__(self) -> None:
        self._led: dict[int, Led] = {}

    def lead(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor | None:
        """Hold an owner's attention.

        Returns:
            Its output [B, H, 1, D] where one token is written, else None: the caller attends as ever.
        """
        scores = scored(query, key, scaling) if query.shape[2] == 1 else None
        weights = None if scores is None else normalized(scores, mask)
        self._led[layer] = led = Led(query, key, value, mask, scaling, weights, scores)
        return None if weights is None else led.output()

    def put(self, layer: int, led: Led) -> None:
        """Hold what an owner has left before, of a text that is looked at again."""
        self._led[layer] = led

    def of(self, layer: int) -> Led:
        """What an owner has left.

        Raises:
            RuntimeError: it hasn't attended in this pass.
        """
        led = self._led.get(layer)
        if led is None:
            raise RuntimeError(f"layer {layer} hasn't attended before the layers that take its attention")
        return led

    def clear(self) -> None:
        """Forget: what is held are activations."""
        self._led.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Echo":
        return Echo()

    def __reduce__(self) -> tuple[type["Echo"], tuple[()]]:
        return Echo, ()


def scored(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """``q K^T`` of one row, [B, H, 1, T]."""
    batch, heads, _, width = query.shape
    kv_heads, tokens = key.shape[1], key.shape[2]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, width)
    scores = (grouped @ key.transpose(2, 3)) * scaling  # [B, Hkv, group, T]
    return scores.view(batch, heads, 1, tokens)


def normalized(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax of scores [B, H, 1, T], the mask bool or added."""
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1, dtype=torch.float32).to(scores.dtype)


def mixed(weights: Tensor, value: Tensor) -> Tensor:
    """Probabilities [B, H, 1, T] times values [B, Hkv, T, D], [B, H, 1, D]."""
    batch, heads, _, tokens = weights.shape
    kv_heads = value.shape[1]
    out = weights.reshape(batch, kv_heads, heads // kv_heads, tokens) @ value
    return out.view(batch, heads, 1, value.shape[3])
