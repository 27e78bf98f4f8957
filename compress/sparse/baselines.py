"""What a search is compared with: lists made without one, or by cheaper looks at the keys.

All rank the same blocks of keys, of the same size, for the same blocks of query rows.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.kernels.attention_mass import attention_mass
from compress.kernels.block_attention import BlockList


@dataclass(frozen=True)
class Shape:
    """What is ranked, and how much of it is listed.

    Attributes:
        k: tokens of a list.
        block_q: query rows that share a list.
        block_k: keys of a block.
        sink: first tokens, always seen.
        window: newest tokens, always seen.
    """

    k: int = 1024
    block_q: int = 64
    block_k: int = 16
    sink: int = 128
    window: int = 1024


def static(q: Tensor, k: Tensor, shape: Shape) -> BlockList:
    """Sink and window alone (StreamingLLM, arXiv 2309.17453)."""
    return _listed(_nothing(q, k, shape).fill_(-math.inf), q, k, shape)


def drawn(q: Tensor, k: Tensor, shape: Shape, seed: int = 0) -> BlockList:
    """Blocks by lot."""
    scores = _nothing(q, k, shape)
    return _listed(torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed)).to(q.device), q, k, shape)


@dataclass(frozen=True)
class Ranking:
    """Blocks ranked by what is kept of each.

    Attributes:
        summary: of blocks of keys ``[B, Hkv, blocks, block_k, D]``, tensors ``[B, Hkv, blocks, D]``.
        score: of mean queries ``[B, Hkv, group, rows, D]`` and such tensors, ``[B, Hkv, group, rows, blocks]``.
    """

    summary: Callable[[Tensor], tuple[Tensor, ...]]
    score: Callable[..., Tensor]

    def __call__(self, q: Tensor, k: Tensor, shape: Shape) -> BlockList:
        """Lists for the last R of T tokens, by the largest score of a group's heads."""
        scores = self.score(mean_queries(q, k.shape[1], shape), *self.summary(key_blocks(k, shape)))
        return _listed(scores.amax(2), q, k, shape)


def _product(queries: Tensor, keys: Tensor) -> Tensor:
    return (queries.flatten(2, 3) @ keys.transpose(-1, -2)).unflatten(2, queries.shape[2:4])


def _bound(queries: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return _product(queries.clamp(min=0), high) + _product(queries.clamp(max=0), low)


block_mean = Ranking(lambda blocks: (blocks.mean(3),), _product)
"""By the product of the rows' mean query with a block's mean key."""

quest = Ranking(lambda blocks: (blocks.amin(3), blocks.amax(3)), _bound)
"""By an upper bound of a block's products, ``sum_d max(q_d min_d, q_d max_d)`` (Quest, arXiv 2406.10774, eq. 2)."""


def oracle(q: Tensor, k: Tensor, shape: Shape) -> BlockList:
    """By the attention that a block receives from the rows, all heads of a group together: what no search can beat."""
    group, count = q.shape[1] // k.shape[1], k.shape[2]
    found = []
    for start in range(0, q.shape[2], shape.block_q):
        rows = torch.arange(start, min(start + shape.block_q, q.shape[2]), device=q.device)
        mass = attention_mass(q[:, :, rows], k, rows + count - q.shape[2], q.shape[3] ** -0.5)
        found.append(key_blocks(mass.unflatten(1, (-1, group)).sum(2)[..., None], shape).sum((3, 4)))
    return _listed(torch.stack(found, 2), q, k, shape)


METHODS: dict[str, Callable[[Tensor, Tensor, Shape], BlockList]] = {
    "static": static, "random": drawn, "block_mean": block_mean, "quest": quest, "oracle": oracle,
}  # fmt: skip


def mean_queries(q: Tensor, kv_heads: int, shape: Shape) -> Tensor:
    """Of blocks of rows, [B, Hkv, group, blocks, D] float32."""
    grouped = q.float().unflatten(1, (kv_heads, -1))
    return torch.stack([part.mean(3) for part in grouped.split(shape.block_q, 3)], 3)


def key_blocks(k: Tensor, shape: Shape) -> Tensor:
    """Keys [B, Hkv, T, D] by blocks that begin behind the sink, [B, Hkv, blocks, block_k, D]; the end is repeated."""
    k = k[:, :, shape.sink :].float()
    missing = -k.shape[2] % shape.block_k
    if missing:
        k = torch.cat([k, k[:, :, -1:].expand(-1, -1, missing, -1)], 2)
    return k.unflatten(2, (-1, shape.block_k))


def _nothing(q: Tensor, k: Tensor, shape: Shape) -> Tensor:
    """Scores of every block of keys for every block of rows, [B, Hkv, blocks of rows, blocks of keys]."""
    rows, keys = -(-q.shape[2] // shape.block_q), -(-max(0, k.shape[2] - shape.sink) // shape.block_k)
    return torch.zeros(q.shape[0], k.shape[1], rows, keys, device=q.device)


def _listed(scores: Tensor, q: Tensor, k: Tensor, shape: Shape) -> BlockList:
    """The best blocks between the sink and the window of a block's first row, which reaches back to a block's end."""
    place = torch.arange(scores.shape[2], device=q.device) * shape.block_q + k.shape[2] - q.shape[2]
    far = k.shape[2] - q.shape[2] - shape.window + 1 - shape.sink
    window = shape.window + far % shape.block_k
    starts, counts = best_blocks(scores, (place - window + 1)[None, None], shape)
    return BlockList(starts, counts, shape.block_q, shape.block_k, shape.sink, window)


def best_blocks(scores: Tensor, ends: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """Blocks with the highest scores [B, Hkv, rows, blocks] that end at ``ends`` [B, 1, rows] or before.

    Returns:
        Their starts, int32 [B, Hkv, rows, <= k / block_k] ascending, and how many there are.
    """
    starts = shape.sink + torch.arange(scores.shape[3], device=scores.device) * shape.block_k
    scores = scores.masked_fill(starts + shape.block_k > ends[..., None], -math.inf)
    best = scores.topk(min(shape.k // shape.block_k, scores.shape[3]), dim=3)
    named = torch.where(best.values == -math.inf, 1 << 30, starts[best.indices]).sort(dim=3).values
    return named.int(), (named < 1 << 30).sum(3).int()
