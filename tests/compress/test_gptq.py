"""The solver against GPTQ as it is written in the paper."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from compress.calibrate.workers import Workers
from runs import correlated
from torch import Tensor

from compress.weights import gptq
from compress.weights.gptq import Settings, factorize, find_scales, relative_loss, round_to_nearest, solve
from compress.weights.grid import Grid, Scales

COLUMNS = 200  # more than a block


def problem(rows: int = 48, columns: int = COLUMNS, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A weight and the Hessian ``X^T X / T`` of correlated inputs."""
    weight, inputs = correlated(rows, columns, 3 * columns, dtype=dtype)
    return weight, (inputs.t() @ inputs / len(inputs)).double()


def settings(bits: int = 3, symmetric: bool = True, size: int = 8, **others: object) -> Settings:
    chosen = Settings(Grid(bits, symmetric), size, clip_steps=8, sweeps=0)
    return replace(chosen, **others)  # type: ignore[arg-type]


def loss(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    error = (weight - quantized).double()
    return float(torch.trace(error @ hessian.double() @ error.t()))


def classical(
    weight: Tensor, hessian: Tensor, scales: Scales, grid: Grid, damp: float, act_order: bool
) -> tuple[Tensor, Tensor]:
    """GPTQ column by column with the upper Cholesky factor of the inverse: codes and residuals ``(w - q) / U_ii``."""
    columns = weight.shape[1]
    order = torch.argsort(hessian.diagonal(), descending=act_order, stable=True) if act_order else torch.arange(columns)
    H = hessian[order][:, order] + damp * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    W = weight.double()[:, order].clone()
    scale, zero = (part.double()[:, order] for part in scales.by_column())
    codes, residuals = torch.empty_like(W), torch.empty_like(W)
    for i in range(columns):
        codes[:, i] = torch.clamp(torch.round(W[:, i] / scale[:, i]) + zero[:, i], grid.lowest, grid.highest)
        residuals[:, i] = (W[:, i] - (codes[:, i] - zero[:, i]) * scale[:, i]) / U[i, i]
        W[:, i:] -= residuals[:, i : i + 1] * U[i, i:]
    return codes[:, torch.argsort(order)], residuals


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (3, True), (4, False), (8, False)])
def test_ldlq_gives_the_codes_of_classical_gptq(bits: int, symmetric: bool, act_order: bool) -> None:
    weight, hessian = problem(dtype=torch.float64)  # float64, so that no tie is rounded another way
    chosen = settings(bits, symmetric, act_order=act_order)
    solution = solve(weight, hessian, chosen)
    codes, residuals = classical(weight, hessian, solution.scales, chosen.grid, chosen.damp, act_order)
    assert torch.equal(solution.codes.double(), codes)
    assert not torch.equal(solution.codes, round_to_nearest(weight, chosen, hessian).codes)
    scale, zero = solution.scales.by_column()
    damped = hessian + chosen.damp * hessian.diagonal().mean() * torch.eye(COLUMNS, dtype=torch.float64)
    expected = loss(weight, (codes - zero) * scale, damped)
    assert float(residuals.square().sum()) == pytest.approx(expected, rel=1e-9)


def test_float32_agrees_with_classical_gptq_but_for_ties() -> None:
    weight, hessian = problem()
    chosen = settings(act_order=False)
    solution = solve(weight, hessian, chosen)
    codes, _ = classical(weight, hessian, solution.scales, chosen.grid, chosen.damp, False)
    assert float((solution.codes.double() != codes).double().mean()) < 1e-3


@pytest.mark.parametrize("act_order", [False, True])
def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch, act_order: bool) -> None:
    weight, hessian = problem(dtype=torch.float64)
    chosen = settings(act_order=act_order, size=100, sweeps=2)
    expected = solve(weight, hessian, chosen)
    monkeypatch.setattr(gptq, "BLOCK", 1000)
    whole = solve(weight, hessian, chosen)
    assert torch.equal(whole.codes, expected.codes)
    torch.testing.assert_close(whole.scales.scale, expected.scales.scale)


