"""A cache of half the bytes, for processes that import it by name."""

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer


class HalfLayer(DynamicLayer):
    """Keeps float16."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states.half(), value_states.half())

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states.half(), value_states.half())
        return keys.to(key_states.dtype), values.to(torch.float32)


class HalfCache(Cache):
    """Makes itself."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=HalfLayer)
