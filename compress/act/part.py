"""KV heads that keep all tokens, and give attention sinks less weight than they have (arXiv 2406.15765).

Sinks must be known before a row attends. A *prompt*, or any chunk of more than one token, is gone through twice: its
rows' column sums are added to those of the chunks before it, sinks are found by the sums, by all rows that were summed
and by the tokens that are there then, and all rows of the chunk attend with these sinks; rows of earlier chunks keep
what they got. *A single new token* attends with the sinks that the last chunk left, and adds nothing to the sums, so
that decoding goes through the keys once; tokens that were decoded may become sinks with the next chunk. A text that
comes in one chunk is thus what the matrix form gives.

Where tokens are cropped, what their rows have added to the sums of earlier tokens stays.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.act.segments import calibrated, calibrated_row
from compress.act.sinks import received, sight, sinks
from compress.evalsuite.efficiency import allocated
from compress.kv.arena import Change
from compress.kv.bytes import KVBytes
from compress.kv.part import Call
from compress.kv.plain import PlainPart, Reach
from compress.kv.window import Tokens
from compress.plan import Calibration, Window

STEP = 64  # slots that room grows by


@dataclass(frozen=True)
class Known:
    """What is known of the tokens, with room for more.

    Attributes:
        sums: attention from chunks' rows, [batch, heads, slots] float32.
        seen: rows that gave it, [batch, slots] float32.
        kinds: 1 for sinks, 0 for others, -1 for no token, [batch, heads, slots] int8.
    """

    sums: Tensor
    seen: Tensor
    kinds: Tensor

    @classmethod
    def nothing(cls, query: Tensor) -> "Known":
        """Of no token; query heads [batch, heads, rows, head_dim]."""
        batch, heads = query.shape[:2]
        sums = torch.zeros(batch, heads, 0, device=query.device)
        return cls(sums, sums.new_zeros(batch, 0), sums.to(torch.int8))

    def wide(self, slots: int) -> "Known":
        """With room for so many tokens."""
        further = -(-slots // STEP) * STEP - self.kinds.shape[2]
        if further <= 0:
            return self
        sums, seen = (F.pad(x, (0, further)) for x in (self.sums, self.seen))
        return Known(sums, seen, F.pad(self.kinds, (0, further), value=-1))

    def cut(self, counts: Tensor) -> None:
        """Forget all but the first tokens of every sequence, ``counts`` [batch]."""
        gone = (torch.arange(self.kinds.shape[2]) >= counts[:, None]).to(self.kinds.device)
        self.kinds.masked_fill_(gone[:, None], -1)
        self.sums.masked_fill_(gone[:, None], 0.0)
        self.seen.masked_fill_(gone, 0.0)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """All there is."""
        return self.sums, self.seen, self.kinds


class CalibratedPart(PlainPart):
    """See the module's text, and :class:`compress.kv.part.Part`.

    Args:
        calibration: of its heads; every query head has sinks of its own.
    """

    joins = False

    def __init__(self, calibration: Calibration) -> None:
        super().__init__(Reach(0, Window()))
        self.calibration = calibration
        self._known: Known | None = None

    def fresh(self) -> "CalibratedPart":
        """See :class:`compress.kv.part.Part`."""
        return CalibratedPart(self.calibration)

    def drops(self, length: int) -> bool:
        """Always: the model's own attention isn't that of its heads."""
        return True

    def chunk(self, query: Tensor, new: Tokens, call: Call) -> Tensor:
        """See :class:`compress.kv.part.Part`."""
        held, places = self._joined(new, call)
        before, padding = self.counts.tolist(), (places < 0).sum(1).tolist()
        known = self._wide(query, max(len(held) - first for first in padding))
        out = torch.zeros_like(query)
        for b, first in enumerate(padding):
            tokens = len(held) - first
            if not (count := tokens - before[b]):
                continue
            one = slice(b, b + 1)
            new_rows, text = query[one, :, -count:], Tokens(held.keys[one, :, first:], held.values[one, :, first:])
            own = [x[b, ..., :tokens] for x in known.tensors()]
            out[one, :, -count:] = self._rows(new_rows, text, call.scaling, own)
        self._hold(held, places)
        return out

    def _rows(self, query: Tensor, text: Tokens, scaling: float, known: Sequence[Tensor]) -> Tensor:
        """The last rows of a text that comes alone, [1, heads, rows, head_dim]; sums, seen and kinds are its own."""
        rows, tokens = query.shape[2], len(text)
        sums, seen, kinds = known
        kinds.clamp_(min=0)
        if rows > 1 or rows == tokens:
            sums += received(query, text.keys, scaling)[0]
            seen += sight(rows, tokens, query.device)
            kinds.copy_(sinks(sums, seen, self.calibration))
        return calibrated(query, text.keys, text.values, kinds[None] == 1, (self.calibration.beta, scaling))

    def step(self, query: Tensor, new: Tokens, scaling: float) -> Tensor:
        """See :class:`compress.kv.part.Part`."""
        places = self.counts.tolist()
        self.append(new)
        most = max(places) + 1
        kinds = self._wide(query, most).kinds
        if places.count(places[0]) == len(places):
            kinds[..., places[0]] = 0
        else:
            rows = torch.arange(len(places), device=kinds.device)
            kinds[rows, :, torch.tensor(places, device=kinds.device)] = 0
        held = (self.near.keys[:, :, :most], self.near.values[:, :, :most])
        how = self.calibration.beta, scaling
        return calibrated_row(query, *held, kinds[..., :most], how).to(new.values.dtype)

    def crop(self, removed: Tensor) -> None:
        """See :class:`compress.kv.part.Part`."""
        super().crop(removed)
        if self._known is not None:
            self._known.cut(self.counts)

    def change(self, change: Change) -> None:
        """See :class:`compress.kv.part.Part`."""
        super().change(change)
        if self._known is not None:
            self._known = Known(*(change(x) for x in self._known.tensors()))

    def nbytes(self) -> KVBytes:
        """See :class:`compress.kv.part.Part`."""
        if self._known is None:
            return super().nbytes()
        a_token = sum(x.shape[1:-1].numel() * x.element_size() for x in self._known.tensors())
        room = allocated(self._known.tensors()).nbytes
        return super().nbytes() + KVBytes(0, a_token * int(self.counts.sum()), room)

    def _wide(self, query: Tensor, slots: int) -> Known:
        """What is known, with room for so many tokens."""
        known = Known.nothing(query) if self._known is None else self._known
        self._known = known.wide(slots)
        return self._known
