"""From scores to a plan: which KV heads keep every token, so that the cache meets a budget of bytes.

The heads of all layers are ranked together, so that a layer may keep all of its heads, or none. As many keep everything
as the budget holds, counted in the bytes that are stored at a stated length, sinks and windows of the streaming heads
among them. What a threshold of gates or a share of heads would leave open is said in bytes.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from compress.calibrate.errors import InputError
from compress.fingerprint import fingerprint_of
from compress.plan import AttentionPlan, Source
from compress.plan_compile import predict_bytes
from compress.plan_writer import PlanWriter, Rule

Head = tuple[int, int]
"""Layer and KV head."""


@dataclass(frozen=True)
class Budget:
    """How much of a full cache may be stored.

    Attributes:
        retention: share of the bytes at full attention.
        tokens: length at which it holds.
        rule: what a streaming head sees.
    """

    retention: float
    tokens: int
    rule: Rule


@dataclass(frozen=True)
class Ranking:
    """Heads in the order in which they are to keep everything, and what has to be said about it."""

    heads: tuple[Head, ...]
    notes: tuple[str, ...] = ()


def rank(scores: Tensor, full: tuple[int, ...], second: Tensor | None = None, step: float = 0.0) -> Ranking:
    """Order the heads of all layers that attend to everything.

    Args:
        scores: [layers, KV heads], larger for a head that needs far tokens more.
        full: those layers.
        second: decides between equal scores; what is still equal then goes by number of head, then of layer.
        step: scores that differ by less aren't told apart, as those of saturated gates.

    Raises:
        ValueError: a score that isn't finite.
    """
    for name, values in (("scores", scores), ("second scores", second)):
        if values is not None and not torch.isfinite(values[list(full)]).all():
            raise ValueError(f"{name} of heads must be finite")
    heads = [(layer, head) for head in range(scores.shape[1]) for layer in full]
    coarse = (scores.double() / step).round() if step else scores.double()
    notes = []
    if len({float(coarse[head]) for head in heads}) == 1:
        fallback = "heads are ranked by the second score instead"
        if second is None or len({float(second[head]) for head in heads}) == 1:
            fallback = "there is no second score that differs, so heads are taken in the order of their numbers"
        notes.append(f"the scores of all heads are equal: {fallback}")

    def key(head: Head) -> tuple[float, float]:
        return -float(coarse[head]), 0.0 if second is None else -float(second[head])

    return Ranking(tuple(sorted(heads, key=key)), tuple(notes))


def stream(writer: PlanWriter, config: PreTrainedConfig, rule: Rule, keep: tuple[Head, ...]) -> None:
    """Write the rule of every head that doesn't keep everything.

    Args:
        writer: of the plan.
        config: of the model.
        rule: of streaming heads.
        keep: the heads that keep everything.
    """
    mark, kept = fingerprint_of(config), frozenset(keep)
    for layer in sorted(set(range(mark.layers)) - set(mark.sliding)):
        for head in range(mark.kv_heads):
            if (layer, head) not in kept:
                writer.see(layer, head, rule)


def streaming_plan(config: PreTrainedConfig, rule: Rule, keep: tuple[Head, ...]) -> AttentionPlan:
    """A plan of these heads and nothing else; see :func:`stream`."""
    writer = PlanWriter(AttentionPlan.empty(config), Source("heads"))
    stream(writer, config, rule, keep)
    return writer.finish()


def how_many(config: PreTrainedConfig, budget: Budget) -> int:
    """How many heads can keep everything; their order doesn't matter for that.

    Raises:
        InputError: not even a cache of streaming heads alone meets the budget; says what the nearest is.
    """
    mark = fingerprint_of(config)
    heads = [(n, k) for k in range(mark.kv_heads) for n in sorted(set(range(mark.layers)) - set(mark.sliding))]
    limit = budget.retention * dense_bytes(config, budget.tokens)
    if (least := stored_bytes(config, budget, ())) > limit:
        nearest = least / dense_bytes(config, budget.tokens)
        raise InputError(
            "heads.retention",
            budget.retention,
            f"with every head streaming, {nearest:.1%} of the cache is still stored at {budget.tokens:,} tokens",
            allowed=f"from {math.ceil(nearest * 1000) / 1000:g}",
            fix="raise heads.retention or heads.budget_tokens, or lower heads.recent",
        )
    low, high = 0, len(heads)
    while low < high:  # low heads fit
        middle = (low + high + 1) // 2
        fits = stored_bytes(config, budget, tuple(heads[:middle])) <= limit
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def stored_bytes(config: PreTrainedConfig, budget: Budget, keep: tuple[Head, ...]) -> int:
    """Of one sequence's cache at the budget's length where these heads keep everything."""
    plan = streaming_plan(config, budget.rule, keep)
    return predict_bytes(plan, config, budget.tokens).stored


def dense_bytes(config: PreTrainedConfig, tokens: int) -> int:
    """Of one sequence's cache at full attention and 16 bits."""
    return predict_bytes(AttentionPlan.empty(config), config, tokens).stored
