"""The accumulated Hessian against its formula."""

import pytest
import torch
from compress.calibrate.hessian import TILE, Hessian, gram
from torch import Tensor


def samples(count: int, tokens: int, width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(width)
    return [torch.randn(tokens + i, width, generator=generator) for i in range(count)]


@pytest.mark.parametrize("width", [24, TILE, 2 * TILE + 76])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_mean_is_the_formula(width: int, weighted: bool) -> None:
    inputs = samples(3, 40, width)
    weights = [torch.rand(len(x), generator=torch.Generator().manual_seed(1)) if weighted else None for x in inputs]
    hessian = Hessian(width)
    for x, weight in zip(inputs, weights, strict=True):
        hessian.add(gram(x, weight), len(x))
    found = hessian.mean()
    all_x = torch.cat(inputs).double()
    all_w = torch.cat([torch.ones(len(x)) if w is None else w for x, w in zip(inputs, weights, strict=True)]).double()
    expected = all_x.t() @ torch.diag(all_w) @ all_x / len(all_x)
    assert hessian.tokens == len(all_x) == 123
    assert found.dtype == torch.float64
    assert torch.equal(found, found.t())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_sums_are_kept_in_float64() -> None:
    hessian = Hessian(2)
    hessian.add(gram(torch.tensor([[1e4, 0.0]])), 1)
    for _ in range(1000):
        hessian.add(gram(torch.tensor([[1.0, 0.0]])), 1)  # lost one by one in float32, whose steps are 8 here
    assert float(hessian.value[0, 0]) == 1e8 + 1000


def test_no_weights_and_weights_of_one_give_the_same_bits() -> None:
    for x in samples(2, 64, TILE + 8):
        assert torch.equal(gram(x), gram(x, torch.ones(len(x))))


def test_the_input_is_left_alone() -> None:
    (x,) = samples(1, 8, 16)
    kept = x.clone()
    gram(x, torch.rand(8))
    assert torch.equal(x, kept)


def test_nothing_added_is_zero() -> None:
    assert torch.equal(Hessian(4).mean(), torch.zeros(4, 4, dtype=torch.float64))
