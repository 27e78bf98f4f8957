"""Plans that MoA's programme has to beat on prompts that weren't profiled: one window for all, and streaming heads.

Both keep to the same budget at every constrained length. Since the plan with the least loss is taken, MoA never does
worse on these prompts than they do.
"""

from collections.abc import Iterator

import numpy as np

from compress.heads.solve import SLACK, Choice, Floats, Problem, chosen

ALL, SOME = "one rule for all heads", "full and streaming heads"


def simple_plans(problem: Problem, full: int, stream: int) -> Iterator[Choice]:
    """Those that the problem allows.

    Args:
        problem: of the programme.
        full: number of the rule that keeps everything.
        stream: number of that of a streaming head.
    """
    units = np.maximum(problem.costs.sum((1, 2)).max(-1), np.finfo(float).tiny)
    costs = (problem.costs / units[:, None, None, None]).sum(0)  # [layers, KV heads, rules], lengths count alike
    for name, found in ((ALL, _one(problem, costs)), (SOME, _streaming(problem, costs, full, stream))):
        if found is not None and _fits(problem, found):
            yield chosen(problem, found, name)


def _one(problem: Problem, costs: Floats) -> "np.ndarray | None":
    """The cheapest rule of those that all heads may have."""
    layers, heads, rules = costs.shape
    fitting = [rule for rule in range(rules) if _fits(problem, np.full((layers, heads), rule))]
    if not fitting:
        return None
    return np.full((layers, heads), min(fitting, key=lambda rule: float(costs[..., rule].sum())))


def _streaming(problem: Problem, costs: Floats, full: int, stream: int) -> "np.ndarray | None":
    """As many heads as fit keep everything: first those that have to, then those that streaming costs most."""
    if problem.rules == 1:
        return None
    layers, heads, _ = costs.shape
    needed = costs[..., stream] - costs[..., full]
    if problem.allowed is not None:
        needed = np.where(problem.allowed[..., stream], needed, np.inf)
    order = np.argsort(-needed, axis=None, kind="stable")
    low, high = 0, layers * heads

    def keeping(count: int) -> "np.ndarray":
        found = np.full(layers * heads, stream)
        found[order[:count]] = full
        return found.reshape(layers, heads)

    if not _fits(problem, keeping(0), forced=False):
        return None
    while low < high:  # low heads fit
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _fits(problem, keeping(middle), forced=False) else (low, middle - 1)
    return keeping(low)


def _fits(problem: Problem, rules: "np.ndarray", forced: bool = True) -> bool:
    """Whether a rule for every head, [layers, KV heads], is within the limit everywhere, and allowed."""
    density = np.take_along_axis(problem.densities, rules[None], -1).mean((1, 2))
    within = bool((density <= problem.limit + SLACK).all())
    if problem.allowed is None or not forced:
        return within
    return within and bool(np.take_along_axis(problem.allowed, rules[..., None], -1).all())
