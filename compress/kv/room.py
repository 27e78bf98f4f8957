"""Room for keys and values of some heads in the model's own type, filled by slots."""

import torch
from torch import Tensor

from compress.kernels.segment_attention import Segment
from compress.kv.arena import Change

STEP = 64  # slots that room grows by


class Room:
    """Slots shaped like ``key`` [batch, KV heads, tokens, head_dim].

    Attributes:
        keys: [batch, KV heads, slots, head_dim].
        values: alike.
        bounds: [batch, KV heads, 2] int32, first filled slot, and one past the last.
    """

    def __init__(self, key: Tensor) -> None:
        batch, heads, _, width = key.shape
        self.keys, self.values = (key.new_zeros(batch, heads, 0, width) for _ in range(2))
        self.bounds = torch.zeros(batch, heads, 2, dtype=torch.int32, device=key.device)

    def reserve(self, slots: int, most: int | None = None) -> bool:
        """Make room for so many slots, and for some more up to ``most``; returns whether tensors were exchanged."""
        held = self.keys.shape[2]
        if slots <= held:
            return False
        wanted = -(-slots // STEP) * STEP
        wanted = wanted if most is None else max(slots, min(wanted, most))
        for name in ("keys", "values"):
            former: Tensor = getattr(self, name)
            room = former.new_empty(*former.shape[:2], wanted, former.shape[3])
            room[:, :, :held] = former
            room[:, :, held:] = 0
            setattr(self, name, room)
        return True

    def grow_in_front(self, slots: int) -> None:
        """Put so many empty slots before the others."""
        for name in ("keys", "values"):
            former: Tensor = getattr(self, name)
            setattr(self, name, torch.nn.functional.pad(former, (0, 0, slots, 0)))
        self.bounds += slots

    def write(self, slots: list[int], keys: Tensor, values: Tensor) -> None:
        """Put one token of every sequence, [batch, KV heads, 1, head_dim], into its slot; one slot is for all."""
        if slots.count(slots[0]) == len(slots):
            self.keys.narrow(2, slots[0], 1).copy_(keys)
            self.values.narrow(2, slots[0], 1).copy_(values)
            return
        rows, places = torch.arange(len(slots), device=keys.device), torch.tensor(slots, device=keys.device)
        self.keys[rows, :, places] = keys[:, :, 0]
        self.values[rows, :, places] = values[:, :, 0]

    def fill(self, keys: Tensor, values: Tensor, ends: list[int]) -> None:
        """Hold these tokens and no others, ``ends`` of each sequence."""
        self.keys, self.values = (states.clone(memory_format=torch.contiguous_format) for states in (keys, values))
        self.end_at(ends)

    def end_at(self, ends: list[int]) -> None:
        """Filled slots of every sequence; one number is for all."""
        if ends.count(ends[0]) == len(ends):
            self.bounds.select(2, 1).fill_(ends[0])
        else:
            self.bounds[..., 1] = torch.tensor(ends, device=self.bounds.device)[:, None]

    def begin_at(self, first: list[int]) -> None:
        """First filled slot of every sequence."""
        self.bounds[..., 0] = torch.tensor(first, device=self.bounds.device)[:, None]

    def segment(self) -> Segment:
        """For :func:`compress.kernels.segment_attention.segment_attention`."""
        slots = self.keys.shape[2]
        return Segment(self.keys, self.values, 16, 16, None, None, None, None, self.bounds, slots)

    def change(self, change: Change) -> None:
        """Apply a function of the batch's dimension to every tensor."""
        for name in ("keys", "values", "bounds"):
            setattr(self, name, change(getattr(self, name)))

    def payload(self) -> int:
        """Bytes of the filled slots."""
        tokens = int((self.bounds[..., 1] - self.bounds[..., 0]).sum())
        return 2 * tokens * self.keys.shape[3] * self.keys.element_size()
