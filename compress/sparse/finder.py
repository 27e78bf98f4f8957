"""A policy at work: the lists of a prompt, and the list of one new token after the other."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from compress.kernels.block_attention import BlockList
from compress.plan import Search, TopK
from compress.sparse import hip
from compress.sparse.baselines import Shape, block_mean, quest


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

    def token(self, q: Tensor, k: Tensor, bounds: Tensor, former: Found | None) -> Found:
        """The list for one new token of every sequence, after the former token's.

        Args:
            q: queries ``[B, H, 1, D]``.
            k: keys ``[B, Hkv, T, D]``, the new token's among them.
            bounds: ``[B, 2]``, first slot and one past the last of every sequence.
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

    def token(self, q: Tensor, k: Tensor, bounds: Tensor, former: Found | None) -> Found:
        before: hip.HipState | None = None if former is None else former.state
        state = hip.refreshed(q, k, self.settings, before, bounds)
        fresh = former is None or state.blocks.starts is not former.blocks.starts
        return Found(state.blocks, state.near, fresh, state)


@dataclass(frozen=True)
class _Ranked:
    """Blocks ranked by a score of each."""

    gate: int
    ranking: Callable[[Tensor, Tensor, Shape], BlockList]
    shape: Shape
    refresh: int

    def prompt(self, q: Tensor, k: Tensor) -> BlockList:
        return self.ranking(q, k, self.shape)

    def token(self, q: Tensor, k: Tensor, bounds: Tensor, former: Found | None) -> Found:
        step = 0 if former is None else former.state + 1
        if former is not None and step % self.refresh:
            return Found(former.blocks, former.near, False, step)
        lists = [
            self.ranking(q[b : b + 1], k[b : b + 1, :, first:end], self.shape)
            for b, (first, end) in enumerate(bounds.tolist())
        ]
        starts = (
            torch.zeros(*q.shape[:1], *lists[0].counts.shape[1:], max(own.most for own in lists)).int().to(q.device)
        )
        for b, own in enumerate(lists):
            starts[b, ..., : own.most] = own.starts[0] + int(bounds[b, 0])
        near = torch.stack([end - own.window for (_, end), own in zip(bounds, lists, strict=True)])
        counts = torch.cat([own.counts for own in lists])
        blocks = BlockList(starts, counts, self.shape.block_q, self.shape.block_k, self.shape.sink, self.shape.window)
        return Found(blocks, torch.maximum(near, bounds[:, 0]), True, 0)
