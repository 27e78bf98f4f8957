"""The decode step of a decoder layer around its attention, fused into two calls: in C++ on a CPU, else plain PyTorch.

`prepared` and `prepared_head` pick the path once for a layer; what they return is called for every token and says, as
`path`, which one it takes.
"""

from typing import Protocol

import torch
from compress.kernels import dispatch, native
from compress.kernels.block import cpu, reference
from compress.kernels.block.reference import Activations, Block, Linear
from torch import Tensor


class Prepared(Protocol):
    """A layer whose path is picked."""

    @property
    def path(self) -> dispatch.Path:
        """The path that was picked."""

    def before(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See :func:`compress.kernels.block.reference.before`."""

    def queries(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """See :func:`compress.kernels.block.reference.queries`."""

    def values(self, hidden: Tensor) -> Tensor:
        """See :func:`compress.kernels.block.reference.values`."""

    def after(self, attention: Tensor, hidden: Tensor) -> Tensor:
        """See :func:`compress.kernels.block.reference.after`; may change `hidden` in place."""


class PreparedHead(Protocol):
    """A final norm and head whose path is picked."""

    @property
    def path(self) -> dispatch.Path:
        """The path that was picked."""

    def __call__(self, hidden: Tensor, activations: Activations = "float") -> Tensor:
        """See :func:`compress.kernels.block.reference.norm_linear`."""


class _Plain:
    path: dispatch.Path = "reference"

    def __init__(self, block: Block):
        self.block = block

    def before(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return reference.before(self.block, hidden, cos, sin)

    def queries(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return reference.queries(self.block, hidden, cos, sin)

    def values(self, hidden: Tensor) -> Tensor:
        return reference.values(self.block, hidden)

    def after(self, attention: Tensor, hidden: Tensor) -> Tensor:
        return reference.after(self.block, attention, hidden)


class _PlainHead:
    path: dispatch.Path = "reference"

    def __init__(self, layer: Linear, norm: Tensor, epsilon: float):
        self.layer, self.norm, self.epsilon = layer, norm, epsilon

    def __call__(self, hidden: Tensor, activations: Activations = "float") -> Tensor:
        return reference.norm_linear(self.layer, self.norm, self.epsilon, hidden, activations)


def prepared(block: Block, threads: int = 1) -> Prepared:
    """The layer on the best path, see `path`.

    Raises:
        ValueError: tensors that don't fit each other, or that aren't all on the CPU where C++ is to read them.
    """
    build = _build(block.attention_norm)
    return _Plain(block) if build is None else cpu.NativeBlock(block, build, threads)


def prepared_head(layer: Linear, norm: Tensor, epsilon: float, threads: int = 1) -> PreparedHead:
    """The end of a model on the best path."""
    build = _build(norm)
    return _PlainHead(layer, norm, epsilon) if build is None else cpu.NativeHead(layer, norm, epsilon, build, threads)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """See :func:`compress.kernels.block.reference.decode_attention`."""
    build = _build(q)
    if build is None:
        return reference.decode_attention(q, k, v, mask, scaling)
    return cpu.decode_attention(q, k, v, mask, scaling, build)


def attention_row(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> tuple[Tensor, Tensor]:
    """See :func:`compress.kernels.block.reference.attention_row`."""
    build = _build(q)
    if build is None:
        return reference.attention_row(q, k, v, mask, scaling)
    return cpu.attention_row(q, k, v, mask, scaling, build)


def attention_mix(weights: Tensor, v: Tensor, head_map: Tensor | None = None) -> Tensor:
    """See :func:`compress.kernels.block.reference.attention_mix`."""
    build = _build(weights)
    if build is None:
        return reference.attention_mix(weights, v, head_map)
    return cpu.attention_mix(weights, v, head_map, build)


def path(x: Tensor) -> dispatch.Path:
    """The path of all of them, for queries or a norm's weight: C++ for float32 on a CPU, else the reference."""
    return dispatch.pick(x.device, has_triton=False, has_native=x.dtype == torch.float32)


def _build(x: Tensor) -> native.Library | None:
    return None if path(x) == "reference" else native.library()


__all__ = [
    "Activations",
    "Block",
    "Linear",
    "Prepared",
    "PreparedHead",
    "attention_mix",
    "attention_row",
    "decode_attention",
    "path",
    "prepared",
    "prepared_head",
]
