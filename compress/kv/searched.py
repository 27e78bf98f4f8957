"""KV heads that keep all tokens and attend some: sinks, a window, and blocks that are searched for (arXiv 2406.09827).

Up to a length attention is dense, as the model has it. Beyond it a prompt's rows have lists by blocks of rows. While
one token after the other is written, the keys and values of its list lie together in a copy that is exchanged when the
search finds another list, and the window grows until then, so that no token is out of sight meanwhile.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from compress.kernels.block_attention import BlockList, block_attention
from compress.kernels.flash_prefill import flash_prefill
from compress.kernels.segment_attention import Segment
from compress.kv.arena import Change
from compress.kv.bytes import KVBytes
from compress.kv.part import Call
from compress.kv.plain import PlainPart, Reach
from compress.kv.window import Tokens
from compress.plan import Window
from compress.sparse.finder import Finder
from compress.sparse.found import Found


@dataclass
class Lists:
    """What a layer has found, for the layers that take its lists.

    Attributes:
        rows: of the prompt at hand, by sequence; None where everything is attended.
        token: of the newest token; None likewise.
    """

    rows: list[BlockList | None] = field(default_factory=list)
    token: Found | None = None


class SearchedPart(PlainPart):
    """See the module's text, and :class:`compress.kv.part.Part`.

    Args:
        finder: the policy.
        posted: where its lists are left for others.
        taken: where another's lists are found, which are attended instead of searching.
    """

    joins = False

    def __init__(self, finder: Finder, posted: Lists | None = None, taken: Lists | None = None) -> None:
        super().__init__(Reach(0, Window()))
        self.finder, self._posted, self._taken = finder, posted, taken
        self._found: Found | None = None
        self._listed: Segment | None = None
        self._queries: Tensor | None = None  # of the last tokens, where the finder has to see them
        self._sinks = self._window = torch.zeros(0, dtype=torch.int32)  # bounds [batch, heads, 2]

    def fresh(self) -> "SearchedPart":
        """See :class:`compress.kv.part.Part`."""
        return SearchedPart(self.finder, self._posted, self._taken)

    def drops(self, length: int) -> bool:
        """Whether its heads don't attend all of so many tokens."""
        return length > self.finder.gate

    def chunk(self, query: Tensor, new: Tokens, call: Call) -> Tensor:
        """See :class:`compress.kv.part.Part`."""
        held, places = self._joined(new, call)
        known = self._known(query)
        if len(held) <= self.finder.gate:
            out = super().chunk(query, new, call)
            self._remember(known)
            return out
        if self._posted is not None:
            self._posted.rows = []
        padding = (places < 0).sum(1).tolist()
        if not any(padding):
            out = self._sparse(known, query.shape[2], held, call.scaling)
        else:
            out = torch.zeros_like(query)
            for b, first in enumerate(padding):
                own = Tokens(held.keys[b : b + 1, :, first:], held.values[b : b + 1, :, first:])
                rows = min(query.shape[2], len(own))
                one = known[b : b + 1, :, -min(known.shape[2], len(own)) :]
                out[b : b + 1, :, -rows:] = self._sparse(one, rows, own, call.scaling, b)
        self._hold(held, places)
        self._remember(known)
        return out

    def _sparse(self, known: Tensor, rows: int, held: Tokens, scaling: float, sequence: int = 0) -> Tensor:
        """The last rows of a text, [batch, heads, rows, head_dim]; ``sequence`` is its number where it comes alone."""
        if self._taken is None:
            blocks = self.finder.prompt(known, held.keys, held.values, rows)
        else:
            blocks = self._taken.rows[sequence]
        if self._posted is not None:
            self._posted.rows.append(blocks)
        query = known[:, :, -rows:]
        if blocks is None:
            return flash_prefill(query, held.keys, held.values, scaling)[0]
        return block_attention(query, held.keys, held.values, blocks, scaling)[0]

    def step(self, query: Tensor, new: Tokens, scaling: float) -> Tensor:
        """See :class:`compress.kv.part.Part`."""
        length, known = int(self.counts.max()) + 1, self._known(query)
        if length <= self.finder.gate:
            self._remember(known)
            return super().step(query, new, scaling)
        self.append(new)
        counts = self.counts.to(self.near.keys.device)
        self._found = found = self._search(known, counts)
        self._remember(known)
        if found is None:
            self._forget()
            out, _ = self.reader.read(query, self._segments, scaling)
            return out.to(new.values.dtype)
        if found.fresh or self._listed is None:
            self._gather(found)
        self._window[..., 1] = counts[:, None]
        out, _ = self.reader.read(query, self._pieces, scaling)
        return out.to(new.values.dtype)

    def _search(self, known: Tensor, counts: Tensor) -> Found | None:
        """The list of a new token."""
        if self._taken is not None and self._taken.token is not None:
            return self._taken.token
        found = self.finder.token(known, self.near.keys, self.near.values, counts, self._found)
        if self._posted is not None:
            self._posted.token = found
        return found

    def _known(self, query: Tensor) -> Tensor:
        """New queries behind those of earlier tokens that are remembered."""
        return query if self._queries is None else torch.cat([self._queries, query], 2)

    def _remember(self, known: Tensor) -> None:
        """As many of the last queries as the finder has to see."""
        if self.finder.earlier:
            self._queries = known[:, :, -self.finder.earlier :].clone()

    def keep(self, new: Tokens, call: Call) -> None:
        """See :class:`compress.kv.part.Part`."""
        super().keep(new, call)
        self._queries = None

    def crop(self, removed: Tensor) -> None:
        """See :class:`compress.kv.part.Part`."""
        super().crop(removed)
        self._queries = None

    def change(self, change: Change) -> None:
        """See :class:`compress.kv.part.Part`."""
        super().change(change)
        if self._queries is not None:
            self._queries = change(self._queries)
        self._forget()

    def nbytes(self) -> KVBytes:
        """See :class:`compress.kv.part.Part`; the copy of what is listed is room that is allocated, not payload."""
        copied = 0 if self._listed is None else self._listed.keys.nbytes + self._listed.values.nbytes
        copied += 0 if self._queries is None else self._queries.nbytes
        return super().nbytes() + KVBytes(0, 0, copied)

    def _look(self) -> None:
        super()._look()
        self._forget()

    def _forget(self) -> None:
        """The tokens are others: the next one searches everywhere."""
        self._found = self._listed = None
        self.reader.forget()

    def _gather(self, found: Found) -> None:
        """Copy what is listed, and let the window begin where the search ended."""
        blocks, (batch, heads, slots, width) = found.blocks, self.near.keys.shape
        most = int(blocks.counts.max())
        places = blocks.starts[:, :, 0, :most, None] + torch.arange(blocks.block_k, device=blocks.starts.device)
        rows = torch.arange(batch * heads, device=places.device).view(batch, heads, 1) * slots
        chosen = (places.flatten(2).clamp(0, slots - 1) + rows).flatten()
        keys, values = (
            x.reshape(-1, width).index_select(0, chosen).view(batch, heads, -1, width)
            for x in (self.near.keys, self.near.values)
        )
        ends = blocks.counts[:, :, 0] * blocks.block_k
        bounds = torch.stack([torch.zeros_like(ends), ends], 2).to(torch.int32)
        self._listed = Segment(keys, values, 16, 16, None, None, None, None, bounds, keys.shape[2])
        sinks = found.near.clamp(max=blocks.sink).to(torch.int32)
        self._sinks, self._window = (torch.zeros(batch, heads, 2, dtype=torch.int32, device=keys.device) for _ in "ab")
        self._sinks[..., 1] = sinks[:, None]
        self._window[..., 0] = found.near.to(torch.int32)[:, None]
        self.reader.forget()

    def _pieces(self) -> list[Segment]:
        """What a new token attends."""
        assert self._listed is not None
        room = self.near
        near = [
            Segment(room.keys, room.values, 16, 16, None, None, None, None, bounds, room.keys.shape[2])
            for bounds in (self._sinks, self._window)
        ]
        return [*near, *([self._listed] if self._listed.longest else [])]
