"""GPTQ (arXiv 2210.17323) in the LDLQ form, refined by coordinate descent and scale refits.

Everything minimises the layer's output error on the calibration inputs,

    loss(W_hat) = tr((W - W_hat) H (W - W_hat)^T),        H = sum_t w_t x_t x_t^T,

where ``w_t`` is the importance of token t (all ones is GPTQ, attention concentration is RSQ, arXiv 2503.01820).

With ``H + damp = R R^T``, R upper triangular, and ``R~ = R / diag(R)`` (unit diagonal), columns are rounded left to
right:

    w_hat_i = round(w_i + sum_{j<i} (w_j - w_hat_j) R~[j, i])

which gives the codes of GPTQ from a single Cholesky factor and no inverse. Then, with ``G = (W_hat - W) H``:

    coordinate descent    w_hat_j <- round(w_hat_j - G_j / H_jj),   G += (change of column j) H[j, :]
    scale refit           s_k <- s_k - (G_k . c_k) / (c_k^T H_kk c_k)     for the centred codes c_k of group k

neither of which can raise the loss. Matrices are kept transposed, ``[columns, rows]``, so that a column is contiguous.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.calibrate.workers import Workers, one_thread
from compress.weights.grid import Grid, Scales, search_scales

BLOCK = 128  # columns between two full updates
ROWS = 1536  # about so many rows are solved together: fewer, and Python's share of the time grows
ESCALATION = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)  # times the asked damping, until the factorization succeeds


@dataclass(frozen=True)
class Settings:
    """How one matrix is solved.

    Attributes:
        grid: bits, symmetry and storage dtype of the scales.
        group_size: columns a group.
        clip: ``none``, ``mse`` or ``hessian`` (squared error weighted by the diagonal of H).
        clip_steps: ranges tried by the clip search.
        clip_norm: exponent of the ``mse`` search.
        act_order: quantize columns by descending diagonal of H; scales are static, so nothing is stored for it.
        damp: fraction of the mean diagonal of H that is added to it.
        sweeps: coordinate-descent sweeps, each followed by a scale refit.
    """

    grid: Grid
    group_size: int
    clip: str = "hessian"
    clip_steps: int = 80
    clip_norm: float = 2.4
    act_order: bool = True
    damp: float = 0.01
    sweeps: int = 3


@dataclass
class Solution:
    """A quantized matrix.

    Attributes:
        codes: ``[rows, columns]`` int8, signed.
        scales: scale and zero point of every (row, group).
        damp: the damping that was used; NaN where nothing was factorized.
        note: what a user should know of it, or an empty string.
        degraded: it was rounded to nearest although GPTQ was asked for.
    """

    codes: Tensor
    scales: Scales
    damp: float = float("nan")
    note: str = ""
    degraded: bool = False

    def dequantized(self) -> Tensor:
        """``[rows, columns]`` float32: exactly what a reader of the artifact computes in float32."""
        scale, zero = self.scales.by_column()
        return (self.codes.float() - zero) * scale


def find_scales(weight: Tensor, diagonal: Tensor | None, settings: Settings) -> Scales:
    """The scales that the settings ask for; ``diagonal [columns]`` is used by the ``hessian`` search alone."""
    by_hessian = settings.clip == "hessian" and diagonal is not None
    return search_scales(
        weight,
        settings.grid,
        settings.group_size,
        importance=diagonal if by_hessian else None,
        norm=2.0 if settings.clip == "hessian" else settings.clip_norm,
        steps=0 if settings.clip == "none" else settings.clip_steps,
    )


def round_to_nearest(weight: Tensor, settings: Settings, hessian: Tensor | None = None) -> Solution:
    """RTN: no error compensation. A Hessian, if given, serves the clip search alone."""
    scales = find_scales(weight, None if hessian is None else hessian.diagonal(), settings)
    scale, zero = scales.by_column()
    return Solution(settings.grid.encode(weight, scale, zero).to(torch.int8), scales)


def solve(weight: Tensor, hessian: Tensor, settings: Settings, workers: Workers | None = None) -> Solution:
    """Quantize one matrix against its Hessian.

    Args:
        weight: ``[rows, columns]`` float32. Matrices that share their input may be stacked along the rows.
        hessian: ``H [columns, columns]``, float32 or float64, symmetric, finite. It is not changed.
        settings: see :class:`Settings`.
        workers: treat blocks of rows side by side; rows don't depend on each other.

    Returns:
        The solution. When H can't be factorized at any damping, rounding to nearest, with a note.

    Raises:
        ValueError: the weight or H holds NaN or infinity.
    """
    if not torch.isfinite(weight).all():
        raise ValueError("the weight holds NaN or infinite values")
    if not torch.isfinite(hessian).all():
        raise ValueError("the Hessian holds NaN or infinite values")
    diagonal = hessian.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True) if settings.act_order else None
    with one_thread():  # a threaded factorization depends on the number of threads in its last bits
        factor, damp = factorize(hessian if order is None else hessian[order][:, order], settings.damp)
    if factor is None:
        solution = round_to_nearest(weight, replace(settings, clip="mse"))
        solution.note = "no damping made the Hessian positive definite: rounded to nearest"
        solution.degraded = True
        return solution
    unit = (factor / factor.diagonal()).to(weight.dtype)
    H = hessian.to(weight.dtype)

    def part(rows: Tensor) -> tuple[Tensor, Scales]:
        with one_thread():
            scales = find_scales(rows, diagonal, settings)
            codes = _ldlq(rows, unit, scales, settings.grid, order)
            if settings.sweeps:
                _descend(rows, H, codes, scales, settings)
            return codes.to(torch.int8).t().contiguous(), scales

    blocks = weight.tensor_split(max(1, round(weight.shape[0] / ROWS)))
    solved = list(workers.map(part, blocks) if workers else map(part, blocks))
    scales = Scales(
        torch.cat([found.scale for _, found in solved]),
        torch.cat([found.zero for _, found in solved]),
        settings.group_size,
    )
    dead = int((diagonal <= 0).sum())
    note = f"{dead} inputs are always zero in calibration: rounded to nearest" if dead else ""
    return Solution(torch.cat([codes for codes, _ in solved]), scales, damp, note)


def relative_loss(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """``tr((W-W_hat) H (W-W_hat)^T) / tr(W H W^T)``: the relative squared error of the layer's output."""
    H = hessian.to(weight.dtype)
    error = weight - quantized
    top = ((error @ H) * error).sum(dtype=torch.float64)
    bottom = ((weight @ H) * weight).sum(dtype=torch.float64)
    return float(top / bottom) if bottom > 0 else 0.0


