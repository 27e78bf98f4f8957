"""Block-sparse attention on a CPU: keys of some blocks of rows are gathered for PyTorch's blockwise kernel.

A block of rows whose sink, list and window lie apart sees the same pattern as every other such block: all of sink, list
and window, and of the block itself what is not later. So blocks are treated some at a time, with one mask for all. Rows
that see everything before them are dense attention; the few blocks that are neither, where a list reaches into the sink
or the window, get a mask of their own.
"""

import math
from dataclasses import dataclass

import torch
from compress.kernels.block_attention.blocks import BlockList
from compress.kernels.flash_prefill import cpu as flash
from compress.kernels.segment_attention import Segment, segment_attention
from torch import Tensor

GATHERED = 1 << 22  # bytes of keys that are gathered at once: they are to stay in a cache


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockList, scaling: float | None = None, bounds: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`compress.kernels.block_attention.block_attention`."""
    scale = q.shape[3] ** -0.5 if scaling is None else scaling
    spans = [[0, k.shape[2]]] * len(q) if bounds is None else bounds.tolist()
    per_kv, lists = q.shape[1] // k.shape[1], blocks.counts.shape[1]
    group = q.shape[1] // lists if lists else 1
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.full(q.shape[:3], -math.inf)
    for b, (first, end) in enumerate(spans):
        for n in range(lists if q.shape[2] and first < end else 0):
            heads, kv = slice(n * group, (n + 1) * group), n * group // per_kv
            keys, values = k[b, kv, first:end], v[b, kv, first:end]
            item = _Item(q[b, heads], keys, values, blocks, blocks.starts[b, n] - first, blocks.counts[b, n], scale)
            item.attend(out[b, heads], lse[b, heads])
    return out, lse


@dataclass(frozen=True)
class _Item:
    """One sequence and list head; slots are counted from the sequence's first.

    Attributes:
        q: queries ``[group, R, D]``, of the last R tokens.
        k: keys ``[T, D]``, T the tokens of the sequence.
        v: values likewise.
        blocks: for its sizes.
        starts: ``[blocks, K]``.
        counts: ``[blocks]``.
        scale: factor of the scores.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    blocks: BlockList
    starts: Tensor
    counts: Tensor
    scale: float

    @property
    def offset(self) -> int:
        """The slot of row 0; negative where it is padding."""
        return len(self.k) - self.q.shape[1]

    def attend(self, out: Tensor, lse: Tensor) -> None:
        """Fill the output ``[group, R, D]`` and the log-sum-exp ``[group, R]`` of rows that aren't padding."""
        rows, size = self.q.shape[1], self.blocks.block_q
        if rows == 1:
            out[:], lse[:] = self._newest()
            return
        begin, dense = max(0, -self.offset), self._dense_rows()
        if dense > begin:
            end = self.offset + dense
            found = flash.flash_prefill(
                self.q[None, :, begin:dense], self.k[None, None, :end], self.v[None, None, :end], self.scale
            )
            out[:, begin:dense], lse[:, begin:dense] = found[0][0], found[1][0]
        regular = self._regular(dense)
        for i in range(dense // size, len(regular)):
            part = slice(max(i * size, dense), min((i + 1) * size, rows))
            if not regular[i] and part.start < part.stop:
                out[:, part], lse[:, part] = self._masked(i, part)
        self._gathered(regular.nonzero()[:, 0], out, lse)

    def _dense_rows(self) -> int:
        """Rows, from the first on, that see everything before them by sink and window alone: whole blocks of rows."""
        size = self.blocks.block_q
        first = max(0, self.blocks.sink + self.blocks.window - self.offset)  # that may begin a block with a list
        return min(-(-first // size) * size, self.q.shape[1])

    def _regular(self, dense: int) -> Tensor:
        """Which blocks of rows see sink, list and window apart, and all have keys for a whole window, [blocks] bool."""
        blocks, rows = self.blocks, self.q.shape[1]
        index = torch.arange(len(self.counts))
        place = self.offset + index * blocks.block_q  # of a block's first row
        fitting = (index * blocks.block_q >= dense) & ((index + 1) * blocks.block_q <= rows)
        near = place - blocks.window + 1
        listed = torch.arange(self.starts.shape[1]) < self.counts[:, None]
        apart = (self.starts >= blocks.sink) & (self.starts + blocks.block_k <= near[:, None])
        return fitting & (near >= blocks.sink) & (apart | ~listed).all(1)

    def _gathered(self, chosen: Tensor, out: Tensor, lse: Tensor) -> None:
        """Blocks that are regular, some at a time."""
        blocks, (group, _, width) = self.blocks, self.q.shape
        size, band = blocks.block_q, blocks.window + blocks.block_q - 1
        slots = blocks.sink + self.starts.shape[1] * blocks.block_k + band
        count = max(1, GATHERED // (slots * width * self.k.element_size()))
        full = self.counts[chosen] == self.counts[chosen].max() if len(chosen) else torch.empty(0, dtype=torch.bool)
        # Shorter lists need a mask of their own, so they are by themselves.
        for some in (x for part in (chosen[full], chosen[~full]) for x in part.split(count) if len(part)):
            counts = self.counts[some]
            most = int(counts.max())
            listed = self.starts[some, :most, None] + torch.arange(blocks.block_k)
            missing = torch.arange(most) >= counts[:, None]
            first = self.offset + some * size - blocks.window + 1
            columns = torch.cat(
                [
                    torch.arange(blocks.sink).expand(len(some), -1),
                    listed.masked_fill_(missing[..., None], 0).flatten(1),
                    first[:, None] + torch.arange(band),
                ],
                1,
            )
            keys, values = (
                x.index_select(0, columns.flatten()).view(len(some), 1, -1, width).expand(-1, group, -1, -1)
                for x in (self.k, self.v)
            )
            mask = self._band(columns.shape[1])
            if bool(missing.any()):
                mask = mask.repeat(len(some), 1, 1, 1)
                hidden = missing.repeat_interleave(blocks.block_k, 1)[:, None, None]
                mask[..., blocks.sink : blocks.sink + most * blocks.block_k].masked_fill_(hidden, -math.inf)
            rows = (some[:, None] * size + torch.arange(size)).flatten()
            queries = self.q[:, rows].unflatten(1, (len(some), size)).transpose(0, 1)
            found, sums = self._sdpa(queries, keys, values, mask)
            out[:, rows] = found.transpose(0, 1).flatten(1, 2)
            lse[:, rows] = sums.transpose(0, 1).flatten(1, 2)

    def _band(self, slots: int) -> Tensor:
        """What is added to the scores of a regular block, [1, 1, block_q, slots]: rows don't see later ones."""
        size = self.blocks.block_q
        later = torch.ones(size, size - 1, dtype=torch.bool).triu()
        mask = torch.zeros(1, 1, size, slots, dtype=self.q.dtype)
        mask[..., slots - size + 1 :].masked_fill_(later, -math.inf)
        return mask

    def _masked(self, index: int, rows: slice) -> tuple[Tensor, Tensor]:
        """Some rows of one block, over everything before them with a mask."""
        blocks, end = self.blocks, self.offset + rows.stop
        slots, place = torch.arange(end), torch.arange(self.offset + rows.start, end)[:, None]
        starts = self.starts[index, : int(self.counts[index])]
        near = self.offset + index * blocks.block_q - blocks.window
        seen = (slots <= place) & ((slots < blocks.sink) | (slots > near) | self._named(starts, end))
        mask = torch.zeros(1, 1, *seen.shape, dtype=self.q.dtype).masked_fill_(~seen, -math.inf)
        keys, values = (x[None, None, :end].expand(1, len(self.q), -1, -1) for x in (self.k, self.v))
        found, sums = self._sdpa(self.q[None, :, rows], keys, values, mask)
        return found[0], sums[0]

    def _named(self, starts: Tensor, end: int) -> Tensor:
        """Which of ``end`` slots are in blocks with these starts, bool."""
        slots = (starts[:, None] + torch.arange(self.blocks.block_k)).flatten()
        return torch.zeros(end, dtype=torch.bool).index_fill_(0, slots[(slots >= 0) & (slots < end)].long(), True)

    def _newest(self) -> tuple[Tensor, Tensor]:
        """The one row of decoding: it sees all that is gathered, and what lies together stays where it is."""
        blocks, end = self.blocks, len(self.k)
        sink = min(blocks.sink, end)
        near = max(sink, end - blocks.window)
        slots = (self.starts[0, : int(self.counts[0]), None] + torch.arange(blocks.block_k)).flatten()
        slots = slots[(slots >= sink) & (slots < near)]
        parts = [(x[:sink], x[near:], x.index_select(0, slots)) for x in (self.k, self.v)]
        segments = [_segment(keys, values) for keys, values in zip(*parts, strict=True)]
        found, sums = segment_attention(self.q[None], segments, self.scale)
        return found[0], sums[0]

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, False, attn_mask=mask, scale=self.scale
        )
        return found


def _segment(keys: Tensor, values: Tensor) -> Segment:
    """Keys and values ``[slots, D]`` as they are."""
    bounds = torch.tensor([[[0, len(keys)]]], dtype=torch.int32)
    return Segment(keys[None, None], values[None, None], 16, 16, None, None, None, None, bounds, len(keys))