def test_the_factor_is_exact() -> None:
    _, hessian = problem()
    kept = hessian.clone()
    factor, damp = factorize(hessian, 0.01)
    assert factor is not None
    assert damp == 0.01
    assert torch.equal(factor, factor.triu())
    expected = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(COLUMNS, dtype=torch.float64)
    torch.testing.assert_close(factor @ factor.t(), expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(hessian, kept)


@pytest.mark.parametrize(("lowest", "times"), [(-0.005, 1), (-0.015, 2), (-0.09, 10), (-0.9, 100), (-1.1, None)])
def test_damping_rises_from_the_untouched_hessian(lowest: float, times: int | None) -> None:
    rotation, _ = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    eigenvalues = torch.full((32,), (32 - lowest) / 31, dtype=torch.float64)
    eigenvalues[0] = lowest  # of a mean diagonal of one
    hessian = rotation * eigenvalues @ rotation.t()
    factor, damp = factorize(hessian, 0.01)
    solution = solve(torch.randn(4, 32), hessian, settings())
    assert torch.isfinite(solution.dequantized()).all()
    if times is None:
        assert factor is None
        assert damp != damp
        assert "rounded to nearest" in solution.note
        return
    assert factor is not None
    assert damp == pytest.approx(0.01 * times)
    assert solution.damp == damp
    assert not solution.note
    expected = hessian + damp * torch.eye(32, dtype=torch.float64)
    torch.testing.assert_close(factor @ factor.t(), expected, rtol=1e-10, atol=1e-10)


def test_a_rank_deficient_hessian_is_solved() -> None:
    weight, inputs = correlated(16, 64, 10)
    solution = solve(weight, (inputs.t() @ inputs).double(), settings(sweeps=3))
    assert torch.isfinite(solution.dequantized()).all()
    assert solution.damp > 0


def test_zero_activations_are_rounded_to_nearest_with_a_note() -> None:
    weight, chosen = problem()[0], settings(clip="none")
    factor, damp = factorize(torch.zeros(COLUMNS, COLUMNS), 0.01)
    assert factor is None
    assert damp != damp
    solution = solve(weight, torch.zeros(COLUMNS, COLUMNS), chosen)
    assert "rounded to nearest" in solution.note
    assert torch.equal(solution.codes, round_to_nearest(weight, replace(chosen, clip="mse")).codes)


@pytest.mark.parametrize("sweeps", [0, 3])
def test_inputs_that_are_always_zero_are_named_and_rounded_to_nearest(sweeps: int) -> None:
    weight, inputs = correlated(16, 64, 200)
    inputs[:, [3, 40]] = 0
    chosen = settings(size=32, sweeps=0)
    solution = solve(weight, (inputs.t() @ inputs).double(), replace(chosen, sweeps=sweeps))
    assert solution.note.startswith("2 inputs are always zero")
    assert torch.isfinite(solution.dequantized()).all()
    if not sweeps:
        scale, zero = solution.scales.by_column()
        nearest = chosen.grid.encode(weight, scale, zero)
        assert torch.equal(solution.codes[:, [3, 40]].float(), nearest[:, [3, 40]])


@pytest.mark.parametrize("size", [1e-18, 1e-20, 1e-22])
def test_inputs_too_small_for_float32_are_no_trouble(size: float) -> None:
    weight, inputs = correlated(16, 64, 200, dtype=torch.float64)
    inputs[:, [3, 40]] *= size  # a diagonal of 1e-40 has no float32 reciprocal
    solution = solve(weight.float(), inputs.t() @ inputs / 200, settings(size=32, sweeps=3))
    assert torch.isfinite(solution.dequantized()).all()
    assert int(solution.codes.min()) >= -4
    assert int(solution.codes.max()) <= 3
    assert float((solution.dequantized() - weight).abs().max()) < 5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["weight", "Hessian"])
