"""Standard errors and paired tests, against scipy and against tables."""

import math

import numpy as np
import pytest
from compress.evalsuite.statistics import MCNEMAR, PAIRED_T, PAIRED_T_LOG, SIGN, Paired, mean_and_error, paired
from scipy import stats


def answers(both: int, only_before: int, only_after: int, neither: int) -> tuple[list[float], list[float]]:
    """Items by who answered them rightly."""
    before = [1.0] * (both + only_before) + [0.0] * (only_after + neither)
    after = [1.0] * both + [0.0] * only_before + [1.0] * only_after + [0.0] * neither
    return before, after


@pytest.mark.parametrize("table", [(50, 3, 12, 35), (10, 9, 0, 1), (400, 30, 31, 109), (5, 1, 0, 0)])
def test_right_or_wrong_is_mcnemars_exact_test(table):
    before, after = answers(*table)
    found = paired(before, after)
    assert found.test == MCNEMAR
    assert (found.n, found.improved, found.worsened) == (sum(table), table[2], table[1])
    assert found.p_value == pytest.approx(stats.binomtest(table[1], table[1] + table[2], 0.5).pvalue)
    assert found.difference == pytest.approx((table[2] - table[1]) / sum(table))
    # Of a difference of two paired proportions: sqrt(b + c - (b - c)^2 / n) / n, but for n - 1.
    b, c, n = table[1], table[2], sum(table)
    assert found.stderr == pytest.approx(math.sqrt((b + c - (b - c) ** 2 / n) / (n - 1) / n))


def test_a_table_of_the_literature():
    # Sign test: 10 of 12 changes one way, two-sided p = 2 * (1 + 12 + 66) / 4096.
    assert paired(*answers(0, 2, 10, 0)).p_value == pytest.approx(2 * 79 / 4096)


def test_no_change_at_all():
    found = paired([1, 0, 1], [1, 0, 1])
    assert (found.p_value, found.difference, found.improved, found.worsened, found.stars) == (1.0, 0.0, 0, 0, "")
    assert paired([0.3, 0.2], [0.3, 0.2]).p_value == 1.0


def test_numbers_are_a_paired_t_test():
    generator = np.random.default_rng(0)
    before = generator.normal(size=24)
    after = before + generator.normal(0.1, 0.2, size=24)
    found = paired(before, after, higher_is_better=False, log=True)
    expected = stats.ttest_rel(after, before)
    assert found.test == PAIRED_T_LOG
    assert found.p_value == pytest.approx(expected.pvalue)
    assert found.difference / found.stderr == pytest.approx(expected.statistic)
    assert (found.improved, found.worsened) == (int((after < before).sum()), int((after > before).sum()))
    assert found.p_value < 0.5 * stats.ttest_ind(after, before).pvalue  # what pairing is for


def test_windows_of_different_sizes_count_by_their_tokens():
    before, after, weights = [2.0, 3.0, 4.0], [2.5, 3.1, 4.4], [1023, 512, 512]
    found = paired(before, after, weights=weights)
    change = np.subtract(after, before)
    mean = np.average(change, weights=weights)
    error = math.sqrt(3 / 2 * (np.multiply(weights, change - mean) ** 2).sum()) / sum(weights)
    assert (found.difference, found.stderr) == (pytest.approx(mean), pytest.approx(error))
    assert found.p_value == pytest.approx(2 * stats.t.sf(mean / error, 2))
    assert found.p_value != pytest.approx(paired(before, after).p_value)


def test_mean_and_error():
    values = [0.2, 0.5, 0.9, 0.1]
    mean, error = mean_and_error(values)
    assert mean == pytest.approx(np.mean(values))
    assert error == pytest.approx(stats.sem(values))
    assert mean_and_error(values, [3, 3, 3, 3]) == (pytest.approx(mean), pytest.approx(error))
    assert mean_and_error([1.0, 4.0], [3, 1])[0] == pytest.approx(7 / 4)
    assert mean_and_error([2.5]) == (2.5, None)


def test_what_cannot_be_tested():
    assert paired([], []) is None
    assert paired([1.0, math.nan], [1.0, 2.0]) is None
    assert paired([1.0, 2.0], [math.inf, 2.0]) is None
    alone = paired([2.0], [2.5])
    assert (alone.test, alone.stderr, alone.p_value, alone.stars) == (PAIRED_T, None, None, "")
    with pytest.raises(ValueError, match="2 and 1 items"):
        paired([1, 2], [1])


def test_the_same_change_every_time_is_a_sign_test():
    found = paired([2.0, 3.0, 4.0, 5.0, 6.0, 7.0], [2.5, 3.5, 4.5, 5.5, 6.5, 7.5], higher_is_better=False)
    assert (found.test, found.stderr, found.improved, found.worsened) == (SIGN, 0.0, 0, 6)
    assert found.p_value == pytest.approx(2 / 2**6)


@pytest.mark.parametrize(
    ("p_value", "stars"),
    [(None, ""), (0.05, ""), (0.049, "*"), (0.01, "*"), (0.0099, "**"), (0.001, "**"), (0.0009, "***"), (0.0, "***")],
)
def test_stars(p_value, stars):
    assert Paired(PAIRED_T, 9, 0.1, 0.01, p_value, 5, 4, 9).stars == stars


@pytest.mark.parametrize(("way", "improved", "worsened"), [(True, 2, 1), (False, 1, 2), (None, None, None)])
def test_what_is_better_where_nobody_says_which_way_is_up(way, improved, worsened):
    found = paired([1, 0, 0, 1], [0, 1, 1, 1], higher_is_better=way)
    assert (found.improved, found.worsened, found.changed) == (improved, worsened, 3)
    assert found.p_value == pytest.approx(stats.binomtest(1, 3, 0.5).pvalue)
