"""What a search for one new token reads, and what it finds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from compress.kernels.block_attention import BlockList

Scores = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
"""As :func:`compress.kernels.chunk_scores.chunk_scores`, without its keys, which are known."""


class Keys(Protocol):
    """Keys [B, Hkv, T, D] that don't lie in one tensor."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """As of the tensor."""

    @property
    def scores(self) -> Scores:
        """Of chunks."""

    def span(self, first: int, end: int) -> Tensor:
        """Keys at consecutive places, ``[B, Hkv, end - first, D]`` float32."""


@dataclass
class Found:
    """What one new token attends besides the sink.

    Attributes:
        blocks: the list, ``[B, Hkv, 1, K]``.
        near: first slot of every sequence's window ``[B]``, which stays where it was until the next search.
        fresh: whether the list is another than the former token's.
        state: for the next token's search.
    """

    blocks: BlockList
    near: Tensor
    fresh: bool
    state: Any


def window_begin(ends: Tensor, sink: int, window: int, block_k: int) -> Tensor:
    """The first slot of windows: at least ``window`` newest tokens, a whole number of blocks behind the sink.

    Args:
        ends: one past each sequence's last slot ``[B]``.
        sink: first tokens.
        window: newest tokens.
        block_k: tokens of a block.
    """
    near = ends - window
    return near - (near - sink).clamp(min=0) % block_k
