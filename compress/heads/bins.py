"""What heads would give under many rules at once, seen along the gradient of their outputs.

A rule lets row i see its first tokens (sink) and its newest ones (window): key j if ``j < sink`` or ``j > i - window``,
and every so many blocks of 64 tokens between them if it has a stride. With ``g_ij = <dO_i, v_j>`` its output along the
gradient dO_i is the softmax mean of g over these keys, so that no output of d dimensions is needed. The windows of the
rules lie within each other: the keys of a row are cut into bins by distance at these windows, each bin gives its sums
relative to its own largest score, and the sums of the first bins and of a sink merge by log-sum-exp. One pass over all
scores gives all rules. Scores exist for a block of rows at a time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.heads.rows import BLOCK_ELEMENTS
from compress.plan import BLOCK, Stride
from compress.plan_writer import Rule
from compress.tap import Seen

ROWS = 128  # of a block
EPSILON = 1e-6  # added to 1 - A, as MoA's code does


@dataclass(frozen=True)
class Span:
    """A rule at one length: what its sink, window and stride are in tokens and blocks."""

    sink: int
    window: int
    stride: Stride | None = None

    @classmethod
    def of(cls, rule: Rule, length: int) -> "Span":
        """At a length in tokens; a row always sees itself."""
        return cls(rule.sink, max(1, rule.window.span(length)), rule.stride)


def placed(rule: Rule, layer: int) -> Rule:
    """A rule as a layer has it: strides begin elsewhere in every layer, so that together they see everything."""
    if rule.stride is None:
        return rule
    return replace(rule, stride=Stride(rule.stride.every, (rule.stride.phase + layer) % rule.stride.every))


@dataclass(frozen=True)
class Rows:
    """A block of rows of some KV heads and their groups.

    Attributes:
        kv_heads: which.
        start: the first row.
        scores: scaled, [heads, rows, keys]; keys end with the last row's own.
        inner: ``<dO_i, v_j>``, alike.
    """

    kv_heads: slice
    start: int
    scores: Tensor
    inner: Tensor

    def by_distance(self, x: Tensor, fill: float) -> Tensor:
        """``[heads, rows, keys]`` with rows moved so that equal distances are below each other.

        Returns:
            [heads, rows, keys + 1]: column c of row i is key ``c - keys + i``, and its own the last; ``fill`` where
            there is no such key.
        """
        heads, rows, keys = x.shape
        wide = F.pad(x, (rows, 0), value=fill)
        return wide.as_strided((heads, rows, keys + 1), (rows * (rows + keys), rows + keys + 1, 1))

    @property
    def places(self) -> Tensor:
        """Of the rows in the sequence, [rows, 1]."""
        return torch.arange(self.start, self.scores.shape[2], device=self.scores.device)[:, None]


def row_blocks(seen: Seen, gradient: Tensor, first: int = 0) -> Iterator[Rows]:
    """All rows of a layer, in blocks.

    Args:
        seen: queries, keys and values of a single sequence.
        gradient: of a loss by the attention's output, [1, T, heads, head_dim].
        first: rows before it aren't needed.
    """
    kv_heads, length = seen.key.shape[1:3]
    group = seen.query.shape[1] // kv_heads
    dtype = torch.promote_types(seen.query.dtype, torch.float32)
    together = max(1, BLOCK_ELEMENTS // (ROWS * length * group))
    upstream = gradient.transpose(1, 2)
    for head in range(0, kv_heads, together):
        chosen = slice(head, min(head + together, kv_heads))
        own = slice(chosen.start * group, chosen.stop * group)
        key, value = (x[0, chosen].to(dtype) for x in (seen.key, seen.value))
        query, wanted = seen.query[0, own].to(dtype) * seen.scaling, upstream[0, own].to(dtype)
        for start in range(first // ROWS * ROWS, length, ROWS):
            rows = slice(start, min(start + ROWS, length))
            scores, inner = (
                (x[:, rows].reshape(len(y), -1, x.shape[-1]) @ y[:, : rows.stop].transpose(1, 2)).view(
                    len(x), -1, rows.stop
                )
                for x, y in ((query, key), (wanted, value))
            )
            yield Rows(chosen, start, scores, inner)


def changes(rows: Rows, spans: Sequence[Span]) -> Tensor:
    """``<dO_i, O_rule,i - O_full,i>``, exactly, [heads, rows, rules].

    It is the first-order change of the loss where row i of a head sees what the rule leaves, its probabilities
    normalised over that: ``(m S_i - sum_J g_ij A_ij) / (1 - m)`` for the set J of dropped keys with mass m.
    """
    windows = sorted({span.window for span in spans})
    scores, inner = rows.by_distance(rows.scores, -torch.inf), rows.by_distance(rows.inner, 0.0)
    near, state = {}, None
    for window, columns in _bins(windows, scores.shape[2]):
        found = _Partial.of(scores[..., columns], inner[..., columns])
        state = found if state is None else state.merged(found)
        near[window] = state
    assert state is not None
    full = state.mean
    sinks = {s: _Partial.of(rows.scores[..., :s], rows.inner[..., :s]) for s in {span.sink for span in spans} if s}
    return torch.stack([_change(rows, span, near[span.window], sinks.get(span.sink), full) for span in spans], -1)


def elementwise(rows: Rows, spans: Sequence[Span]) -> Tensor:
    """MoA's published influence: sums over dropped keys of ``|A_ij / (1 - A_ij) (S_i - g_ij)|``, [heads, rows, rules].

    Each is what dropping that key alone would change (arXiv 2406.14909, equation 4); of keys that are dropped together
    and weigh much the sum says little.
    """
    later = torch.arange(rows.scores.shape[2], device=rows.scores.device) > rows.places
    mass = rows.scores.masked_fill(later, -torch.inf).softmax(-1)
    mean = (mass * rows.inner).sum(-1, keepdim=True)
    single = (mass / (1 - mass + EPSILON) * (mean - rows.inner)).abs()
    windows = sorted({span.window for span in spans})
    found: dict[Span, Tensor] = {}
    for sink in sorted({span.sink for span in spans}):
        single[..., :sink] = 0
        table = rows.by_distance(single, 0.0)
        sums = [table[..., columns].sum(-1) for _, columns in _bins(windows, table.shape[2])]
        for span in spans:
            if span.sink == sink:
                far = torch.stack(sums[windows.index(span.window) + 1 :]).sum(0)
                found[span] = far - _strided(rows, span, single, 0.0)[0].sum(-1)
    return torch.stack([found[span] for span in spans], -1)


class _Partial(NamedTuple):
    """Sums over some keys: of exp(score - top), and of the same times g, each [heads, rows]."""

    top: Tensor
    mass: Tensor
    sum: Tensor

    @classmethod
    def of(cls, scores: Tensor, inner: Tensor) -> "_Partial":
        """Over the last axis; it may be empty, or have no key for some rows."""
        least = torch.finfo(scores.dtype).min / 4
        top = scores.amax(-1).clamp_min(least) if scores.shape[-1] else scores.new_full(scores.shape[:-1], least)
        weights = (scores - top[..., None]).exp()
        return cls(top, weights.sum(-1), (weights * inner).sum(-1))

    def merged(self, other: "_Partial") -> "_Partial":
        """Over the keys of both."""
        top = torch.maximum(self.top, other.top)
        one, two = (self.top - top).exp(), (other.top - top).exp()
        return _Partial(top, one * self.mass + two * other.mass, one * self.sum + two * other.sum)

    @property
    def mean(self) -> Tensor:
        return self.sum / self.mass


def _bins(windows: list[int], columns: int) -> Iterator[tuple[int, slice]]:
    """The columns by distance between one window and the next, from the nearest; the last bin is all beyond."""
    edges = [columns - min(window, columns) for window in windows]
    for window, (end, start) in zip([*windows, -1], pairwise([columns, *edges, 0]), strict=True):
        yield window, slice(start, end)


def _change(rows: Rows, span: Span, near: _Partial, sink: _Partial | None, full: Tensor) -> Tensor:
    """One rule's change, [heads, rows]; 0 where sink and window touch, and nothing is dropped."""
    seen = near if sink is None else near.merged(sink)
    if span.stride is not None:
        seen = seen.merged(_Partial.of(*_strided(rows, span, rows.scores, -torch.inf)))
    covered = rows.places[:, 0] < span.sink + span.window
    return (seen.mean - full).masked_fill(covered, 0.0)


def _strided(rows: Rows, span: Span, x: Tensor, fill: float) -> tuple[Tensor, Tensor]:
    """``x`` and ``g`` at the keys that a stride adds to sink and window, ``fill`` in ``x`` where a row doesn't."""
    key = torch.arange(x.shape[2], device=x.device)
    if span.stride is None:
        key = key[:0]
    else:
        key = key[(key >= span.sink) & ((key // BLOCK - span.stride.phase) % span.stride.every == 0)]
    return x[..., key].masked_fill(key > rows.places - span.window, fill), rows.inner[..., key]
