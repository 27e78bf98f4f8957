"""MoA's programme against all choices that there are, and what it refuses."""

from itertools import product

import numpy as np
import pytest
from compress.calibrate.errors import InputError

from compress.heads.solve import GAP, Problem, candidates, solve

DENSITIES = np.array([[0.1, 0.3, 0.5, 0.7, 1.0], [0.05, 0.3, 0.3, 0.75, 1.0]])[:, None]  # alike in all layers


def problem(layers: int = 2, heads: int = 2, seed: int = 0, **changes: object) -> Problem:
    """Costs that fall as more is kept, heads with different needs; two lengths."""
    draw = np.random.default_rng(seed)
    costs = draw.lognormal(0, 2, (2, layers, heads, 1)) * (1 - DENSITIES[:, :, None]) ** 2
    return Problem(**{"costs": costs, "densities": DENSITIES, "limit": 0.5, "least": 0.8, "rules": None, **changes})  # type: ignore[arg-type]


def all_choices(of: Problem) -> list[np.ndarray]:
    """Every choice that keeps to the limits, [layers, heads] each."""
    _, layers, heads, rules = of.costs.shape
    found = []
    for picked in product(range(rules), repeat=layers * heads):
        chosen = np.array(picked).reshape(layers, heads)
        density = np.take_along_axis(of.densities, chosen[None], -1).mean((1, 2))
        few = of.rules is None or max(len(set(layer)) for layer in chosen.tolist()) <= of.rules
        allowed = of.allowed is None or np.take_along_axis(of.allowed, chosen[..., None], -1).all()
        if few and allowed and (density <= of.limit + 1e-9).all() and (density >= of.least * of.limit - 1e-9).all():
            found.append(chosen)
    return found


def costs_of(of: Problem, chosen: np.ndarray) -> np.ndarray:
    return np.take_along_axis(of.costs, chosen[None, ..., None], -1).sum((1, 2, 3))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("layers", "heads", "rules"), [(2, 2, None), (1, 4, 2), (1, 4, 1), (2, 2, 1)])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.3, 2.0)])
def test_no_choice_is_cheaper(
    layers: int, heads: int, rules: int | None, weights: tuple[float, float], seed: int
) -> None:
    of = problem(layers, heads, seed, rules=rules, least=0.3, limit=0.6)
    possible = all_choices(of)
    assert len(possible) > 1
    found = solve(of, np.array(weights))
    assert any((np.array(found.rules) == chosen).all() for chosen in possible)
    best = min(float(costs_of(of, chosen) @ weights) for chosen in possible)
    assert np.dot(found.costs, weights) == pytest.approx(best, rel=GAP)
    assert np.allclose(found.costs, costs_of(of, np.array(found.rules)))
    assert np.allclose(found.densities, of.densities[:, 0, np.array(found.rules)].mean((1, 2)))


def test_layers_may_have_densities_of_their_own() -> None:
    """The same rules keep less in one layer than in the other."""
    own = np.concatenate([DENSITIES, DENSITIES * 0.8], 1)
    of = problem(densities=own, rules=2)
    found = solve(of, np.ones(2))
    best = min(all_choices(of), key=lambda chosen: float(costs_of(of, chosen).sum()))
    assert sum(found.costs) == pytest.approx(float(costs_of(of, best).sum()), rel=GAP)
    for length in range(2):
        kept = [own[length, layer, rule] for layer in range(2) for rule in found.rules[layer]]
        assert found.densities[length] == pytest.approx(np.mean(kept))
    assert found.rules != solve(problem(rules=2), np.ones(2)).rules


@pytest.mark.parametrize("seed", range(4))
def test_the_largest_cost_is_as_small_as_it_can_be(seed: int) -> None:
    of, weights = problem(seed=seed, rules=2), np.array([1.0, 3.0])
    best = min(float((costs_of(of, chosen) * weights).max()) for chosen in all_choices(of))
    found = solve(of, weights, largest=True)
    assert (np.array(found.costs) * weights).max() == pytest.approx(best, rel=GAP)


def test_heads_may_be_forced() -> None:
    allowed = np.ones((2, 2, 5), bool)
    allowed[1, 0, :4] = False
    of = problem(allowed=allowed)
    found = solve(of, np.ones(2))
    assert found.rules[1][0] == 4
    best = min(float(costs_of(of, chosen).sum()) for chosen in all_choices(of))
    assert sum(found.costs) == pytest.approx(best, rel=GAP)


def test_candidates_are_the_best_of_their_kind_and_come_once() -> None:
    of = problem(3, 2, seed=5)
    found = candidates(of, ["1024", "2048"])
    assert len({choice.rules for choice in found}) == len(found)
    first = {choice.name: choice for choice in found}
    possible = [costs_of(of, chosen) for chosen in all_choices(of)]
    least = np.min(possible, 0)
    for n, name in enumerate(("1024", "2048")):
        assert min(choice.costs[n] for choice in found) == pytest.approx(least[n], rel=GAP), name
    assert found[0].name == "sum"
    assert np.sum(first["sum"].costs / least) == pytest.approx(
        min(np.sum(costs / least) for costs in possible), rel=GAP
    )
    most = min(np.max(np.array(choice.costs) / least) for choice in found)
    assert most == pytest.approx(min(np.max(costs / least) for costs in possible), rel=2 * GAP)


def test_a_length_that_costs_nothing_is_no_division_by_zero() -> None:
    of = problem()
    of.costs[0] = 0
    assert all(np.isfinite(choice.costs).all() for choice in candidates(of, ["a", "b"]))


@pytest.mark.parametrize(
    ("limit", "densities", "nearest"), [(0.01, [[0.1, 0.5], [0.095, 0.5]], 0.1), (0.4, [[0.1, 0.5]], 0.5)]
)
def test_a_limit_that_cannot_be_met_names_the_nearest(limit: float, densities: object, nearest: float) -> None:
    """Less than 0.1 there is not; with one rule for all there is nothing between 0.1 and 0.5 either."""
    table = np.array(densities)[:, None]
    of = problem(costs=np.ones((1, 1, 2, table.shape[-1])), densities=table, limit=limit, least=0.9, rules=1)
    with pytest.raises(InputError, match=f"heads.retention={limit}: .*nearest that can be met is {nearest}$"):
        solve(of, np.ones(1))
    assert solve(problem(costs=of.costs, densities=table, limit=nearest, least=0.9, rules=1), np.ones(1))


def test_time_that_is_too_short_is_told() -> None:
    of = problem(32, 8, rules=2, seconds=0.0)
    with pytest.raises(InputError, match=r"heads\.rules=2: no plan was found within 0 s"):
        solve(of, np.ones(2))
