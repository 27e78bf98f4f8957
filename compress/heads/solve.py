"""MoA's programme (arXiv 2406.14909, section 4.2): a rule for every KV head, at the least predicted change of the loss.

With binary x[l, k, r], one of them for every head, a rule costs Z[n, l, k, r] at length n, and the density of the cache
keeps to a budget at every constrained length m:

    least * limit <= mean over heads of density[m, l, r] <= limit

A layer has at most so many different rules: y[l, r] >= x[l, k, r], and the sum of y[l] is bounded. Several lengths are
several aims. In place of the published grid there are a few candidates, to be compared by what they do to the model:
the sum over lengths, each in units of the least that it can be, every length alone, and the largest of those made as
small as it can be. HiGHS solves all of them, through scipy.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import block_array, csr_array, eye_array, kron

from compress.calibrate.errors import InputError

GAP = 1e-3  # relative, between what is found and what is possible
SECONDS = 60.0  # for a single programme
SLACK = 1e-9  # by which the sum of many densities may miss a limit that it meets
INFEASIBLE = 2  # scipy's status

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Problem:
    """What is to be chosen.

    Attributes:
        costs: of the rules by length, [lengths, layers, KV heads, rules], none below 0.
        densities: of the cache if every head had a layer's rule, by constrained length, [constraints, layers, rules];
            one layer for all of them is enough.
        limit: of the mean density.
        least: share of the limit that is used at every constrained length.
        rules: different ones a layer, at most; None for any number.
        allowed: the rules that a head may have, [layers, KV heads, rules]; None for all.
        whole: False lets a head have shares of rules: what many heads together can be.
        seconds: for a single programme.
    """

    costs: Floats
    densities: Floats
    limit: float
    least: float = 0.9
    rules: int | None = 3
    allowed: NDArray[np.bool_] | None = None
    whole: bool = True
    seconds: float = field(default=SECONDS, compare=False)


@dataclass(frozen=True)
class Choice:
    """A rule for every head.

    Attributes:
        name: what it is the best for.
        rules: [layers][KV heads], numbers of rules.
        costs: sums over heads, by length.
        densities: means over heads, by constrained length.
        gap: relative, to the least that may be possible; above 1e-3 where time ran out.
    """

    name: str
    rules: tuple[tuple[int, ...], ...]
    costs: tuple[float, ...]
    densities: tuple[float, ...]
    gap: float = 0.0


def candidates(problem: Problem, names: Sequence[str]) -> list[Choice]:
    """The choices to compare on the model, each once.

    Args:
        problem: see there.
        names: of the lengths of its costs.

    Returns:
        Of several lengths their sum first, then each alone, then min-max.

    Raises:
        InputError: as :func:`solve`.
    """
    count = len(names)
    alone = [solve(problem, np.eye(count)[n], name) for n, name in enumerate(names)]
    if count == 1:
        return alone
    best = np.array([choice.costs[n] for n, choice in enumerate(alone)])
    # where a length can have no cost at all, its units are those of the mean rule
    weights = 1 / np.where(best > 0, best, np.maximum(problem.costs.sum((1, 2)).mean(-1), np.finfo(float).tiny))
    found = [solve(problem, weights, "sum"), *alone, solve(problem, weights, "min-max", largest=True)]
    unique: dict[tuple[tuple[int, ...], ...], Choice] = {}
    for choice in found:
        unique.setdefault(choice.rules, choice)
    return list(unique.values())


def solve(problem: Problem, weights: Floats, name: str = "", largest: bool = False) -> Choice:
    """The cheapest choice.

    Args:
        problem: see there.
        weights: of the lengths' costs, [lengths].
        name: of the choice.
        largest: minimise the largest weighted cost of a length instead of their sum.

    Raises:
        InputError: no choice keeps to the limit, and the nearest limit that one keeps to; or none was found in time.
    """
    shape = problem.costs.shape[1:]
    costs = problem.costs.reshape(len(weights), -1) * weights[:, None]
    costs = costs / max(float(costs.max()), np.finfo(float).tiny)  # HiGHS' tolerances are absolute
    columns = _Columns(problem, extra=1 if largest else 0)
    rows = _rows(problem, columns)
    if largest:
        rows.append((columns.place(x=costs, extra=-np.ones((len(costs), 1))), -np.inf, 0.0))
        objective = columns.objective(extra=[1.0])
    else:
        objective = columns.objective(x=costs.sum(0))
    found = columns.minimise(objective, rows)
    if found.x is None:
        raise _refusal(problem, found.status)
    return chosen(problem, found.x[: columns.x].reshape(shape).argmax(-1), name, float(found.mip_gap or 0))


def chosen(problem: Problem, rules: NDArray[Any], name: str, gap: float = 0.0) -> Choice:
    """A rule for every head, ``[layers, KV heads]``, with what it costs and keeps."""
    costs = np.take_along_axis(problem.costs, rules[None, ..., None], -1).sum((1, 2, 3))
    densities = np.take_along_axis(problem.densities, rules[None], -1).mean((1, 2))
    told = tuple(tuple(int(rule) for rule in layer) for layer in rules)
    return Choice(name, told, tuple(map(float, costs)), tuple(map(float, densities)), gap)


Row = tuple[csr_array, Any, Any]
"""Rows of a matrix, and what lies below and above their products with the columns."""


class _Columns:
    """The programme's columns: x, then the layers' marks y if rules are limited, then what else there is, from 0 on."""

    def __init__(self, problem: Problem, extra: int) -> None:
        _, layers, heads, rules = problem.costs.shape
        self.problem, self.extra = problem, extra
        self.x = layers * heads * rules
        self.limited = problem.rules is not None and problem.rules < min(heads, rules)
        self.y = layers * rules if self.limited else 0

    def place(self, x: Any = None, y: Any = None, extra: Any = None) -> csr_array:
        """Rows whose other columns are 0."""
        height = next(part.shape[0] for part in (x, y, extra) if part is not None)
        sizes = ((x, self.x), (y, self.y), (extra, self.extra))
        parts = [csr_array((height, size)) if part is None else csr_array(part) for part, size in sizes if size]
        return csr_array(block_array([parts]))

    def objective(self, x: Any = None, extra: Any = None) -> Floats:
        """What is minimised; the marks cost nothing."""
        parts = (
            np.zeros(self.x) if x is None else x,
            np.zeros(self.y),
            np.zeros(self.extra) if extra is None else extra,
        )
        return np.concatenate(parts)

    def minimise(self, objective: Floats, rows: list[Row]) -> Any:
        """What scipy finds."""
        allowed = np.ones(self.x) if self.problem.allowed is None else self.problem.allowed.reshape(-1).astype(float)
        return milp(
            objective,
            integrality=np.repeat([int(self.problem.whole), 0], [self.x + self.y, self.extra]),
            bounds=Bounds(0, np.concatenate([allowed, np.ones(self.y), np.full(self.extra, np.inf)])),
            constraints=[LinearConstraint(*row) for row in rows],
            options={"mip_rel_gap": GAP, "time_limit": self.problem.seconds},
        )


def _rows(problem: Problem, columns: _Columns, shift: bool = False) -> list[Row]:
    """One rule a head, the densities, the rules of a layer.

    Args:
        problem: see there.
        columns: of the programme.
        shift: the first extra column is added to the limit, the second taken from it.
    """
    _, layers, heads, rules = problem.costs.shape
    count = layers * heads
    one = columns.place(x=kron(eye_array(count), np.ones((1, rules))))
    mean = np.broadcast_to(problem.densities[:, :, None] / count, (len(problem.densities), layers, heads, rules))
    mean = mean.reshape(len(mean), -1)
    moved = np.tile([-1.0, 1.0], (len(mean), 1)) if shift else None
    least = None if moved is None else problem.least * moved
    found: list[Row] = [
        (one, 1, 1),
        (columns.place(x=mean, extra=moved), -np.inf, problem.limit + SLACK),
        (columns.place(x=mean, extra=least), problem.least * problem.limit - SLACK, np.inf),
    ]
    if columns.limited:
        owners = kron(kron(eye_array(layers), np.ones((heads, 1))), eye_array(rules))
        found.append((columns.place(x=eye_array(count * rules), y=-owners), -np.inf, 0))
        found.append((columns.place(y=kron(eye_array(layers), np.ones((1, rules)))), -np.inf, problem.rules))
    return found


def _refusal(problem: Problem, status: int) -> InputError:
    """Why there is no choice."""
    if status != INFEASIBLE:
        told = f"no plan was found within {problem.seconds:g} s"
        return InputError("heads.rules", problem.rules, told, fix="allow more rules a layer, or use heads.method=score")
    columns = _Columns(problem, extra=2)
    found = columns.minimise(columns.objective(extra=[1.0, 1.0]), _rows(problem, columns, shift=True))
    told = "no choice of windows keeps to it at all lengths"
    if found.x is None:
        return InputError("heads.retention", problem.limit, told, fix="lower heads.forced")
    up, down = found.x[-2:]
    nearest = math.ceil((problem.limit + up) * 1000) if up > down else math.floor((problem.limit - down) * 1000)
    return InputError("heads.retention", problem.limit, told, fix=f"the nearest that can be met is {nearest / 1000:g}")
