"""Plans that MoA's programme is compared with: within the same budget, and the best of their kind."""

from itertools import combinations, product

import numpy as np
import pytest

from compress.heads.simple_plans import ALL, SOME, simple_plans
from compress.heads.solve import Choice, Problem

FULL, STREAM = 0, 1
DENSITIES = np.array([[1.0, 0.1, 0.5, 0.6, 0.4], [1.0, 0.05, 0.5, 0.5, 0.55]])[:, None]  # of rules, at two lengths


def problem(seed: int = 0, **changes: object) -> Problem:
    draw = np.random.default_rng(seed)
    costs = draw.lognormal(0, 2, (2, 3, 2, 1)) * (1 - DENSITIES[:, :, None]) ** 2
    return Problem(**{"costs": costs, "densities": DENSITIES, "limit": 0.5, **changes})  # type: ignore[arg-type]


def found(of: Problem) -> dict[str, Choice]:
    return {choice.name: choice for choice in simple_plans(of, FULL, STREAM)}


def cost(of: Problem, rules: np.ndarray) -> float:
    units = of.costs.sum((1, 2)).max(-1)
    return float((np.take_along_axis(of.costs, rules[None, ..., None], -1).sum((1, 2, 3)) / units).sum())


@pytest.mark.parametrize("seed", range(4))
def test_one_rule_is_the_cheapest_that_all_heads_may_have(seed: int) -> None:
    of = problem(seed)
    rules = np.array(found(of)[ALL].rules)
    assert (rules == rules[0, 0]).all()
    within = [rule for rule in range(5) if DENSITIES[:, 0, rule].max() <= 0.5]
    assert within == [1, 2]  # 3 and 4 exceed it at one length each
    assert cost(of, rules) == min(cost(of, np.full((3, 2), rule)) for rule in within)


@pytest.mark.parametrize("seed", range(4))
def test_the_heads_that_streaming_costs_most_keep_everything(seed: int) -> None:
    """As many as fit at both lengths: 2 of 6, since 3 would be 0.55 of the cache at the first."""
    of = problem(seed)
    choice = found(of)[SOME]
    rules = np.array(choice.rules)
    assert set(rules.flatten()) == {FULL, STREAM}
    assert (rules == FULL).sum() == 2
    assert max(choice.densities) <= 0.5
    best = min(
        cost(of, np.where(np.isin(np.arange(6), kept), FULL, STREAM).reshape(3, 2))
        for kept in combinations(range(6), 2)
    )
    assert cost(of, rules) == pytest.approx(best)


def test_forced_heads_keep_everything_and_leave_no_single_rule() -> None:
    allowed = np.ones((3, 2, 5), bool)
    allowed[2, 1, 1:] = False
    choices = found(problem(allowed=allowed))
    assert list(choices) == [SOME]
    assert choices[SOME].rules[2][1] == FULL
    allowed[:, :, 1:] = False
    assert not found(problem(allowed=allowed))


def test_one_rule_a_layer_leaves_no_mixture() -> None:
    assert list(found(problem(rules=1))) == [ALL]


def test_a_budget_below_streaming_heads_leaves_none() -> None:
    assert not found(problem(limit=0.01))


def test_costs_and_densities_are_those_of_its_rules() -> None:
    of = problem(3)
    for choice, length in product(found(of).values(), range(2)):
        places = [(layer, head, rule) for layer, row in enumerate(choice.rules) for head, rule in enumerate(row)]
        assert choice.costs[length] == pytest.approx(sum(of.costs[(length, *place)] for place in places))
        assert choice.densities[length] == pytest.approx(np.mean([DENSITIES[length, 0, rule] for *_, rule in places]))
