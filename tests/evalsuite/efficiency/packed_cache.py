"""A cache as a plug-in would write it: 4-bit codes in int32 words, a scale and a zero point a token and head."""

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

BITS = 4
PER_WORD = 32 // BITS


class Codes:
    """What is kept of keys or of values: no attribute of the layer itself, and no ``nn.Module``."""

    __slots__ = ("scale", "words", "zero")

    def __init__(self) -> None:
        self.words: Tensor | None = None

    def append(self, states: Tensor) -> Tensor:
        """Store ``[batch, heads, tokens, width]``; returns all that is stored, decoded."""
        low, high = states.aminmax(dim=-1, keepdim=True)
        scale = ((high - low) / (2**BITS - 1)).clamp(min=1e-8).half()
        zero = low.half()
        codes = ((states - zero) / scale).round().clamp(0, 2**BITS - 1).to(torch.int64)
        places = BITS * torch.arange(PER_WORD)
        words = (codes.unflatten(-1, (-1, PER_WORD)) << places).sum(-1).to(torch.int32)
        if self.words is not None:
            words, scale, zero = (
                torch.cat(pair, dim=-2) for pair in ((self.words, words), (self.scale, scale), (self.zero, zero))
            )
        self.words, self.scale, self.zero = words, scale, zero
        codes = ((words.unsqueeze(-1) >> places) & (2**BITS - 1)).flatten(-2)
        return codes.to(states.dtype) * scale.to(states.dtype) + zero.to(states.dtype)


class PackedLayer(CacheLayerMixin):
    """A layer without ``keys`` and ``values``."""

    is_croppable = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.stored = {"keys": Codes(), "values": Codes()}
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self.stored["keys"].append(key_states), self.stored["values"].append(value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        words = self.stored["keys"].words if self.is_initialized else None
        return 0 if words is None else words.shape[-2]

    def get_max_length(self) -> int:
        return -1


def packed_cache() -> Cache:
    """A fresh cache for any model."""
    return Cache(layer_class_to_replicate=PackedLayer)
