"""KV heads of a layer that hold equally many tokens, and lie in tensors of their own."""

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_CLUSTERS = 3  # what a plan allows a layer


@dataclass(frozen=True)
class Cluster:
    """Keys and values of some KV heads, up to C slots a sequence and head; attention doesn't care for their order.

    Attributes:
        keys: after rotary embedding ``[B, n, C, D]``, the last dimension contiguous.
        values: likewise.
        heads: which of the layer's KV heads these are, n numbers in the order of the tensors.
        bounds: int32 ``[B, n, 2]``, the first slot that is filled and one past the last; none where they are equal.
        longest: the largest number of slots between bounds, as known to the host, or more; 0 lets it be skipped.

    Raises:
        ValueError: tensors that don't fit each other.
    """

    keys: Tensor
    values: Tensor
    heads: tuple[int, ...]
    bounds: Tensor
    longest: int

    def __post_init__(self) -> None:
        shape = self.keys.shape
        if self.keys.dim() != 4 or self.values.shape != shape or self.values.dtype != self.keys.dtype:
            raise ValueError(
                "keys and values must be [B, n, C, D] of one shape and type, "
                f"got {self.keys.dtype} {list(shape)} and {self.values.dtype} {list(self.values.shape)}"
            )
        if len(self.heads) != shape[1]:
            raise ValueError(f"there are keys of {shape[1]} KV heads, but heads={self.heads}")
        if self.bounds.shape != (*shape[:2], 2) or self.bounds.dtype != torch.int32:
            raise ValueError(
                f"bounds must be int32 [B, n, 2] = {[*shape[:2], 2]}, got {self.bounds.dtype} {list(self.bounds.shape)}"
            )
        if not 0 <= self.longest <= shape[2]:
            raise ValueError(f"longest={self.longest}, but there are {shape[2]} slots")
