"""Which packed tokens are salient: one bit for each, in the order of the tokens.

It is all that is needed to find a token again after its class was filled front to back: to drop the last ones, and to
unpack a cache in order.
"""

import torch
from torch import Tensor

from compress.kv.arena import Change, Place


class Labels:
    """Bits of every sequence and KV head.

    Args:
        batch: sequences.
        heads: KV heads.
        device: where they lie.
    """

    def __init__(self, batch: int, heads: int, device: torch.device) -> None:
        self.bits = torch.zeros(batch, heads, 0, dtype=torch.uint8, device=device)

    def append(self, place: Place, held: int, salient: Tensor) -> None:
        """Behind the first ``held`` tokens of a place come others, ``salient`` [rows, heads, tokens] bool."""
        joined = torch.cat([self.read(place, held), salient], 2)
        length = -(-joined.shape[2] // 8)
        if length > self.bits.shape[2]:
            room = self.bits.new_zeros(*self.bits.shape[:2], length)
            room[:, :, : self.bits.shape[2]] = self.bits
            self.bits = room
        whole = torch.nn.functional.pad(joined, (0, 8 * length - joined.shape[2]))
        weights = 1 << torch.arange(8, device=joined.device, dtype=torch.int32)
        packed = (whole.view(*whole.shape[:2], length, 8) * weights).sum(3)
        self.bits[place.rows, place.heads, :length] = packed.to(torch.uint8)

    def read(self, place: Place, count: int) -> Tensor:
        """The first ``count`` labels, [rows, heads, count] bool."""
        packed = self.bits[place.rows, place.heads, : -(-count // 8), None]
        shifts = torch.arange(8, device=packed.device, dtype=torch.uint8)
        return ((packed >> shifts) & 1).flatten(2)[..., :count].bool()

    def change(self, change: Change) -> None:
        """Apply a function of the batch's dimension."""
        self.bits = change(self.bits)
