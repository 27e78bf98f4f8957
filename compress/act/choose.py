"""Which heads gain by weaker sinks: those whose slopes are above zero, over questions, by a paired t-test.

Of many heads some pass a test by chance; the share of these among the chosen is held below a level as Benjamini and
Hochberg (1995) do it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chosen:
    """Heads in the order of their p-values.

    Attributes:
        heads: layers and KV heads.
        t: of the mean slope of every head, [layers, KV heads]; 0 where it wasn't looked at.
        p: one-sided, that the mean isn't above zero, alike; 1 where it wasn't looked at.
    """

    heads: tuple[tuple[int, int], ...]
    t: Tensor
    p: Tensor


def choose(slopes: Tensor, candidates: Sequence[tuple[int, int]], level: float) -> Chosen:
    """Heads whose mean slope by beta is above zero, so that less of beta is less of the loss.

    Args:
        slopes: of every question, [questions, layers, KV heads]; at least two questions.
        candidates: layers and KV heads that may be chosen; those whose slopes are all zero have no sinks.
        level: the largest expected share of chosen heads that don't gain.
    """
    from scipy.special import stdtr  # half a second, which a plan shouldn't wait

    values, count = slopes.double(), len(slopes)
    mean, error = values.mean(0), values.std(0) / math.sqrt(count)
    looked = torch.zeros_like(mean, dtype=torch.bool)
    for layer, head in candidates:
        looked[layer, head] = bool(values[:, layer, head].any())
    t = torch.where(looked, mean / error.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    p = torch.where(looked, torch.as_tensor(stdtr(count - 1, -t.numpy())), 1.0)
    order = sorted((float(p[pair]), pair) for pair in candidates if looked[pair])
    passed = [rank for rank, (own, _) in enumerate(order, 1) if own <= level * rank / len(order)]
    return Chosen(tuple(pair for _, pair in order[: max(passed, default=0)]), t, p)
