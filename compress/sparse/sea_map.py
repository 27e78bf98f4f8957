"""A picture of what SEA's estimator guesses: a head's attention, estimated and the model's own, side by side."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.evalsuite.report.draw import Cell, grids
from compress.evalsuite.report.svg import RAMP, Drawing
from compress.sparse.sea import Estimator
from compress.sparse.sea_layer import divergence, teacher
from compress.sparse.sea_pixels import resize
from compress.tap import Seen

FAINT = 1e-4
"""Mass of a row below which a field stays empty; the colours are logarithmic from here to 1."""


@dataclass(frozen=True)
class AttentionMap:
    """One head's attention on a sequence, in fields of some keys.

    Attributes:
        layer: number of the layer.
        head: number of the query head.
        rows: tokens whose rows these are, ascending.
        columns: the first key of every column, ascending from 0.
        estimated: mass of the estimate ``[rows, columns]`` float32; every row sums to one.
        own: mass of the model's attention, likewise.
        divergence: KL, nats a row, mean over these rows.
    """

    layer: int
    head: int
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    estimated: Tensor
    own: Tensor
    divergence: float


@torch.no_grad()
def attention_map(estimator: Estimator, seen: Seen, head: int, size: int = 32) -> AttentionMap:
    """The map of one head.

    Args:
        estimator: of the layer.
        seen: queries, keys and values of one whole sequence, batch 1.
        head: a query head.
        size: rows and columns at most.

    Raises:
        ValueError: there is no such head.
    """
    heads, length = seen.query.shape[1:3]
    if not 0 <= head < heads:
        raise ValueError(f"there is no head {head}, the layer has {heads}")
    count = min(size, length)
    edges = torch.arange(count + 1, device=seen.query.device) * length // count
    rows = edges[1:] - 1
    logits = estimator(seen.query, seen.key, seen.value).logits[:, :, rows]
    guess, own = resize(logits, rows + 1, length)[:, head], teacher(seen, rows)[:, head]
    return AttentionMap(
        layer=seen.layer,
        head=head,
        rows=tuple(rows.tolist()),
        columns=tuple(edges[:-1].tolist()),
        estimated=_binned(guess[0].exp(), edges),
        own=_binned(own[0], edges),
        divergence=float(divergence(own, guess)),
    )


def draw(width: int, found: AttentionMap) -> Drawing:
    """The two maps, at a width in pixels."""
    panels = []
    for title, mass in (("estimated", found.estimated), ("the model's own", found.own)):
        cells = {
            (row, column): Cell(f"warm-{_step(value)}", title=f"token {found.rows[row]}, keys from {key}: {value:.2g}")
            for row, values in enumerate(mass.tolist())
            for column, (key, value) in enumerate(zip(found.columns, values, strict=True))
            if value >= FAINT
        }
        panels.append((title, cells))
    return grids(width, panels, [str(row) for row in found.rows], [str(key) for key in found.columns], ("token", "key"))


def _binned(attention: Tensor, edges: Tensor) -> Tensor:
    """Sums of columns ``[R, T]`` between edges, on the CPU."""
    sums = torch.nn.functional.pad(attention.double().cumsum(-1), (1, 0))
    return sums[:, edges].diff(dim=-1).float().cpu()


def _step(mass: float) -> int:
    """Of the colour ramp."""
    return min(RAMP - 1, int(RAMP * (1 - math.log(min(mass, 1.0)) / math.log(FAINT))))
