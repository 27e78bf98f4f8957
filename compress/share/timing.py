"""What layers that share save while tokens are written, measured: the model against itself, the sides taking turns."""

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.kv.attention import NAME
from compress.plan import AttentionPlan, Share, Source
from compress.plan_writer import PlanWriter
from compress.runtime.plan_cache import PlanCache
from compress.share.trial import Fitted, Trial

TURNS = 12
TOKENS = 3  # a turn, of which the first isn't counted: it finds the processor's caches filled with the other side


@torch.no_grad()
def decode_times(
    trial: Trial, shares: Mapping[int, Share], fitted: Mapping[int, Fitted], length: int
) -> dict[str, Any]:
    """Time a token, with caches of random states, which it doesn't depend on.

    Args:
        trial: of the dense model, not at work; it is left dense.
        shares: by layer.
        fitted: projections of these layers.
        length: tokens that the caches hold.

    Returns:
        ``tokens``; milliseconds a token ``dense_ms`` and ``shared_ms``, medians; ``faster``, the median of dense over
        shared times of a turn less one; and bytes of both caches as they are held here, ``dense_bytes`` and
        ``shared_bytes``.
    """
    model = trial.model
    implementation = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    plans = [_plan(model, {}), _plan(model, shares)]
    try:
        caches = [_filled(model, plan, length) for plan in plans]
        turns = []
        for _ in range(TURNS):
            trial.share({})
            dense = _seconds(model, caches[0])
            trial.share(shares, fitted)
            turns.append((dense, _seconds(model, caches[1])))
    finally:
        trial.share({})
        model.set_attn_implementation(implementation)
    dense, shared = (1000 * statistics.median(side) for side in zip(*turns, strict=True))
    return {
        "tokens": length,
        "dense_ms": round(dense, 3),
        "shared_ms": round(shared, 3),
        "faster": round(statistics.median(one / other for one, other in turns) - 1, 4),
        "dense_bytes": caches[0].nbytes().stored,
        "shared_bytes": caches[1].nbytes().stored,
    }


def _plan(model: PreTrainedModel, shares: Mapping[int, Share]) -> AttentionPlan:
    writer = PlanWriter(AttentionPlan.empty(model.config), Source("share"))
    for layer, share in shares.items():
        writer.share(layer, share)
    return writer.finish()


def _filled(model: PreTrainedModel, plan: AttentionPlan, length: int) -> PlanCache:
    """A cache of random states; layers with sliding windows have theirs, as every other."""
    mark, cache = plan.fingerprint, PlanCache(model.config, plan)
    generator = torch.Generator().manual_seed(0)
    for index, layer in enumerate(plan.layers):
        mode = None if layer.share is None else layer.share.mode
        if mode != "kv":
            states = [torch.randn(1, mark.kv_heads, length, mark.head_dim, generator=generator) for _ in "kv"]
            keys, values = (part.to(model.device, model.dtype) for part in states)
            cache.update(keys[..., : layer.share.rank] if layer.share is not None else keys, values, index)
    return cache


def _seconds(model: PreTrainedModel, cache: PlanCache) -> float:
    """Of a token, on average."""
    token: Tensor = torch.full((1, 1), 1, device=model.device)
    begun = 0.0
    for index in range(TOKENS):
        if index == 1:
            begun = time.perf_counter()
        model(token, past_key_values=cache)
    return (time.perf_counter() - begun) / (TOKENS - 1)
