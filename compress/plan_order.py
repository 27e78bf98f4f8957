"""The order of a layer's KV heads: those that are told the same lie side by side, so that none has to be gathered.

Files keep the checkpoint's order, in the weights as in the plan; ``perm`` is the order at load.
"""

from collections.abc import Mapping
from dataclasses import replace

from compress.plan import AttentionPlan, Layer

PERMUTED = "compress_heads_permuted"
"""Key of a model's config: its heads are in the order of its plan's ``perm``."""


def cluster_order(layer: Layer) -> tuple[int, ...]:
    """The KV heads of a layer with those side by side that are told the same, the ones that keep everything first."""
    alike = list(dict.fromkeys(layer.heads))
    first = sorted(alike, key=lambda head: not head.window.full or head.stride is not None)
    return tuple(number for rule in first for number, head in enumerate(layer.heads) if head == rule)


def as_loaded(plan: AttentionPlan) -> AttentionPlan:
    """The plan with its heads in the order in which they are loaded, and no ``perm`` any more."""
    return replace(
        plan,
        layers=tuple(
            layer
            if layer.perm is None
            else replace(layer, heads=tuple(layer.heads[head] for head in layer.perm), perm=None)
            for layer in plan.layers
        ),
    )


def side_by_side(plan: AttentionPlan, group_sizes: Mapping[int, int], columns: int) -> AttentionPlan:
    """The plan with an order for every layer whose heads are told different things.

    Args:
        plan: as the methods have written it.
        group_sizes: columns of o_proj that share a scale, of the layers where it is packed; in a layer whose groups
            hold channels of several KV heads these stay where they are.
        columns: of o_proj.
    """
    each = columns // plan.fingerprint.kv_heads
    layers = list(plan.layers)
    for index, layer in enumerate(layers):
        order, size = cluster_order(layer), group_sizes.get(index, 1)
        if order != tuple(range(len(order))) and (size == columns or each % size == 0):
            layers[index] = replace(layer, perm=order)
    return replace(plan, layers=tuple(layers))