def factorize(hessian: Tensor, damp: float) -> tuple[Tensor | None, float]:
    """Upper triangular R with ``H + damp * mean(diag H) I = R R^T``, by one Cholesky of the index-reversed matrix.

    The damping rises in steps, each time from the untouched H, until the factorization succeeds.

    Returns:
        ``(R float64 [n, n], damping used)``, or ``(None, nan)`` if none did.
    """
    base = hessian.to(torch.float64)
    mean = base.diagonal().mean()
    if mean <= 0:
        return None, float("nan")
    for times in ESCALATION:
        damped = base.flip(0, 1)
        damped.diagonal().add_(damp * times * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0 and torch.isfinite(lower).all():
            return lower.flip(0, 1), damp * times
    return None, float("nan")


def _ldlq(weight: Tensor, unit: Tensor, scales: Scales, grid: Grid, order: Tensor | None) -> Tensor:
    """Codes by the unit factor ``R~``, transposed: ``[columns, rows]`` float32 in the original column order."""
    W = weight.t().contiguous() if order is None else weight.t()[order]
    scale, zero = (part.t().contiguous() for part in scales.by_column())
    if order is not None:
        scale, zero = scale[order], zero[order]
    error = torch.zeros_like(W)  # w - w_hat of every finished column
    for start in range(0, W.shape[0], BLOCK):
        block = slice(start, start + BLOCK)
        target = torch.addmm(W[block], unit[:start, block].t(), error[:start])
        inner = unit[block, block].t().contiguous()
        local = error[block]
        rows = zip(target, W[block], scale[block], zero[block], local, inner, strict=True)
        for i, (wanted, w, s, z, e, factors) in enumerate(rows):
            if i:
                wanted.addmv_(local[:i].t(), factors[:i])
            torch.sub(w, grid.nearest(wanted, s, z), out=e)
    codes = grid.encode(W - error, scale, zero)
    if order is None:
        return codes
    restored = torch.empty_like(codes)
    restored[order] = codes
    return restored


def _descend(weight: Tensor, H: Tensor, codes: Tensor, scales: Scales, settings: Settings) -> None:
    """Coordinate descent with scale refits in place, ``settings.sweeps`` times over; ``codes [columns, rows]``."""
    state = _State(H, weight, codes, scales)
    size = settings.group_size
    for sweep in range(settings.sweeps):
        last = sweep == settings.sweeps - 1
        for group in range(scales.scale.shape[1]):
            part = slice(group * size, (group + 1) * size)
            change = _refit(state, part, group, settings.grid)
            for start in range(part.start, part.stop, BLOCK):
                block = slice(start, min(start + BLOCK, part.stop))
                moved = _sweep(state, block, group, settings.grid)
                state.gradient[part].addmm_(H[part, block], moved)
                change[block.start - part.start : block.stop - part.start] += moved
            # the group's own columns are up to date; after the last sweep nobody looks back
            state.gradient[part.stop :].addmm_(H[part.stop :, part], change)
            if not last:
                state.gradient[: part.start].addmm_(H[: part.start, part], change)
    scales.scale.copy_(state.scale.t())


class _State:
    """What coordinate descent keeps, all transposed: values, codes, scales, and ``G = H (W_hat - W)``."""

    def __init__(self, H: Tensor, weight: Tensor, codes: Tensor, scales: Scales) -> None:
        self.H = H
        self.codes = codes
        self.scale = scales.scale.t().contiguous()
        self.zero = scales.zero.t().contiguous()
        repeated = self.zero.repeat_interleave(scales.group_size, dim=0)
        self.value = (codes - repeated).mul_(self.scale.repeat_interleave(scales.group_size, dim=0))
        self.gradient = H @ (self.value - weight.t())
        diagonal = H.diagonal()
        alive = diagonal >= torch.finfo(diagonal.dtype).smallest_normal  # so that the reciprocal is finite
        self.step = torch.where(alive, 1.0 / diagonal, torch.zeros_like(diagonal))


def _refit(state: _State, part: slice, group: int, grid: Grid) -> Tensor:
    """Give one group of every row the scale of least loss while its codes stay; returns the change of its values."""
    local = state.H[part, part]
    c = state.codes[part] - state.zero[group]
    curvature = (c * (local @ c)).sum(0)
    step = (state.gradient[part] * c).sum(0) / curvature
    fitted = grid.storable(state.scale[group] - torch.where(curvature > 0, step, torch.zeros_like(step)))
    move = fitted - state.scale[group]
    # rounding the scale to its storage dtype may undo the gain; a changed sign means that the codes fit badly
    worse = (move * (move + 2 * step) * curvature > 0) | (fitted * state.scale[group] <= 0)
    fitted = torch.where(worse, state.scale[group], fitted)
    change = c * (fitted - state.scale[group])
    state.gradient[part].addmm_(local, change)
    state.value[part] += change
    state.scale[group] = fitted
    return change


def _sweep(state: _State, block: slice, group: int, grid: Grid) -> Tensor:
    """One pass of coordinate descent over a block of columns of one group; returns the change of their values.

    A group shares its scales, so the pass is made in units of codes: column i wants
    ``c_i - (G_i / s + sum_{j<i} H_ij (change of c_j)) / H_ii``.
    """
    codes, scale, step = state.codes[block], state.scale[group], state.step[block].unsqueeze(1)
    wanted = torch.addcmul(codes, state.gradient[block] / scale, step, value=-1)
    coupling = state.H[block, block] * -step
    change = torch.zeros_like(codes)
    for i, (want, old, moved, factors) in enumerate(zip(wanted, codes, change, coupling, strict=True)):
        if i:
            want.addmv_(change[:i].t(), factors[:i])
        torch.sub(want.round_().clamp_(grid.lowest, grid.highest), old, out=moved)
    codes += change
    change *= scale
    state.value[block] += change
    return change
