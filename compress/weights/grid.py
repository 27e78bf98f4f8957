"""The uniform grid of group quantization: scales, zero points, codes.

A weight matrix ``W [rows, columns]`` (out x in) is cut along its columns into groups of ``group_size``. Every (row,
group) has a scale ``s`` and, when asymmetric, a zero point ``z``:

    code = clamp(round(w / s) + z, lowest, highest)        w_hat = s * (code - z)

Codes are signed, ``-2^(b-1) .. 2^(b-1)-1``, as compressed-tensors stores them. A symmetric grid has one level more
below zero than above it, so a symmetric scale carries a *sign*: a group whose largest weight is positive gets a
negative scale and uses that level too. At 3 bits this is worth as much as an eighth of the range, and costs nothing to
store. Scales are rounded to the storage dtype before a code is chosen: what is searched is what is loaded.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SHRINK_LOW = 0.35  # the smallest fraction of the full range that a clip search tries
REFITS = 2  # closed-form scale updates after the search
CACHED = 2**16  # weights searched at once: they and what is derived from them stay in the processor's cache


@dataclass(frozen=True)
class Grid:
    """The levels of one quantization format.

    Attributes:
        bits: width of a code, 2 to 8.
        symmetric: no zero point, ``w_hat = s * code``.
        dtype: storage dtype of the scales.
    """

    bits: int
    symmetric: bool = True
    dtype: torch.dtype = torch.float16

    @property
    def lowest(self) -> int:
        """The smallest code."""
        return -(2 ** (self.bits - 1))

    @property
    def highest(self) -> int:
        """The largest code."""
        return 2 ** (self.bits - 1) - 1

    def storable(self, scale: Tensor) -> Tensor:
        """Round a scale to the storage dtype, keeping it finite and away from zero; same shape and dtype as given."""
        info = torch.finfo(self.dtype)
        magnitude = scale.abs().clamp(info.smallest_normal, info.max)
        rounded = torch.copysign(magnitude, scale).to(self.dtype)
        return rounded.to(scale.dtype)

    def encode(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Codes (as floats) of ``weight`` on this grid; ``scale`` and ``zero`` broadcast against it."""
        codes = torch.div(weight, scale).round_()
        return (codes if self.symmetric else codes.add_(zero)).clamp_(self.lowest, self.highest)

    def nearest(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The representable values nearest to ``weight``: ``s * (code - z)``."""
        codes = self.encode(weight, scale, zero)
        return (codes if self.symmetric else codes.sub_(zero)).mul_(scale)


@dataclass
class Scales:
    """Scales and zero points of one matrix.

    Attributes:
        scale: ``[rows, groups]`` float32, values representable in the grid's storage dtype, never zero.
        zero: ``[rows, groups]`` float32 holding integers; all zero for a symmetric grid.
        group_size: columns a group.
    """

    scale: Tensor
    zero: Tensor
    group_size: int

    def by_column(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of every column, each ``[rows, columns]``."""
        return (
            self.scale.repeat_interleave(self.group_size, dim=1),
            self.zero.repeat_interleave(self.group_size, dim=1),
        )


def full_range(groups: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero point that just cover every weight of each group, without clipping.

    Args:
        groups: ``[rows, groups, group_size]``.

    Returns:
        ``(scale, zero)``, each ``[rows, groups, 1]``; the symmetric scale is signed, see the module's text.
    """
    if grid.symmetric:
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = torch.where(high > -low, high / grid.lowest, low / grid.lowest)
        return grid.storable(torch.where(scale == 0, torch.ones_like(scale), scale)), torch.zeros_like(scale)
    low = groups.amin(-1, keepdim=True).clamp(max=0)
    high = groups.amax(-1, keepdim=True).clamp(min=0)
    span = high - low
    scale = grid.storable(torch.where(span == 0, torch.ones_like(span), span) / (grid.highest - grid.lowest))
    return scale, torch.round(grid.lowest - low / scale).clamp_(grid.lowest, grid.highest)


def search_scales(
    weight: Tensor, grid: Grid, group_size: int, *, importance: Tensor | None, norm: float, steps: int
) -> Scales:
    """Scales by clip search: the shrunken range with the least ``sum_j h_j |w_j - w_hat_j|^norm`` for every group.

    Args:
        weight: ``[rows, columns]`` float32; ``columns`` a multiple of ``group_size``.
        grid: the levels.
        group_size: columns a group.
        importance: ``h [columns]``, not negative (the diagonal of the Hessian), or None for equal weights.
        norm: the exponent: 2 for a Hessian-weighted search, 2.4 in the published code of GPTQ's clip search.
        steps: how many shrunken ranges are tried; 0 takes the full range.

    Returns:
        The scales. With ``norm == 2`` the winner is polished by the closed form ``s = <w, c>_h / <c, c>_h``.
    """
    columns = weight.shape[1]
    h = torch.ones(columns, device=weight.device) if importance is None else importance.to(weight)
    h = (h + h.mean() * 1e-6 + torch.finfo(torch.float32).tiny).view(1, -1, group_size)
    parts = [
        _search(block.view(block.shape[0], columns // group_size, group_size), grid, h, norm, steps)
        for block in weight.split(max(1, CACHED // columns))
    ]
    scale, zero = (torch.cat(part) for part in zip(*parts, strict=True))
    return Scales(scale, zero, group_size)


def _search(groups: Tensor, grid: Grid, h: Tensor, norm: float, steps: int) -> tuple[Tensor, Tensor]:
    """:func:`search_scales` for a few rows ``[rows, groups, group_size]``; two tensors ``[rows, groups]``."""
    scale, zero = full_range(groups, grid)
    if steps == 0:
        return scale.squeeze(-1), zero.squeeze(-1)
    best_scale, best_zero = scale, zero
    best = _error(groups, scale, zero, grid, h, norm)
    for shrink in torch.linspace(SHRINK_LOW, 1.0, steps + 1)[:-1].tolist():
        for sign in (1.0, -1.0) if grid.symmetric else (1.0,):
            tried = grid.storable(scale * (shrink * sign))
            tried_zero = zero if grid.symmetric else torch.round(zero / shrink).clamp_(grid.lowest, grid.highest)
            best, best_scale, best_zero = _keep_better(
                groups, (tried, tried_zero), (best, best_scale, best_zero), grid, h, norm
            )
    if norm == 2.0:
        for _ in range(REFITS):
            centred = grid.encode(groups, best_scale, best_zero).sub_(best_zero)
            bottom = (centred.square() * h).sum(-1, keepdim=True)
            fitted = (groups * centred * h).sum(-1, keepdim=True) / bottom
            fitted = grid.storable(torch.where(bottom > 0, fitted, best_scale))
            best, best_scale, best_zero = _keep_better(
                groups, (fitted, best_zero), (best, best_scale, best_zero), grid, h, norm
            )
    return best_scale.squeeze(-1), best_zero.squeeze(-1)


def _keep_better(
    groups: Tensor,
    tried: tuple[Tensor, Tensor],
    best: tuple[Tensor, Tensor, Tensor],
    grid: Grid,
    h: Tensor,
    norm: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The better of two candidates for every group, as ``(error, scale, zero)``."""
    error = _error(groups, *tried, grid, h, norm)
    better = error < best[0]
    return (
        torch.where(better, error, best[0]),
        torch.where(better, tried[0], best[1]),
        torch.where(better, tried[1], best[2]),
    )


def _error(groups: Tensor, scale: Tensor, zero: Tensor, grid: Grid, h: Tensor, norm: float) -> Tensor:
    """``[rows, groups, 1]``: the weighted error of rounding to nearest."""
    distance = grid.nearest(groups, scale, zero).sub_(groups)
    distance = distance.square_() if norm == 2.0 else distance.abs_().pow_(norm)
    return distance.mul_(h).sum(-1, keepdim=True)
