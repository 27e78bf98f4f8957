"""A policy at work: the lists of a prompt, and the list of one new token after the other."""

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from compress.kernels.block_attention import BlockList
from compress.plan import Search, TopK
from compress.sparse import hip
from compress.sparse.baselines import Ranking, Shape, best_blocks, block_mean, key_blocks, mean_queries, quest


@dataclass
class Found:
    """What one new token attends besides the sink.

    Attributes:
        blocks: the list, ``[B, Hkv, 1, K]``.
        near: first slot of every sequence's window ``[B]``, which stays where it was until the next search.
        fresh: whether the list is another than the former token's.
        state: for the next token's search.
    """

    blocks: BlockList
    near: Tensor
    fresh: bool
    state: Any


class Finder(Protocol):
    """Finds lists; holds no tokens."""

    @property
    def gate(self) -> int:
        """Tokens up to which nothing is searched for."""

    def prompt(self, q: Tensor, k: Tensor) -> BlockList:
        """Lists for the last R of T tokens, ``q`` ``[B, H, R, D]`` and ``k`` ``[B, Hkv, T, D]``."""

    def token(self, q: Tensor, k: Tensor, ends: Tensor, former: Found | None) -> Found:
        """The list for one new token of every sequence, after the former token's.

        Args:
            q: queries ``[B, H, 1, D]``.
            k: keys ``[B, Hkv, T, D]``, the new token's among them; every sequence begins at slot 0.
            ends: ``[B]``, one past each sequence's last slot.
            former: what the former token attended; None for the first one, or where tokens were exchanged since.
        """


def finder(topk: TopK, search: Search, gate: int) -> Finder:
    """The policy's finder.

    Args:
        topk: policy and tokens.
        search: how.
        gate: tokens up to which nothing is searched for.

    Raises:
        ValueError: sizes that don't fit each other, see :class:`compress.sparse.hip.HipSettings`.
    """
    if topk.policy == "hip":
        return _Hip(gate, hip_settings(topk, search))
    ranking = {"quest": quest, "block_mean": block_mean}[topk.policy]
    shape = Shape(topk.k, search.block_q, search.block_k, search.sink, search.window)
    return _Ranked(gate, ranking, shape, search.refresh[-1])


def hip_settings(topk: TopK, search: Search) -> hip.HipSettings:
    """HiP's settings as a plan has them."""
    first, second, last = hip.STAGES
    (wide, narrow), (slow, middle, fast) = search.keep, search.refresh
    stages = (
        hip.Stage(first.chunk, search.pool, 0, first.share, slow),
        hip.Stage(second.chunk, search.pool, wide, second.share, middle),
        hip.Stage(search.block_k, search.pool, narrow, last.share, fast),
    )
    return hip.HipSettings(topk.k, search.block_q, search.sink, search.window, stages)


@dataclass(frozen=True)
class _Hip:
    gate: int
    settings: hip.HipSettings

    def prompt(self, q: Tensor, k: Tensor) -> BlockList:
        return hip.search(q, k, self.settings)

    def token(self, q: Tensor, k: Tensor, ends: Tensor, former: Found | None) -> Found:
        before: hip.HipState | None = None if former is None else former.state
        if former is not None and before is not None and not hip.due(before.step + 1, self.settings):
            before.step += 1
            return replace(former, fresh=False)
        state = hip.refreshed(q, k, self.settings, before, ends)
        return Found(state.blocks, state.near, True, state)


@dataclass
class _Ranks:
    """What a ranking keeps between tokens: steps, and summaries of blocks that are full, [B, Hkv, blocks, D]."""

    step: int
    summaries: tuple[Tensor, ...]


@dataclass(frozen=True)
class _Ranked:
    """Blocks ranked by a score of each."""

    gate: int
    ranking: Ranking
    shape: Shape
    refresh: int

    def prompt(self, q: Tensor, k: Tensor) -> BlockList:
        return self.ranking(q, k, self.shape)

    def token(self, q: Tensor, k: Tensor, ends: Tensor, former: Found | None) -> Found:
        before: _Ranks | None = None if former is None else former.state
        if former is not None and before is not None and (before.step + 1) % self.refresh:
            before.step += 1
            return replace(former, fresh=False)
        shape = self.shape
        near = ends - shape.window
        near = near - (near - shape.sink).clamp(min=0) % shape.block_k
        full, known = int(ends.min()), None if before is None else before.summaries
        summaries = self._summaries(k[:, :, : int(ends.max())], known)
        scores = self.ranking.score(mean_queries(q, k.shape[1], shape), *summaries).amax(2)
        starts, counts = best_blocks(scores, near[:, None, None], shape)
        blocks = BlockList(starts, counts, shape.block_q, shape.block_k, shape.sink, shape.window)
        kept = max(0, full - shape.sink) // shape.block_k
        return Found(blocks, near.clamp(min=0), True, _Ranks(0, tuple(own[:, :, :kept] for own in summaries)))

    def _summaries(self, k: Tensor, known: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        """Of all blocks; those that were full before aren't looked at again."""
        if known is None:
            return self.ranking.summary(key_blocks(k, self.shape))
        rest = replace(self.shape, sink=self.shape.sink + known[0].shape[2] * self.shape.block_k)
        new = self.ranking.summary(key_blocks(k, rest))
        return tuple(torch.cat(pair, 2) for pair in zip(known, new, strict=True))
