"""Standard errors, and paired tests of two models on the same items.

Two models that are asked the same questions are mostly right and wrong on the same ones. A paired test looks only at
the items on which they differ, and so finds differences that lie well within the standard errors of the two figures.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MCNEMAR = "exact McNemar"
PAIRED_T = "paired t"
PAIRED_T_LOG = "paired t on the logarithm"
SIGN = "sign test"

STARS = ((0.001, "***"), (0.01, "**"), (0.05, "*"))
EXPLANATION = (
    "p: how likely so large a difference would be by chance if the models were equal, paired over the same items (exact"
    " McNemar test for right or wrong, else a paired t-test); * p < 0.05, ** p < 0.01, *** p < 0.001, each row for"
    " itself."
)
"""What p and the stars mean, in one line."""


@dataclass(frozen=True)
class Paired:
    """Two models on the same items.

    Attributes:
        test: ``MCNEMAR`` where every item is 0 or 1, otherwise ``PAIRED_T``, or ``PAIRED_T_LOG`` where the items are
            logarithms of the figure; ``SIGN`` where all items changed by the same, so that t has no spread to go by.
        n: number of items.
        difference: mean of after - before over the items.
        stderr: standard error of ``difference``; None for a single item.
        p_value: two-sided; None for a single item.
        improved: items on which the second model is better; None where nobody says which way is up.
        worsened: items on which it is worse; None likewise.
        changed: items on which the two differ.
    """

    test: str
    n: int
    difference: float
    stderr: float | None
    p_value: float | None
    improved: int | None
    worsened: int | None
    changed: int

    @property
    def stars(self) -> str:
        """``***`` below 0.001, ``**`` below 0.01, ``*`` below 0.05, otherwise nothing."""
        if self.p_value is None:
            return ""
        return next((stars for bound, stars in STARS if self.p_value < bound), "")


def mean_and_error(values: Sequence[float], weights: Sequence[float] | None = None) -> tuple[float, float | None]:
    """Mean and its standard error, taking the values as independent draws.

    Args:
        values: one an item, ``[n]``.
        weights: weight of each item ``[n]``, e.g. the tokens that a mean loss is over; None for equal weights.

    Returns:
        The mean ``sum(w v) / sum(w)``, and the error ``sqrt(n / (n - 1) sum((w (v - mean))^2)) / sum(w)`` of such a
        ratio, which is ``std / sqrt(n)`` for equal weights; None for a single item.
    """
    value = np.asarray(values, dtype=np.float64)
    weight = np.ones_like(value) if weights is None else np.asarray(weights, dtype=np.float64)
    mean = float(weight @ value / weight.sum())
    count = len(value)
    if count < 2:
        return mean, None
    spread = float(np.square(weight * (value - mean)).sum())
    return mean, math.sqrt(count / (count - 1) * spread) / float(weight.sum())


def paired(
    before: Sequence[float],
    after: Sequence[float],
    *,
    higher_is_better: bool | None = True,
    log: bool = False,
    weights: Sequence[float] | None = None,
) -> Paired | None:
    """Test whether two models differ on the same items.

    Args:
        before: the baseline's items ``[n]``: 0 or 1 for wrong or right, or any numbers.
        after: the other model's, in the same order.
        higher_is_better: which way is up; None where that isn't known, which the test doesn't depend on.
        log: the items are logarithms of the figure, as losses are of perplexity; only named in the result.
        weights: as in :func:`mean_and_error`.

    Returns:
        The result; None without items, or where an item isn't finite.

    Raises:
        ValueError: the two have different numbers of items.
    """
    first, second = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} items can't be paired")
    change = second - first
    if not len(change) or not np.isfinite(change).all():
        return None
    difference, stderr = mean_and_error(change.tolist(), weights)
    up, down = int((change > 0).sum()), int((change < 0).sum())
    if weights is None and bool(np.isin(np.concatenate([first, second]), (0.0, 1.0)).all()):
        test, p_value = MCNEMAR, _mcnemar(up, down)
    elif stderr == 0.0:  # every item changed by the same: its sign is all that is known
        test, p_value = SIGN, _mcnemar(up, down)
    else:
        test, p_value = PAIRED_T_LOG if log else PAIRED_T, _t_test(difference, stderr, len(change))
    improved, worsened = {True: (up, down), False: (down, up), None: (None, None)}[higher_is_better]
    return Paired(test, len(change), difference, stderr, p_value, improved, worsened, up + down)


def _mcnemar(up: int, down: int) -> float | None:
    """Two-sided p-value: of ``up + down`` changes, each way is equally likely if the models are equal."""
    from scipy.special import bdtr  # half a second, which a plan or an evaluation of one model shouldn't wait

    return min(1.0, 2 * float(bdtr(min(up, down), up + down, 0.5)))


def _t_test(difference: float, stderr: float | None, count: int) -> float | None:
    """Two-sided p-value of Student's t with ``count - 1`` degrees of freedom."""
    from scipy.special import stdtr

    if stderr is None:
        return None
    return 2 * float(stdtr(count - 1, -abs(difference) / stderr))
