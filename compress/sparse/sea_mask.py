"""From SEA's compressed attention to lists of key blocks (arXiv 2310.01777, section 3.3): grouped top-k, then rounding.

For every block of query rows the estimates of its rows are brought onto the grid of its last row, and their maxima are
taken. All heads then compete for one budget of pixels, which stands for so many keys a head; the pixels that win are
rounded out to key blocks. What the sink and the window show anyway neither competes nor is listed.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.kernels.block_attention import BlockList
from compress.sparse.sea import Estimator, Rows, State
from compress.sparse.sea_pixels import first_key, pixel_of

PORTION = 1 << 22
"""Estimates and marks of blocks that are held at once."""


@dataclass(frozen=True)
class Budget:
    """How long the lists are.

    Attributes:
        keys: a head's, on average over the heads of a layer.
        oversample: factor of it.
        block_q: query rows that share a list.
        block_k: keys of a block.
        sink: first keys that every row sees.
        window: newest keys that every row sees, at least 1.
        shared: lists per KV head, for its whole group of query heads; else per query head.
        apart: in prompts, list only blocks that end before the window of their rows, which kernels gather fastest; the
            window begins up to ``block_k - 1`` keys earlier for it, so that none is lost between.
    """

    keys: int = 512
    oversample: float = 1.0
    block_q: int = 64
    block_k: int = 16
    sink: int = 16
    window: int = 256
    shared: bool = True
    apart: bool = True

    def __post_init__(self) -> None:
        for name, least in (("keys", 1), ("block_q", 1), ("block_k", 1), ("sink", 0), ("window", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.oversample > 0:
            raise ValueError(f"oversample must be above 0, got {self.oversample}")

    def pixels(self, heads: int, width: int, visible: Tensor) -> Tensor:
        """Pixels that all heads of a layer have together for a row that sees so many keys: section 3.3's k of top-k."""
        share = heads * self.keys * self.oversample * width / visible.double()
        return share.round().long().clamp(1, heads * width)


@dataclass(frozen=True)
class Found:
    """Lists for rows, and what the estimator keeps for the next.

    Attributes:
        blocks: the lists.
        state: of the estimator.
        scales: as of `Rows`, ``[B, H, R, 2]``; zeros where a row is padding. None without a scaler.
        mean: likewise ``[B, Hkv, R, D]``.
    """

    blocks: BlockList
    state: State
    scales: Tensor | None
    mean: Tensor | None

    def mix(self, out: Tensor) -> Tensor:
        """See `Rows.mix`."""
        return Rows(out, self.scales, self.mean, self.state).mix(out)


@torch.no_grad()
def prompt(
    estimator: Estimator, q: Tensor, k: Tensor, v: Tensor, budget: Budget, bounds: Tensor | None = None
) -> Found:
    """Lists for all rows of sequences, in memory that grows with their length and with what is listed.

    Args:
        estimator: of the layer.
        q: queries after rotary embedding ``[B, H, R, D]``: the last R tokens of every sequence, which has no more.
        k: keys ``[B, Hkv, T, D]``.
        v: values ``[B, Hkv, T, D]``.
        budget: see there.
        bounds: first slot of every sequence and one past its last ``[B, 2]``; None: all slots of all.

    Raises:
        ValueError: a sequence of more tokens than rows (the estimator needs them all, see :func:`chunk`), or of none.
    """
    rows = q.shape[2]
    spans = [[0, k.shape[2]]] * len(q) if bounds is None else bounds.tolist()
    found = []
    for b, (first, end) in enumerate(spans):
        count, one = end - first, slice(b, b + 1)
        if not 0 < count <= rows:
            raise ValueError(f"a prompt's lists need the queries of all its tokens: {rows} rows, {count} tokens")
        tokens = q[one, :, rows - count :], k[one, :, first:end], v[one, :, first:end]
        found.append(_sequence(estimator, tokens, budget, rows, first))
    return _batch(found)


@torch.no_grad()
def chunk(estimator: Estimator, q: Tensor, k: Tensor, v: Tensor, budget: Budget, state: State) -> Found:
    """Lists for further rows of sequences that begin at slot 0, in blocks as :func:`prompt` has them.

    Args:
        estimator: of the layer.
        q: queries of the new tokens ``[B, H, R, D]``.
        k: their keys ``[B, Hkv, R, D]``.
        v: their values ``[B, Hkv, R, D]``.
        budget: see there.
        state: after the tokens before them.
    """
    found = []
    for b in range(len(q)):
        own = torch.tensor([b], device=q.device)
        found.append(_sequence(estimator, (q[own], k[own], v[own]), budget, q.shape[2], 0, state.select(own)))
    return _batch(found)


