"""The three figures of a KV cache's size."""

from dataclasses import dataclass


@dataclass(frozen=True)
class KVBytes:
    """Bytes of a cache or of a part of it.

    Attributes:
        payload: codes of packed tokens, and tokens that aren't packed.
        stored: all that is kept for the tokens: with parameters, channel vectors, labels, scores.
        allocated: what the tensors occupy, spare room included.
    """

    payload: int
    stored: int
    allocated: int

    def __add__(self, other: "KVBytes") -> "KVBytes":
        return KVBytes(self.payload + other.payload, self.stored + other.stored, self.allocated + other.allocated)
