"""Column sums on a CPU: blocks of queries, each seeing only the keys that it may; BLAS does the work."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from compress.kernels.attention_mass.reference import visible_keys
from torch import Tensor

QUERY_BLOCK = 128  # query rows of one KV head whose probabilities exist at once


@dataclass(frozen=True)
class Block:
    """Query rows that are treated at once, and the keys that any of them sees.

    Attributes:
        rows: which rows of q.
        keys: the slots.
        penalty: minus infinity where a row must not see a key ``[rows, n]``, for the last n of the keys; before them
            nothing is hidden.
        unseeing: the rows that see no key at all ``[rows]`` bool; None where there is none.
    """

    rows: slice | Tensor
    keys: slice
    penalty: Tensor
    unseeing: Tensor | None


def attention_mass(
    q: Tensor,
    k: Tensor,
    rows: Tensor | None,
    scaling: float,
    window: int | None = None,
    sum_heads: bool = False,
) -> Tensor:
    """See :func:`compress.kernels.attention_mass.attention_mass`; memory O(group * QUERY_BLOCK * T)."""
    batch, heads, count, width = q.shape
    kv_heads, length = k.shape[1:3]
    group = heads // kv_heads
    mass = torch.zeros(batch, 1 if sum_heads else heads, length, device=q.device)
    grouped = q.reshape(batch, kv_heads, group, count, width)
    blocks = _consecutive(length - count, length, window) if rows is None else _chosen(rows, length, window)
    # Used again for every block: fresh memory of this size would go back to the system and be asked for again.
    reach = length if window is None or rows is not None else min(length, window + QUERY_BLOCK)
    size = group * min(QUERY_BLOCK, count) * reach
    scratch = torch.empty(size, device=q.device), torch.empty(size, device=q.device)
    for block in blocks:
        for sequence in range(batch):
            for head in range(kv_heads):
                queries = (grouped[sequence, head, :, block.rows] * scaling).float()
                probabilities = _probabilities(queries, k[sequence, head, block.keys], block, scratch)
                if sum_heads:
                    mass[sequence, 0, block.keys] += probabilities.sum(0)
                else:
                    own = slice(head * group, (head + 1) * group)
                    mass[sequence, own, block.keys] += probabilities.view(group, -1, probabilities.shape[1]).sum(1)
    return mass[:, 0] if sum_heads else mass


def _probabilities(queries: Tensor, keys: Tensor, block: Block, scratch: tuple[Tensor, Tensor]) -> Tensor:
    """``[group * rows, keys]`` from scaled queries ``[group, rows, D]``; valid until the next call."""
    rows = queries.flatten(0, 1)
    scores, probabilities = (part[: len(rows) * len(keys)].view(len(rows), len(keys)) for part in scratch)
    torch.mm(rows, keys.float().t(), out=scores)
    scores.view(*queries.shape[:2], -1)[..., len(keys) - block.penalty.shape[1] :].add_(block.penalty)
    torch.softmax(scores, dim=-1, out=probabilities)
    if block.unseeing is not None:
        probabilities.view(*queries.shape[:2], -1)[:, block.unseeing] = 0
    return probabilities


def _consecutive(offset: int, length: int, window: int | None) -> Iterator[Block]:
    """Blocks of rows at the slots from ``offset`` on. Most look alike, so a mask is made for a new shape only."""
    penalty, shape = torch.empty(0), (-1, -1, -1)
    for start in range(offset, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        first = 0 if window is None else max(0, start - window + 1)
        masked = start if window is None else first
        if shape != (stop - start, start - masked, stop - masked):
            shape = (stop - start, start - masked, stop - masked)
            penalty = _penalty(torch.arange(start - masked, stop - masked), stop - masked, window)
        yield Block(slice(start - offset, stop - offset), slice(first, stop), penalty, None)


def _chosen(places: Tensor, length: int, window: int | None) -> Iterator[Block]:
    """Blocks of rows in the order of their slots, so that each stops at its last visible key."""
    order = places.argsort(stable=True)
    for rows in order.split(QUERY_BLOCK) if len(order) else ():
        own = places[rows]
        first = 0 if window is None else max(0, int(own[0]) - window + 1)
        last = min(length, int(own[-1]) + 1)
        if last <= first:
            continue
        masked = max(first, min(last, int(own[0]))) if window is None else first
        unseeing = (own < 0) if window is None else (own < 0) | (own - window + 1 >= length)
        penalty = _penalty(own - masked, last - masked, window)
        yield Block(rows, slice(first, last), penalty, unseeing if bool(unseeing.any()) else None)


def _penalty(rows: Tensor, length: int, window: int | None) -> Tensor:
    hidden = ~visible_keys(rows, length, window)
    return torch.zeros(hidden.shape, device=rows.device).masked_fill_(hidden, -math.inf)