def _batch(found: list[Found]) -> Found:
    """Of sequences that were treated one after another."""
    scales, mean = (_joined([getattr(part, name) for part in found], 0) for name in ("scales", "mean"))
    blocks = _together([part.blocks for part in found], 0)
    return Found(blocks, State.together([part.state for part in found]), scales, mean)


def _sequence(
    estimator: Estimator,
    tokens: tuple[Tensor, Tensor, Tensor],
    budget: Budget,
    rows: int,
    first: int,
    state: State | None = None,
) -> Found:
    """One sequence, queries, keys and values ``[1, heads, n, D]``, the last n of so many rows; a portion at a time."""
    shape, size, device = estimator.shape, budget.block_q, tokens[0].device
    padding = rows - tokens[0].shape[2]
    portion = max(size, PORTION // (shape.heads * shape.width) // size * size)
    slot, state = torch.tensor([first], device=device), State.empty(shape, 1, device) if state is None else state
    lists: list[BlockList] = [_none(shape.heads, padding // size, budget, shape.kv_heads, device)]
    scales, mean = [], []
    for begin in range(padding // size * size, rows, portion):
        part = slice(max(0, begin - padding), min(begin + portion, rows) - padding)
        found: Rows = estimator(*(x[:, :, part] for x in tokens), state)
        state = found.state
        # padding within a block of rows stands before the sequence: a row that sees nothing
        estimate = F.pad(found.logits.softmax(-1), (0, 0, max(0, padding - begin), 0))
        lists.append(block_lists(estimate, state.tokens, budget, slot, shape.kv_heads))
        scales.append(found.scales)
        mean.append(found.mean)
    mixed = (_joined(parts, 2) for parts in (scales, mean))
    return Found(_together(lists, 2), state, *(x if x is None else F.pad(x, (0, 0, padding, 0)) for x in mixed))


def block_lists(estimate: Tensor, visible: Tensor, budget: Budget, first: Tensor, kv_heads: int) -> BlockList:
    """Lists for the last R rows of every sequence.

    Args:
        estimate: compressed attention ``[B, H, R, W]``.
        visible: tokens of every sequence ``[B]``, which its last row sees; R may be more.
        budget: see there.
        first: slot of every sequence's first token ``[B]``.
        kv_heads: Hkv.
    """
    rows, size = estimate.shape[2], budget.block_q
    begin = torch.arange(0, rows, size, device=visible.device)
    before = visible[:, None] - rows
    seen = before + (begin + size).clamp(max=rows)
    limit, slack = seen - budget.window, 0
    if budget.apart and rows > 1:
        near = before + begin + 1 - budget.window - budget.sink  # of the block's first row
        whole = near.div(budget.block_k, rounding_mode="floor") * budget.block_k
        limit, slack = whole + budget.sink, int((near - whole).max())
    pooled = pool(estimate, visible, budget, kv_heads)
    keys = max(0, -(-(int(limit.max()) - budget.sink) // budget.block_k))
    some = max(1, PORTION // max(1, pooled.shape[0] * pooled.shape[1] * max(keys, pooled.shape[3])))
    lists = _together(
        [
            _ascending(select(scores, tokens, end, budget, keys), first, budget)
            for scores, tokens, end in zip(
                pooled.split(some, 2), seen.split(some, 1), limit.split(some, 1), strict=True
            )
        ],
        2,
    )
    return replace(lists, window=budget.window + slack)


def pool(estimate: Tensor, visible: Tensor, budget: Budget, kv_heads: int) -> Tensor:
    """Maxima over the rows of every block, and over a KV head's query heads where they share a list.

    Args:
        estimate: compressed attention ``[B, H, R, W]``.
        visible: tokens of every sequence ``[B]``; its rows are the last R of them.
        budget: see there.
        kv_heads: Hkv.

    Returns:
        ``[B, N, ceil(R / block_q), W]``, each block on the grid of its last row.
    """
    if budget.shared:
        estimate = estimate.unflatten(1, (kv_heads, -1)).amax(2)
    rows, width = estimate.shape[2:]
    place = torch.arange(rows, device=estimate.device)
    last = (place // budget.block_q * budget.block_q + budget.block_q - 1).clamp(max=rows - 1)
    own, end = (visible[:, None, None] - rows + 1 + x[:, None] for x in (place, last))  # keys that the rows see
    pixel, grid = torch.arange(width, device=estimate.device), end.clamp(min=1)
    middle = (first_key(pixel, grid, width) + first_key(pixel + 1, grid, width) - 1).clamp(min=0) // 2
    index = pixel_of(middle.minimum(own - 1).clamp(min=0), own.clamp(min=1), width)
    moved = estimate.gather(3, index[:, None].expand_as(estimate)).masked_fill((middle >= own)[:, None], 0)
    return F.pad(moved, (0, 0, 0, -rows % budget.block_q)).unflatten(2, (-1, budget.block_q)).amax(3)


def select(scores: Tensor, visible: Tensor, limit: Tensor, budget: Budget, keys: int) -> Tensor:
    """Grouped top-k over (head, pixel), and the key blocks that the chosen pixels touch.

    Args:
        scores: ``[B, N, blocks, W]``, one row for every block of rows.
        visible: keys that the last row of every block sees ``[B, blocks]``, which the pixels stretch over.
        limit: keys from which on nothing is listed ``[B, blocks]``.
        budget: see there.
        keys: key blocks, the first of which begins behind the sink.

    Returns:
        Whether a key block is listed, ``[B, N, blocks, keys]`` bool.
    """
    heads, width = scores.shape[1], scores.shape[3]
    seen, limit = visible.clamp(min=1)[..., None], limit[..., None]
    edges = first_key(torch.arange(width + 1, device=scores.device), seen, width)
    competing = edges[..., :-1].clamp(min=budget.sink) < edges[..., 1:].minimum(limit)
    fitting = competing[:, None].expand_as(scores)
    flat = scores.masked_fill(~fitting, -1).transpose(1, 2).flatten(2)
    order = flat.sort(dim=-1, descending=True, stable=True).indices
    taken = torch.arange(heads * width, device=scores.device) < budget.pixels(heads, width, seen)
    chosen = torch.zeros_like(flat, dtype=torch.bool).scatter(-1, order, taken)
    chosen = chosen.unflatten(2, (heads, width)).transpose(1, 2) & fitting
    start = budget.sink + torch.arange(keys, device=scores.device) * budget.block_k
    end = (start + budget.block_k).minimum(limit)
    low, high = (pixel_of(x.minimum(seen - 1).clamp(min=0), seen, width)[:, None] for x in (start, end - 1))
    counted = F.pad(chosen.cumsum(-1), (1, 0))
    many = (-1, heads, -1, -1)
    touched = counted.gather(-1, (high + 1).expand(*many)) > counted.gather(-1, low.expand(*many))
    return touched & (start < end)[:, None]


def token_list(estimate: Tensor, visible: Tensor, near: Tensor, budget: Budget, kv_heads: int) -> BlockList:
    """The list of one new token of every sequence, which begins at slot 0.

    Args:
        estimate: compressed attention ``[B, H, 1, W]``.
        visible: tokens of every sequence ``[B]``.
        near: the first that the window shows ``[B]``, a whole number of blocks behind the sink.
        budget: see there.
        kv_heads: Hkv.
    """
    scores = pool(estimate, visible, budget, kv_heads)
    keys = max(0, (int(near.max()) - budget.sink) // budget.block_k)
    listed = select(scores, visible[:, None], near[:, None], budget, keys)
    return _ascending(listed, torch.zeros_like(visible), budget)


def _ascending(listed: Tensor, first: Tensor, budget: Budget) -> BlockList:
    """The lists of marks ``[B, N, blocks, keys]``."""
    counts = listed.sum(-1)
    most = int(counts.max()) if counts.numel() else 0
    starts = torch.zeros(*counts.shape, most, dtype=torch.int32, device=listed.device)
    b, n, block, key = listed.nonzero(as_tuple=True)
    rank = (listed.cumsum(-1) - 1)[b, n, block, key]
    starts[b, n, block, rank] = (budget.sink + key * budget.block_k + first[b]).to(torch.int32)
    return BlockList(starts, counts.to(torch.int32), budget.block_q, budget.block_k, budget.sink, budget.window)


def _none(heads: int, blocks: int, budget: Budget, kv_heads: int, device: torch.device) -> BlockList:
    """Empty lists of one sequence."""
    counts = torch.zeros(1, kv_heads if budget.shared else heads, blocks, dtype=torch.int32, device=device)
    return BlockList(counts[..., None][..., :0], counts, budget.block_q, budget.block_k, budget.sink, budget.window)


def _together(lists: list[BlockList], dim: int) -> BlockList:
    """Lists of several sequences (0) or blocks of rows (2)."""
    most = max(part.most for part in lists)
    starts = torch.cat([F.pad(part.starts, (0, most - part.most)) for part in lists], dim)
    window = max(part.window for part in lists)
    return replace(lists[0], starts=starts, counts=torch.cat([part.counts for part in lists], dim), window=window)


def _joined(parts: list[Tensor | None], dim: int) -> Tensor | None:
    """What an estimator with a scaler gave in parts."""
    known = [part for part in parts if part is not None]
    return torch.cat(known, dim) if known else None
