"""KV heads that are told the same, side by side: then the heads of a cluster are a slice, and nothing is gathered.

A layer's output doesn't depend on the order of its heads, as long as the rows of q, k and v and the columns of o follow
it. Files keep the checkpoint's order, in the weights as in the plan; ``perm`` is the order at load (heads.md 1.3).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.calibrate.errors import InputError
from compress.families import FAMILIES
from compress.kernels.quant_linear import from_codes, to_codes
from compress.plan import FILE, AttentionPlan
from compress.plan_order import PERMUTED, as_loaded
from compress.runtime.linear import PackedLinear, StoredLinear

_KNOWN = (nn.Linear, PackedLinear, StoredLinear)


@torch.no_grad()
def permute_heads(model: PreTrainedModel, plan: AttentionPlan) -> AttentionPlan:
    """Put the KV heads of a loaded model, and their groups of query heads, into the plan's order.

    Args:
        model: dense or packed, just loaded; its weights are changed.
        plan: whose ``perm[i]`` is the checkpoint's KV head at place i.

    Returns:
        The plan for the model as it is now (:func:`compress.plan_order.as_loaded`).

    Raises:
        InputError: a layer that can't be permuted exactly; then nothing is.
    """
    family = FAMILIES.get(model.config.model_type)
    todo = {index: layer.perm for index, layer in enumerate(plan.layers) if layer.perm is not None}
    found = {}
    for index in todo:
        block = None if family is None else model.get_submodule(f"{family.layers}.{index}")
        if block is not None and family is not None:
            found[index] = {role: block.get_submodule(family.roles[role]) for role in "qkvo"}
        if index not in found or not _allows(found[index], plan.fingerprint.kv_heads):
            problem = f"layer {index}: the heads of this model can't be put into the plan's order exactly"
            raise InputError(FILE, None, problem, fix="leave perm out of the plan; the heads are gathered then")
    for index, order in todo.items():
        grouped = _places(order, _inputs(found[index]["o"]) // len(order))
        single = _places(order, plan.fingerprint.head_dim)
        for role, rows in (("q", grouped), ("k", single), ("v", single)):
            _take_rows(found[index][role], rows)
        _take_columns(found[index]["o"], grouped, order)
    setattr(model.config.get_text_config(decoder=True), PERMUTED, True)
    return as_loaded(plan)


def _allows(linears: Mapping[str, nn.Module], kv_heads: int) -> bool:
    """Whether the four linear layers of an attention can be permuted."""
    if not all(isinstance(linear, _KNOWN) for linear in linears.values()):
        return False
    columns, o = _inputs(linears["o"]), linears["o"]
    return not isinstance(o, PackedLinear) or o.group_size == columns or columns // kv_heads % o.group_size == 0


def _inputs(linear: nn.Module) -> int:
    return int(linear.weight.shape[1] if isinstance(linear, StoredLinear) else linear.in_features)  # type: ignore[arg-type]


def _places(order: tuple[int, ...], size: int) -> Tensor:
    """Channels of blocks of ``size`` in an order of the blocks."""
    return (torch.tensor(order)[:, None] * size + torch.arange(size)).flatten()


def _take_rows(linear: nn.Module, rows: Tensor) -> None:
    if isinstance(linear, PackedLinear):
        codes, scale, zero = to_codes(linear.packed)
        own = rows.to(codes.device)
        _repack(linear, codes[own], scale[own], None if zero is None else zero[own])
    elif isinstance(linear, nn.Linear | StoredLinear):
        linear.weight.copy_(linear.weight[rows.to(linear.weight.device)].clone())
    if isinstance(linear.bias, Tensor):
        linear.bias.copy_(linear.bias[rows.to(linear.bias.device)].clone())


def _take_columns(linear: nn.Module, columns: Tensor, order: tuple[int, ...]) -> None:
    if isinstance(linear, PackedLinear):
        codes, scale, zero = to_codes(linear.packed)
        groups = scale.shape[1]
        own = _places(order, groups // len(order)) if groups > 1 else torch.zeros(1, dtype=torch.int64)
        own = own.to(codes.device)
        taken = codes[:, columns.to(codes.device)].contiguous()
        _repack(linear, taken, scale[:, own].contiguous(), None if zero is None else zero[:, own].contiguous())
    elif isinstance(linear, nn.Linear | StoredLinear):
        linear.weight.copy_(linear.weight[:, columns.to(linear.weight.device)].clone())


def _repack(linear: PackedLinear, codes: Tensor, scale: Tensor, zero: Tensor | None) -> None:
    weight = from_codes(codes, scale, zero, linear.bits, linear.group_size, linear.layout)
    linear.codes, linear.scale, linear.zero = weight.codes, weight.scale, weight.zero
