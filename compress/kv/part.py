"""A cache of some KV heads of a layer: what the layer (``layer.py``) asks of it."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from compress.kv.arena import Change
from compress.kv.bytes import KVBytes
from compress.kv.window import Tokens


@dataclass(frozen=True)
class Call:
    """What is known of new tokens besides themselves.

    Attributes:
        scaling: factor of the scores.
        first: [batch] int64 on the CPU, slot where each sequence's tokens begin; before it is padding.
        alone: whether nothing came before them.
    """

    scaling: float
    first: Tensor
    alone: bool

    @property
    def ragged(self) -> bool:
        """Whether a sequence has padding."""
        return bool((self.first > 0).any())


class Part(Protocol):
    """Keys and values of ``n`` KV heads, and attention over them."""

    @property
    def croppable(self) -> bool:
        """Whether the last tokens can be forgotten as things are."""

    def fresh(self) -> "Part":
        """An empty one of the same kind."""

    def begin(self, key: Tensor) -> None:
        """Take batch, heads, device and type from the first keys, [batch, n, tokens, head_dim]."""

    def step(self, query: Tensor, new: Tokens, scaling: float) -> Tensor:
        """Attention of one new token of every sequence over what is held and itself; then keep it.

        Args:
            query: [batch, n * group, 1, head_dim].
            new: the token.
            scaling: factor of the scores.

        Returns:
            Shaped like ``query``.
        """

    def chunk(self, query: Tensor, new: Tokens, call: Call) -> Tensor:
        """Causal attention of many new tokens, and over what is held; then keep them."""

    def keep(self, new: Tokens, call: Call) -> None:
        """Keep tokens without attending."""

    def crop(self, removed: Tensor) -> None:
        """Forget the last tokens, ``removed`` [batch] of each sequence.

        Raises:
            ValueError: more than can be forgotten.
        """

    def change(self, change: Change) -> None:
        """Apply a function of the batch's dimension to every tensor."""

    def nbytes(self) -> KVBytes:
        """Payload, stored and allocated bytes."""
