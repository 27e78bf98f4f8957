"""The decode step of a decoder layer around its attention, fused into two calls: in C++ on a CPU, else plain PyTorch.

`prepared` and `prepared_head` pick the path once for a layer; what they return is called for every token.
"""

from typing import Protocol

import torch
from compress.kernels import dispatch, native
from compress.kernels.block import cpu, reference
from compress.kernels.block.reference import Activations, Block, Linear
from torch import Tensor


class Prepared(Protocol):
    """A layer whose path is picked."""

    def before(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See :func:`compress.kernels.block.reference.before`."""

    def after(self, attention: Tensor, hidden: Tensor) -> Tensor:
        """See :func:`compress.kernels.block.reference.after`; may change `hidden` in place."""


class PreparedHead(Protocol):
    """A final norm and head whose path is picked."""

    def __call__(self, hidden: Tensor, activations: Activations = "float") -> Tensor:
        """See :func:`compress.kernels.block.reference.norm_linear`."""


class _Plain:
    def __init__(self, block: Block):
        self.block = block

    def before(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return reference.before(self.block, hidden, cos, sin)

    def after(self, attention: Tensor, hidden: Tensor) -> Tensor:
        return reference.after(self.block, attention, hidden)


class _PlainHead:
    def __init__(self, layer: Linear, norm: Tensor, epsilon: float):
        self.layer, self.norm, self.epsilon = layer, norm, epsilon

    def __call__(self, hidden: Tensor, activations: Activations = "float") -> Tensor:
        return reference.norm_linear(self.layer, self.norm, self.epsilon, hidden, activations)


def prepared(block: Block, threads: int = 1) -> Prepared:
    """The layer on the best path: C++ where every tensor is on the CPU and a build is there, else the reference."""
    build = _build(block.attention_norm.device)
    return _Plain(block) if build is None else cpu.NativeBlock(block, build, threads)


def prepared_head(layer: Linear, norm: Tensor, epsilon: float, threads: int = 1) -> PreparedHead:
    """The end of a model on the best path."""
    build = _build(norm.device)
    return _PlainHead(layer, norm, epsilon) if build is None else cpu.NativeHead(layer, norm, epsilon, build, threads)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """See :func:`compress.kernels.block.reference.decode_attention`; on a CPU float32 alone."""
    build = _build(q.device)
    if build is None:
        return reference.decode_attention(q, k, v, mask, scaling)
    return cpu.decode_attention(q, k, v, mask, scaling, build)


def path(device: torch.device) -> dispatch.Path:
    """The path that all of them take for tensors on a device; there is none for a GPU but the reference."""
    return dispatch.pick(device, has_triton=False, has_native=True)


def _build(device: torch.device) -> native.Library | None:
    return None if path(device) == "reference" else native.library()


__all__ = [
    "Activations",
    "Block",
    "Linear",
    "Prepared",
    "PreparedHead",
    "decode_attention",
    "path",
    "prepared",
    "prepared_head",
]
