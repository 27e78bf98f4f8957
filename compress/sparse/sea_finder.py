"""SEA at work: lists of a prompt and of one new token after the other, from what the estimator guesses.

On the estimator's convolutions the last `LOOKED_AT` queries decide, on its performer all keys and values. So nothing is
computed below the gate; the part that asks keeps these queries, and the estimator's state is made of them and of the
cache when it is needed. Where too few are known, as behind a crop, everything is attended until they are.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.kernels.block_attention import BlockList
from compress.plan import Search, TopK
from compress.sparse.found import Found, Keys, window_begin
from compress.sparse.sea import LOOKED_AT, Estimator, State
from compress.sparse.sea_mask import Budget, chunk, prompt, token_list


@dataclass
class SeaState:
    """What a list leaves to the next.

    Attributes:
        step: tokens since.
        rows: the estimator's state behind the list's token.
    """

    step: int
    rows: State


@dataclass(frozen=True)
class SeaFinder:
    """See :class:`compress.sparse.finder.Finder`.

    Attributes:
        gate: tokens up to which nothing is searched for.
        estimator: of the heads that search; None for a layer that takes another one's lists.
        budget: of the lists.
        refresh: tokens that a list is for.
    """

    gate: int
    estimator: Estimator | None
    budget: Budget
    refresh: int

    @property
    def earlier(self) -> int:
        """See :class:`compress.sparse.finder.Finder`."""
        return max(LOOKED_AT, self.refresh)

    def prompt(self, q: Tensor, k: Tensor, v: Tensor, rows: int) -> BlockList | None:
        """See :class:`compress.sparse.finder.Finder`."""
        estimator, before, known = self.estimator, k.shape[2] - rows, q.shape[2] - rows
        if estimator is None or k.shape[2] > estimator.shape.length or known < min(before, LOOKED_AT):
            return None
        if not before:
            return prompt(estimator, q, k, v, self.budget).blocks
        state = estimator.resumed(q[:, :, :known], k[:, :, :before], v[:, :, :before])
        return chunk(estimator, q[:, :, known:], k[:, :, before:], v[:, :, before:], self.budget, state).blocks

    def token(self, q: Tensor, k: Tensor | Keys, v: Tensor | Keys, ends: Tensor, former: Found | None) -> Found | None:
        """See :class:`compress.sparse.finder.Finder`; keys and values are tensors."""
        assert isinstance(k, Tensor)  # a plan that packs them is refused
        assert isinstance(v, Tensor)
        before: SeaState | None = None if former is None else former.state
        if former is not None and before is not None and before.step + 1 < self.refresh:
            before.step += 1
            return replace(former, fresh=False)
        estimator, budget = self.estimator, self.budget
        if estimator is None or int(ends.max()) > estimator.shape.length:
            return None
        known = (q, k, v, ends)
        state = _resumed(estimator, *known) if before is None else _continued(estimator, before, *known)
        if state is None:
            return None
        rows = estimator(q[:, :, -1:], _last(k, ends, 1), _last(v, ends, 1), state)
        near = window_begin(ends, budget.sink, budget.window, budget.block_k)
        blocks = token_list(rows.logits.softmax(-1), rows.state.tokens, near, budget, estimator.shape.kv_heads)
        return Found(blocks, near.clamp(min=0), True, SeaState(0, rows.state))


def sea_budget(topk: TopK, search: Search) -> Budget:
    """The budget as a plan has it."""
    return Budget(keys=topk.k, block_q=search.block_q, block_k=search.block_k, sink=search.sink, window=search.window)


def _resumed(estimator: Estimator, q: Tensor, k: Tensor, v: Tensor, ends: Tensor) -> State | None:
    """The state before the newest token of every sequence, from the cache and what queries are known."""
    states = []
    for b, end in enumerate(ends.tolist()):
        known = min(q.shape[2], end) - 1
        if known < min(end - 1, LOOKED_AT):
            return None
        one, queries = slice(b, b + 1), q[b : b + 1, :, q.shape[2] - 1 - known : q.shape[2] - 1]
        if known:
            states.append(estimator.resumed(queries, k[one, :, : end - 1], v[one, :, : end - 1]))
        else:
            states.append(State.empty(estimator.shape, 1, q.device))
    return State.together(states)


def _continued(estimator: Estimator, before: SeaState, q: Tensor, k: Tensor, v: Tensor, ends: Tensor) -> State:
    """The same, from the state behind an earlier token."""
    new = before.step
    if not new:
        return before.rows
    keys, values = (_last(x, ends - 1, new) for x in (k, v))
    after: State = estimator(q[:, :, -1 - new : -1], keys, values, before.rows).state
    return after


def _last(x: Tensor, ends: Tensor, count: int) -> Tensor:
    """The last slots of every sequence, ``[B, Hkv, T, D]`` to ``[B, Hkv, count, D]``."""
    spans = (own[:, end - count : end] for own, end in zip(x, ends.tolist(), strict=True))
    return torch.stack(list(spans))
