"""Which keys a block of query rows attends: lists of key blocks, a sink and a window. One object for every method.

The visible set of a row is defined here, once, and every kernel is tested against it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockList:
    """Lists of key blocks for blocks of query rows.

    Keys lie in T slots. The rows of the queries are the last R tokens of every sequence: with a sequence in slots
    ``[f, e)``, row r is at slot ``e - R + r``, and rows ``[i block_q, (i + 1) block_q)`` share list i and where their
    window begins. The row at slot p of a block whose first row is at slot p0 attends slot ``f <= j <= p`` if

        j - f < sink   or   j > p0 - window   or   a start s of its list has  s <= j < s + block_k.

    A slot in two of them is one key: the list's part of attention leaves out what the sink and the window have.

    Attributes:
        starts: int32 ``[B, N, ceil(R / block_q), K]``; N is the number of KV heads, whose group shares a list, or of
            query heads. The first ``counts`` of every list are slots, ascending, at least ``block_k`` apart, 0 <= s;
            a block may reach beyond the last slot. What follows them isn't looked at.
        counts: int32 ``[B, N, ceil(R / block_q)]``, from 0 to K.
        block_q: query rows that share a list.
        block_k: keys of a block.
        sink: first keys that every row sees.
        window: last keys that the first row of a block sees, itself included, at least 1; its other rows see from the
            same key on.
    """

    starts: Tensor
    counts: Tensor
    block_q: int
    block_k: int
    sink: int
    window: int

    def __post_init__(self) -> None:
        starts, counts = self.starts, self.counts
        if starts.dim() != 4 or starts.dtype != torch.int32:
            raise ValueError(f"starts must be int32 [B, N, blocks, K], got {starts.dtype} of {list(starts.shape)}")
        if counts.shape != starts.shape[:3] or counts.dtype != torch.int32 or counts.device != starts.device:
            raise ValueError(
                f"counts must be int32 {list(starts.shape[:3])} on {starts.device}, got {counts.dtype} of "
                f"{list(counts.shape)} on {counts.device}"
            )
        for name, least in (("block_q", 1), ("block_k", 1), ("sink", 0), ("window", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    @property
    def most(self) -> int:
        """Key blocks that a list can hold."""
        return self.starts.shape[3]

    def check(self, queries: tuple[int, int, int], kv_heads: int) -> None:
        """Whether the lists are for these queries, ``(B, H, R)``.

        Raises:
            ValueError: another batch, number of heads or of rows.
        """
        batch, heads, rows = queries
        blocks = -(-rows // self.block_q)
        fitting = {(batch, kv_heads, blocks), (batch, heads, blocks)}
        if tuple(self.counts.shape) not in fitting:
            allowed = " or ".join(str(list(shape)) for shape in sorted(fitting))
            raise ValueError(
                f"lists [B, N, blocks] = {list(self.counts.shape)} don't fit the queries, which need {allowed}"
            )

    def listed(self, length: int) -> Tensor:
        """Which slots the lists name, ``[B, N, blocks, T]`` bool; for small sizes."""
        slots = torch.arange(length, device=self.starts.device)
        valid = torch.arange(self.most, device=self.starts.device) < self.counts[..., None]
        found = torch.zeros(*self.counts.shape, length, dtype=torch.bool, device=self.starts.device)
        for k in range(self.most):
            start = self.starts[..., k, None]
            found |= valid[..., k, None] & (slots >= start) & (slots < start + self.block_k)
        return found

    def visible(self, rows: int, length: int, bounds: Tensor | None = None) -> Tensor:
        """The visible set of every row, ``[B, N, R, T]`` bool: the definition, for small sizes.

        Args:
            rows: R, the last tokens of every sequence.
            length: T.
            bounds: ``[B, 2]``, first slot of every sequence and one past its last; None: all slots.
        """
        device = self.starts.device
        spans = torch.tensor([[0, length]], device=device) if bounds is None else bounds
        first, end = spans[:, 0, None, None, None], spans[:, 1, None, None, None]
        slots, place = torch.arange(length, device=device), end - rows + torch.arange(rows, device=device)[:, None]
        near = end - rows + torch.arange(rows, device=device)[:, None] // self.block_q * self.block_q - self.window
        named = self.listed(length).repeat_interleave(self.block_q, 2)[:, :, :rows]
        seen = (slots >= first) & (slots <= place)
        return seen & ((slots - first < self.sink) | (slots > near) | named)
