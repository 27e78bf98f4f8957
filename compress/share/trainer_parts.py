"""Which parts of a student that shares attention are trained and compared, and where it begins to differ."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from compress.plan import Share

KEPT = ("q_proj", "k_proj", "v_proj", "o_proj")  # of a consumer, those of them that it has


def consumers(shares: Mapping[int, Share]) -> list[int]:
    """Layers whose attention isn't their own any more."""
    return sorted(layer for layer, share in shares.items() if share.mode != "mask")


def first_layer(shares: Mapping[int, Share], trained: Literal["consumers", "all"]) -> int:
    """The first layer that a student must run itself: earlier ones stay the teacher's."""
    return 0 if trained == "all" else min(shares[layer].source for layer in consumers(shares))


def trained_parameters(
    student: PreTrainedModel, shares: Mapping[int, Share], trained: Literal["consumers", "all"]
) -> dict[str, nn.Parameter]:
    """What is learnt, by name: all, or the consumers' projections and the norms from the first of them on."""
    named = dict(student.named_parameters())
    if trained == "all":
        return named
    own = consumers(shares)
    base: Any = student.base_model
    chosen = [getattr(base.layers[layer].self_attn, name, None) for layer in own for name in KEPT]
    for layer in base.layers[own[0] :]:
        chosen += [layer.input_layernorm, layer.post_attention_layernorm]
    chosen.append(base.norm)
    wanted = {id(parameter) for module in chosen if module is not None for parameter in module.parameters()}
    return {name: parameter for name, parameter in named.items() if id(parameter) in wanted}


@contextmanager
def learning(model: nn.Module, parameters: Collection[nn.Parameter]) -> Iterator[None]:
    """Let these parameters of a model require gradients, and no others; afterwards it is as it was."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    wanted = {id(parameter) for parameter in parameters}
    for parameter in before:
        parameter.requires_grad_(id(parameter) in wanted)
    try:
        yield
    finally:
        for parameter, flag in before.items():
            parameter.requires_grad_(flag)
            parameter.grad = None
