"""Levels, scales and zero points."""

import pytest
import torch
from torch import Tensor

from compress.artifact.compressed_tensors import dequantized, packed_tensors
from compress.scheme import Scheme
from compress.weights import grid as module
from compress.weights.gptq import Settings, round_to_nearest
from compress.weights.grid import Grid, full_range, search_scales

BITS = [2, 3, 4, 8]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def weight(rows: int = 24, columns: int = 64, seed: int = 0) -> Tensor:
    """Heavy-tailed, so that clipping pays."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, columns, generator=generator) * torch.rand(rows, columns, generator=generator).add(0.2) ** -1
    )


def errors(w: Tensor, grid: Grid, size: int, scale: Tensor, zero: Tensor, h: Tensor, norm: float) -> Tensor:
    """``sum_j h_j |w_j - w_hat_j|^norm`` of every group, in float64, from the definition."""
    groups, s, z = (t.double() for t in (w.view(w.shape[0], -1, size), scale.unsqueeze(-1), zero.unsqueeze(-1)))
    codes = torch.clamp(torch.round(groups / s) + z, -(2 ** (grid.bits - 1)), 2 ** (grid.bits - 1) - 1)
    return (((codes - z) * s - groups).abs() ** norm * h.double().view(1, -1, size)).sum(-1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_storable_scales_survive_storage(dtype: torch.dtype) -> None:
    scales = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30, 1.0, 0.1, -1 / 3, 7e4])
    found = Grid(4, dtype=dtype).storable(scales)
    assert torch.equal(found.to(dtype).float(), found)
    assert torch.isfinite(found).all()
    assert (found != 0).all()
    assert torch.equal(found.signbit(), scales.signbit())
    torch.testing.assert_close(found[6:9], scales[6:9], rtol=2**-8, atol=0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_largest_weight_takes_the_level_that_exists_on_one_side_only(bits: int, sign: float) -> None:
    groups = sign * torch.tensor([[[4.0, -1.0, 0.5, 3.0]]])
    grid = Grid(bits, dtype=torch.float32)
    scale, zero = full_range(groups, grid)
    assert float(scale) == -sign * 4.0 / 2 ** (bits - 1)
    assert float(grid.encode(groups, scale, zero)[..., 0]) == -(2 ** (bits - 1))
    assert float(grid.nearest(groups, scale, zero)[..., 0]) == sign * 4.0


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("low", [0.5, -3.0, -1.0])
def test_asymmetric_range_holds_both_ends_and_zero(bits: int, low: float) -> None:
    groups = torch.linspace(low, low + 2.5, 11).view(1, 1, 11)
    grid = Grid(bits, symmetric=False, dtype=torch.float32)
    scale, zero = full_range(groups, grid)
    assert float(zero) == round(float(zero))
    assert grid.lowest <= float(zero) <= grid.highest
    assert float(grid.nearest(torch.zeros(1, 1, 1), scale, zero)) == 0.0
    assert float((grid.nearest(groups, scale, zero) - groups).abs().max()) <= 1.01 * float(scale)
    unclipped = torch.round(groups / scale) + zero
    assert float(unclipped.min()) >= grid.lowest - 1
    assert float(unclipped.max()) <= grid.highest + 1


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("steps", [0, 20])
@pytest.mark.parametrize("norm", [2.0, 2.4])
def test_a_group_of_zeros_stays_zero(symmetric: bool, steps: int, norm: float) -> None:
    w = weight(4, 32)
    w[1, 8:16] = 0
    grid = Grid(3, symmetric)
    scales = search_scales(w, grid, 8, importance=None, norm=norm, steps=steps)
    assert torch.isfinite(scales.scale).all()
    assert (scales.scale != 0).all()
    assert torch.equal(grid.nearest(w, *scales.by_column())[1, 8:16], torch.zeros(8))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("norm", "weighted"), [(2.0, True), (2.0, False), (2.4, False)])
def test_clip_search_is_never_worse_than_the_full_range(
    bits: int, symmetric: bool, norm: float, weighted: bool
) -> None:
    w, size = weight(), 16
    h = torch.rand(64, generator=torch.Generator().manual_seed(1)) ** 4 if weighted else torch.ones(64)
    grid = Grid(bits, symmetric)
    importance = h if weighted else None
    full = search_scales(w, grid, size, importance=importance, norm=norm, steps=0)
    best = search_scales(w, grid, size, importance=importance, norm=norm, steps=40)
    assert torch.equal(best.scale.half().float(), best.scale)
    before, after = (errors(w, grid, size, s.scale, s.zero, h, norm) for s in (full, best))
    assert (after <= before * (1 + 1e-4) + 1e-9).all()
    if bits <= 3:
        assert float(after.sum()) < 0.97 * float(before.sum())


def test_the_search_of_a_large_matrix_is_the_search_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    w, grid, h = weight(), Grid(3), torch.rand(64)
    whole = search_scales(w, grid, 16, importance=h, norm=2.0, steps=10)
    monkeypatch.setattr(module, "CACHED", 5 * 64)
    pieces = search_scales(w, grid, 16, importance=h, norm=2.0, steps=10)
    assert torch.equal(whole.scale, pieces.scale)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [16, 64])
def test_what_is_stored_is_the_formula(bits: int, symmetric: bool, size: int) -> None:
    w, grid = weight(), Grid(bits, symmetric, torch.bfloat16)
    solution = round_to_nearest(w, Settings(grid, size, clip="mse", clip_steps=10))
    scale, zero = solution.scales.by_column()
    codes = torch.clamp(torch.round(w / scale) + zero, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert torch.equal(solution.codes.float(), codes)
    assert torch.equal(solution.dequantized(), (codes - zero) * scale)
    assert symmetric == bool((zero == 0).all())
    scheme = Scheme(bits, size, symmetric)
    scales = solution.scales
    tensors = packed_tensors("m", solution.codes, scales.scale, scales.zero, scheme, torch.bfloat16)
    assert ("m.weight_zero_point" in tensors) != symmetric
    assert torch.equal(dequantized(tensors, "m", bits), solution.dequantized())
