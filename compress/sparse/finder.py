"""A policy at work: the lists of a prompt, and the list of one new token after the other."""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from compress.kernels.block_attention import BlockList
from compress.plan import Search, TopK
from compress.sparse import hip
from compress.sparse.baselines import Ranking, Shape, best_blocks, block_mean, mean_queries, quest
from compress.sparse.found import Found, Keys, window_begin
from compress.sparse.sea import Estimator
from compress.sparse.sea_finder import SeaFinder, sea_budget


class Finder(Protocol):
    """Finds lists; holds no tokens."""

    @property
    def gate(self) -> int:
        """Tokens up to which nothing is searched for."""

    @property
    def earlier(self) -> int:
        """Tokens before the new ones whose queries it has to see."""

    def prompt(self, q: Tensor, k: Tensor, v: Tensor, rows: int) -> BlockList | None:
        """Lists for the last R of T tokens of every sequence.

        Args:
            q: queries ``[B, H, n + R, D]``, of at most :attr:`earlier` tokens before them too.
            k: keys ``[B, Hkv, T, D]``.
            v: values ``[B, Hkv, T, D]``.
            rows: R.

        Returns:
            None where too few queries are known: everything is attended.
        """

    def token(self, q: Tensor, k: Tensor | Keys, v: Tensor | Keys, ends: Tensor, former: Found | None) -> Found | None:
        """The list for one new token of every sequence, after the former token's.

        Args:
            q: queries ``[B, H, n + 1, D]``, of at most :attr:`earlier` tokens before it too; of a sequence with fewer
                tokens the last are its own.
            k: keys ``[B, Hkv, T, D]``, the new token's among them; every sequence begins at slot 0.
            v: values ``[B, Hkv, T, D]``; of keys that don't lie in one tensor, these again.
            ends: ``[B]``, one past each sequence's last slot.
            former: what the former token attended; None for the first one, or where tokens were exchanged since.

        Returns:
            As :meth:`prompt`.
        """


def finder(topk: TopK, search: Search, gate: int, estimator: Estimator | None = None) -> Finder:
    """The policy's finder.

    Args:
        topk: policy and tokens.
        search: how.
        gate: tokens up to which nothing is searched for.
        estimator: of the layer, for the policy ``sea``; None for a layer that takes another one's lists.

    Raises:
        ValueError: sizes that don't fit each other, see :class:`compress.sparse.hip.HipSettings`.
    """
    if topk.policy == "sea":
        return SeaFinder(gate, estimator, sea_budget(topk, search), search.refresh[-1])
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
    earlier = 0

    def prompt(self, q: Tensor, k: Tensor, v: Tensor, rows: int) -> BlockList:
        return hip.search(q, k, self.settings)

    def token(self, q: Tensor, k: Tensor | Keys, v: Tensor | Keys, ends: Tensor, former: Found | None) -> Found:
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
    earlier = 0

    def prompt(self, q: Tensor, k: Tensor, v: Tensor, rows: int) -> BlockList:
        return self.ranking(q, k, self.shape)

    def token(self, q: Tensor, k: Tensor | Keys, v: Tensor | Keys, ends: Tensor, former: Found | None) -> Found:
        before: _Ranks | None = None if former is None else former.state
        if former is not None and before is not None and (before.step + 1) % self.refresh:
            before.step += 1
            return replace(former, fresh=False)
        shape = self.shape
        near = window_begin(ends, shape.sink, shape.window, shape.block_k)
        full, known = int(near.min()), () if before is None else before.summaries
        summaries = self._summaries(k, known, max(shape.sink, int(near.max())))
        queries = mean_queries(q, k.shape[1], shape)
        scores = self.ranking.score(queries, *(own.float() for own in summaries)).amax(2)
        starts, counts = best_blocks(scores, near[:, None, None], shape)
        blocks = BlockList(starts, counts, shape.block_q, shape.block_k, shape.sink, shape.window)
        kept = max(0, full - shape.sink) // shape.block_k
        return Found(blocks, near.clamp(min=0), True, _Ranks(0, tuple(own[:, :, :kept] for own in summaries)))

    def _summaries(self, k: Tensor | Keys, known: tuple[Tensor, ...], end: int) -> tuple[Tensor, ...]:
        """Of all blocks before a place; those that are known aren't looked at again. Beside packed keys in 16 bits."""
        shape, packed = self.shape, not isinstance(k, Tensor)
        first = shape.sink + (known[0].shape[2] * shape.block_k if known else 0)
        keys = k[:, :, first:end].float() if isinstance(k, Tensor) else k.span(first, end)
        new = self.ranking.summary(keys.unflatten(2, (-1, shape.block_k)))
        new = tuple(own.half() for own in new) if packed else new
        return tuple(torch.cat(pair, 2) for pair in zip(known, new, strict=True)) if known else new