def test_nan_and_infinity_are_refused(where: str, value: float) -> None:
    weight, hessian = problem(8, 16)
    (weight if where == "weight" else hessian)[3, 3] = value
    with pytest.raises(ValueError, match=f"the {where} holds NaN or infinite"):
        solve(weight, hessian, settings())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("columns", "size", "dtype"), [(96, 16, torch.float16), (512, 256, torch.float16), (200, 200, torch.float32)]
)
def test_sweeps_and_refits_never_raise_the_loss(symmetric: bool, columns: int, size: int, dtype: torch.dtype) -> None:
    weight, hessian = problem(24, columns)
    losses = []
    for sweeps in range(4):
        chosen = settings(3, symmetric, size, sweeps=sweeps, grid=Grid(3, symmetric, dtype))
        solution = solve(weight, hessian, chosen)
        scale = solution.scales.scale
        assert torch.equal(scale.to(dtype).float(), scale)
        assert int(solution.codes.min()) >= -4
        assert int(solution.codes.max()) <= 3
        losses.append(loss(weight, solution.dequantized(), hessian))
    assert losses[1] < losses[0]
    assert losses[2] <= losses[1] * (1 + 1e-5)
    assert losses[3] <= losses[2] * (1 + 1e-5)


@pytest.mark.parametrize("steps", ["refit", "sweep"])
def test_each_half_of_a_sweep_lowers_the_loss(monkeypatch: pytest.MonkeyPatch, steps: str) -> None:
    weight, hessian = problem()
    start = loss(weight, solve(weight, hessian, settings(size=40)).dequantized(), hessian)
    other = "_sweep" if steps == "refit" else "_refit"

    def nothing(state: gptq._State, part: slice, group: int, grid: Grid) -> Tensor:
        return torch.zeros_like(state.value[part])

    monkeypatch.setattr(gptq, other, nothing)
    assert loss(weight, solve(weight, hessian, settings(size=40, sweeps=1)).dequantized(), hessian) < start


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_order_of_the_methods(bits: int) -> None:
    weight, hessian = problem()
    chosen = settings(bits)
    found: list[Callable[[], Tensor]] = [
        lambda: round_to_nearest(weight, replace(chosen, clip="none")).dequantized(),
        lambda: solve(weight, hessian, replace(chosen, clip="none")).dequantized(),
        lambda: solve(weight, hessian, replace(chosen, sweeps=3)).dequantized(),
    ]
    rtn, plain, swept = (relative_loss(weight, make(), hessian) for make in found)
    assert rtn > 1.2 * plain
    assert plain > swept


def test_rounding_to_nearest_uses_the_hessian_for_clipping_alone() -> None:
    weight, hessian = problem()
    chosen = settings(clip="hessian", clip_steps=20)
    blind, seeing = round_to_nearest(weight, chosen), round_to_nearest(weight, chosen, hessian)
    diagonal = torch.diag(hessian.diagonal())
    assert loss(weight, seeing.dequantized(), diagonal) < loss(weight, blind.dequantized(), diagonal)
    for solution in (blind, seeing):
        assert torch.equal(solution.codes.float(), chosen.grid.encode(weight, *solution.scales.by_column()))


def test_full_range_scales_without_clipping() -> None:
    weight, _ = problem()
    clipped = find_scales(weight, None, settings(clip="mse"))
    full = find_scales(weight, None, settings(clip="none"))
    assert (full.scale.abs() >= clipped.scale.abs()).all()
    assert not torch.equal(full.scale, clipped.scale)


def test_the_relative_loss_is_the_error_of_the_outputs() -> None:
    weight, inputs = correlated(8, 24, 100)
    quantized = weight + 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    expected = ((weight - quantized) @ inputs.t()).square().sum() / (weight @ inputs.t()).square().sum()
    assert relative_loss(weight, quantized, inputs.t() @ inputs) == pytest.approx(float(expected), rel=1e-4)
    assert relative_loss(torch.zeros(2, 24), torch.zeros(2, 24), inputs.t() @ inputs) == 0.0


@pytest.mark.parametrize("count", [1, 3])
def test_rows_may_be_solved_side_by_side(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    weight, hessian = problem(50)
    chosen = settings(sweeps=2)
    alone = solve(weight, hessian, chosen)
    monkeypatch.setattr(gptq, "ROWS", 12)
    with Workers(count) as workers:
        shared = solve(weight, hessian, chosen, workers)
    assert shared.codes.shape == alone.codes.shape
    assert float((shared.codes != alone.codes).double().mean()) < 1e-3  # another block, another order of sums
    torch.testing.assert_close(shared.scales.scale, alone.scales.scale, rtol=1e-2, atol=1e-3)
