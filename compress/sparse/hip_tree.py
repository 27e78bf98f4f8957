"""HiP's tree search as first published (arXiv 2406.09827, section 3.2), for reference: slow, and readable.

The visible keys are seen as a row of ``k / block_k`` nodes, each an equal share of them. An iteration splits every node
in two, judges each half by one block of keys that stands for it, and keeps the best as many as before, until a node is
one block. `hip.py`, the default, prunes chunks that don't depend on each other instead.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compress.kernels.block_attention import BlockList

Representative = Literal["first", "center", "last", "random"]


@dataclass(frozen=True)
class TreeSettings:
    """How the tree is searched; the defaults are the published code's.

    Attributes:
        k: tokens of a list.
        block_q: query rows that share a list.
        block_k: keys of a block.
        stride: of a block's rows, every so-many-th is looked at.
        representative: which block of a node stands for it; ``random`` jitters the first in the middle iteration.
        sink: first tokens, always seen.
        window: newest tokens, always seen.
        shared: whether the query heads of a KV head share a list, by the largest score of any of them.
        seed: of ``random``.

    Raises:
        ValueError: a list that doesn't hold a whole number of blocks, two at least.
    """

    k: int = 512
    block_q: int = 32
    block_k: int = 2
    stride: int = 2
    representative: Representative = "center"
    sink: int = 16
    window: int = 128
    shared: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.k % self.block_k or self.k < 2 * self.block_k:
            raise ValueError(f"k={self.k} isn't two or more whole blocks of {self.block_k} keys")

    @property
    def nodes(self) -> int:
        """Nodes that are kept, n."""
        return self.k // self.block_k


def tree_search(q: Tensor, k: Tensor, settings: TreeSettings) -> BlockList:
    """Lists for the last R of T tokens.

    Args:
        q: queries after rotary embedding ``[B, H, R, D]``.
        k: keys after rotary embedding ``[B, Hkv, T, D]``.
        settings: how to search.

    Returns:
        Lists ``[B, Hkv or H, ceil(R / block_q), k / block_k]``; they may name blocks of the sink and the window too.
    """
    (batch, heads, rows, _), kv_heads, length = q.shape, k.shape[1], k.shape[2]
    lists = kv_heads if settings.shared else heads
    blocks = -(-rows // settings.block_q)
    starts = torch.zeros(batch, lists, blocks, settings.nodes, dtype=torch.int32)
    counts = torch.zeros(batch, lists, blocks, dtype=torch.int32)
    generator = torch.Generator().manual_seed(settings.seed)
    grouped = q.float().unflatten(1, (lists, -1))
    for b in range(batch):
        for n in range(lists):
            keys = k[b, n * kv_heads // lists].float()
            for i in range(blocks):
                own = slice(i * settings.block_q, min((i + 1) * settings.block_q, rows))
                places = torch.arange(length - rows + own.start, length - rows + own.stop)
                found = _Tree(grouped[b, n, :, own], keys, places, settings, generator).search()
                starts[b, n, i, : len(found)] = found
                counts[b, n, i] = len(found)
    sizes = (settings.block_q, settings.block_k, settings.sink, settings.window)
    return BlockList(starts.to(q.device), counts.to(q.device), *sizes)


class _Tree:
    """The search of one block of rows.

    Args:
        queries: ``[group, rows, D]``.
        keys: ``[T, D]``.
        places: slots of the rows ``[rows]``.
        settings: how to search.
        generator: for ``random``.
    """

    def __init__(
        self, queries: Tensor, keys: Tensor, places: Tensor, settings: TreeSettings, generator: torch.Generator
    ) -> None:
        self.settings, self.generator, self.keys = settings, generator, keys
        self.queries, self.places = queries[:, :: settings.stride], places[:: settings.stride]
        size = settings.block_k
        self.length = -(-(int(places[-1]) + 1) // size) * size  # L, that any of the rows sees, in whole blocks

    def search(self) -> Tensor:
        """First slots of the blocks, ascending, int32."""
        settings, size = self.settings, self.settings.block_k
        width = min(self.length, settings.k)
        nodes = torch.arange(-(-width // size))
        iterations, done = max(1, math.ceil(math.log2(max(1.0, self.length / settings.k)))), 0
        while width < self.length:
            before, width = -(-width // size), min(2 * width, self.length)
            after = -(-width // size)
            children = _halves(nodes, before, after)
            scores = self._scores(children, after, jitter=done == iterations // 2, iteration=done)
            share = min(settings.nodes / -(-self.length // size), 1.0)
            kept = min(max(settings.nodes // 2, math.floor(share * after)), -(-self.length // size), len(children))
            nodes = children[scores.topk(kept).indices.sort().values]
            done += 1
        return (nodes * size).int()

    def _scores(self, nodes: Tensor, count: int, jitter: bool, iteration: int) -> Tensor:
        """The largest product of a row with a key of the node's representative block that the row sees."""
        size = self.settings.block_k
        starts = self._representatives(nodes, count, jitter, iteration)
        slots = starts[:, None] + torch.arange(size)  # [nodes, block_k]
        products = self.queries @ self.keys[slots.clamp(max=len(self.keys) - 1).flatten()].T
        unseen = slots.flatten() > self.places[:, None]
        return products.masked_fill(unseen, -math.inf).amax((0, 1)).view(-1, size).amax(1)

    def _representatives(self, nodes: Tensor, count: int, jitter: bool, iteration: int) -> Tensor:
        """First slots of the blocks that stand for nodes, each a share ``[i, i + 1) / count`` of the length."""
        size, share = self.settings.block_k, nodes.double() / count
        match self.settings.representative:
            case "center":
                share = (nodes + 0.5) / count
            case "last":
                return ((share + 1 / count) * self.length - 1).long().clamp(min=0) // size * size
            case "random" if jitter:
                drawn = torch.rand(len(nodes), generator=self.generator, dtype=torch.float64)
                share = share + drawn * 0.5 / (iteration + 1) / (count + 1)
        return (share.double() * self.length).long() // size * size


def _halves(nodes: Tensor, before: int, after: int) -> Tensor:
    """Nodes of ``before`` in a row as nodes of ``after``: two each, or one or two at a ragged end."""
    first, end = nodes * after // before, (nodes + 1) * after // before
    places = first[:, None] + torch.arange(int((end - first).max()))
    return places[places < end[:, None]]
