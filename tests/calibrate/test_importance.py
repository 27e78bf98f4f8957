"""Token importance against naive definitions."""

import math
from typing import Any

import pytest
import torch
from compress.calibrate import importance
from compress.calibrate.importance import Spread, attention_concentration, weights
from compress.kernels.attention_mass.cpu import QUERY_BLOCK
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def queries_and_keys(heads: int, kv_heads: int, length: int, width: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    return tuple(2 * torch.randn(n, length, width, generator=generator) for n in (heads, kv_heads))  # type: ignore[return-value]


def column_sums(q: Tensor, k: Tensor, scaling: float, window: int | None) -> Tensor:
    """Sums over heads and queries of the whole ``[heads, T, T]`` softmax, in float64."""
    heads, length, _ = q.shape
    keys = k.double().repeat_interleave(heads // len(k), dim=0)
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
    scores = (q.double() @ keys.transpose(1, 2) * scaling).masked_fill(hidden, -math.inf)
    return scores.softmax(-1).sum((0, 1)).float()


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("window", [None, 1, 5, 16, 100])
@pytest.mark.parametrize("length", [1, 45, 128, 300])
def test_attention_concentration_is_the_naive_sum(heads: int, kv_heads: int, window: int | None, length: int) -> None:
    q, k = queries_and_keys(heads, kv_heads, length)
    found = attention_concentration(q, k, scaling=0.35, window=window)
    torch.testing.assert_close(found, column_sums(q, k, 0.35, window), rtol=1e-5, atol=1e-5)
    assert float(found.sum()) == pytest.approx(heads * length, rel=1e-5)


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else (result,):
            if isinstance(item, Tensor):
                self.numel = max(self.numel, item.numel())
        return result


@pytest.mark.parametrize(("window", "keys"), [(None, 4096), (64, 64 + QUERY_BLOCK)])
def test_attention_concentration_never_holds_all_probabilities(window: int | None, keys: int) -> None:
    length, heads, kv_heads = 4096, 4, 2
    q, k = queries_and_keys(heads, kv_heads, length, width=4)
    with Largest() as largest:
        found = attention_concentration(q, k, scaling=0.5, window=window)
    assert largest.numel <= max(q.numel(), heads // kv_heads * QUERY_BLOCK * keys)
    assert float(found.double().sum()) == pytest.approx(heads * length, rel=1e-4)


def test_strategies_by_their_definitions() -> None:
    x, y = torch.randn(2, 12, 6, generator=torch.Generator().manual_seed(0)).unbind(0)
    torch.testing.assert_close(importance.act_norm(x), x.square().sum(-1).sqrt())
    torch.testing.assert_close(importance.act_diff(x, y), -torch.linalg.norm(x - y, dim=-1))
    squared = torch.cdist(x.double(), x.double()).square().mean(1)
    torch.testing.assert_close(importance.token_sim(x), squared.float(), rtol=1e-5, atol=1e-5)
    counts = torch.bincount(torch.tensor([3, 3, 3, 1]), minlength=5)
    assert importance.token_freq(torch.tensor([1, 3, 0]), counts).tolist() == [-1.0, -3.0, 0.0]


@pytest.mark.parametrize(("length", "first", "edge"), [(4096, 512, 128), (64, 8, 2), (20, 2, 1), (2, 1, 1), (1, 1, 1)])
def test_positional_strategies(length: int, first: int, edge: int) -> None:
    ones = importance.first_n(length)
    assert ones.tolist() == [1.0] * first + [0.0] * (length - first)
    both = importance.first_last_n(length)
    assert both[:edge].tolist() == both[-edge:].tolist() == [1.0] * edge
    assert float(both.sum()) == min(2 * edge, length)


def test_token_sim_makes_nothing_of_size_t_squared() -> None:
    with Largest() as largest:
        importance.token_sim(torch.randn(2048, 8))
    assert largest.numel <= 2048 * 8


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("low", "high"), [(0.005, 1.0), (0.1, 3.0), (0.0, 1.0)])
def test_weights_are_the_formula(power: float, low: float, high: float) -> None:
    raw = torch.tensor([5.0, -3.0, 0.0, 1.0, 2.5])
    found = weights(raw, Spread(low, high, power))
    r = (raw + 3) / 8 * (high - low) + low
    torch.testing.assert_close(found, r**power / (r**power).mean())
    assert float(found.mean()) == pytest.approx(1.0, abs=1e-6)
    assert float(found.min() / found.max()) == pytest.approx((low / high) ** power, abs=1e-6)
    assert found.argsort().tolist() == raw.argsort().tolist()


@pytest.mark.parametrize(
    "raw", [[2.5] * 4, [0.0] * 4, [7.0], [1.0, float("nan"), 2.0], [1.0, float("inf")], [-float("inf"), 0.0]]
)
def test_scores_that_say_nothing_give_exactly_one(raw: list[float]) -> None:
    assert torch.equal(weights(torch.tensor(raw), Spread(power=2.0)), torch.ones(len(raw)))
