"""Modules that hold weights as an artifact stores them: packed codes, or plain ones of 16 bits; never a dense copy.

Their weights are buffers, not parameters: nothing here can be trained. Gradients with regard to inputs are exact, since
a module whose input wants one multiplies with its dequantized weight.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.calibrate.errors import InputError
from compress.kernels import native
from compress.kernels.quant_linear import (
    Activations,
    QuantWeight,
    cpu,
    dequantize,
    from_codes,
    path,
    quant_linear,
    to_codes,
)

ACTIVATIONS: tuple[str, ...] = get_args(Activations)

_FEW_TOKENS = 8
_ROWS_AT_ONCE = 4096  # of a 16-bit matrix that is multiplied in float32


@dataclass(frozen=True)
class Compute:
    """How a loaded model computes.

    Attributes:
        dtype: of hidden states.
        activations: what packed layers multiply: ``float``, or activations rounded to 8 bits on a CPU.
        threads: of packed layers on a CPU for a few tokens; a prompt gets as many as PyTorch has. Figures don't depend
            on it.
    """

    dtype: torch.dtype = torch.float32
    activations: Activations = "float"
    threads: int = 1

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise InputError("--threads", self.threads, "nothing would be computed", allowed="from 1")


class Stored(nn.Module):
    """A module whose weights keep the type in which they are stored, also under ``half()`` or ``to(dtype)``."""

    _stored: tuple[str, ...] = ("weight",)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Stored":
        before = {name: self._buffers[name] for name in self._stored}
        super()._apply(fn, recurse)
        for name, held in before.items():
            new = self._buffers[name]
            if held is not None and new is not None and new.dtype != held.dtype:
                self._buffers[name] = held.to(new.device)
        return self


class PackedLinear(Stored):
    """A linear layer over packed codes.

    Args:
        weight: [N, K], in the layout that its device wants.
        bias: [N], or None.
        compute: how it multiplies.
    """

    _stored = ("scale",)

    def __init__(self, weight: QuantWeight, bias: Tensor | None, compute: Compute) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bits, self.group_size, self.layout = weight.bits, weight.group_size, weight.layout
        self.activations, self.threads = compute.activations, compute.threads
        self.codes: Tensor
        self.scale: Tensor
        self.zero: Tensor | None
        self.bias: Tensor | None
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("zero", weight.zero)
        self.register_buffer("bias", bias)

    @property
    def packed(self) -> QuantWeight:
        """The weight, as the kernels take it."""
        shape = (self.out_features, self.in_features)
        return QuantWeight(self.codes, self.scale, self.zero, shape, self.bits, self.group_size, self.layout)

    @property
    def symmetric(self) -> bool:
        """Whether all codes are centred on 2^(bits-1)."""
        return self.zero is None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight [N, K]."""
        return dequantize(self.packed, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``x W^T + b`` of x [..., K]."""
        if x.requires_grad and torch.is_grad_enabled():
            return F.linear(x, self.dequantize(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        few = x.numel() <= _FEW_TOKENS * self.in_features
        threads = self.threads if few else max(self.threads, torch.get_num_threads())
        return quant_linear(x, self.packed, self.bias, self.activations, threads)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        before = self.codes.device
        super()._apply(fn, recurse)
        layout = layout_for(self.codes.device)
        if self.codes.device != before and layout != self.layout and self.codes.device.type != "meta":
            codes, scale, zero = to_codes(self.packed)
            weight = from_codes(codes, scale, zero, self.bits, self.group_size, layout)
            self.codes, self.scale, self.zero, self.layout = weight.codes, weight.scale, weight.zero, layout
        return self

    def extra_repr(self) -> str:
        """Sizes, format and the path that the multiplication takes here."""
        kind = "symmetric" if self.symmetric else "asymmetric"
        token = torch.empty(1, self.in_features, device=self.codes.device)
        taken = path(token, self.packed, self.bias, self.activations)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.bits}, group_size={self.group_size}, {kind}, path={taken}"
        )


class StoredLinear(Stored):
    """A linear layer that isn't quantized: its weight stays in the type of the file, products are in that of the input.

    Args:
        weight: [N, K] float16, bfloat16 or float32.
        bias: [N], or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight: Tensor
        self.bias: Tensor | None
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """``x W^T + b`` of x [..., K], in the type of x; a wider type than the weight's goes over blocks of rows."""
        return _product(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Sizes and type."""
        rows, columns = self.weight.shape
        kind = str(self.weight.dtype).removeprefix("torch.")
        return f"in_features={columns}, out_features={rows}, bias={self.bias is not None}, weight={kind}"


class StoredEmbedding(Stored):
    """Token embeddings in the type of the file, handed out in that of the computation.

    Args:
        weight: [vocabulary, hidden].
        dtype: of what it hands out; follows ``module.to(dtype)``.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self.weight: Tensor
        self.like: Tensor
        self.register_buffer("weight", weight)
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=weight.device), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Rows [..., hidden] of token ids [...]."""
        return F.embedding(ids, self.weight).to(self.like.dtype)

    def extra_repr(self) -> str:
        """Sizes and type."""
        kind = str(self.weight.dtype).removeprefix("torch.")
        return f"{self.num_embeddings}, {self.embedding_dim}, weight={kind}"


class TiedLinear(nn.Module):
    """A head that multiplies with the embedding's weight, wherever and in whatever type that is.

    Args:
        embedding: whose weight is used; it stays a part of the model, and not of this.
    """

    def __init__(self, embedding: StoredEmbedding) -> None:
        super().__init__()
        self._tied = (embedding,)  # in a tuple, since a module would become a part of this one

    @property
    def weight(self) -> Tensor:
        """[vocabulary, hidden], the embedding's own tensor."""
        return self._tied[0].weight

    def forward(self, x: Tensor) -> Tensor:
        """``x W^T`` of x [..., hidden], in the type of x."""
        return _product(x, self.weight, None)

    def extra_repr(self) -> str:
        """Sizes and type."""
        return f"tied to the embedding: {self._tied[0].extra_repr()}"


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + b`` in the type of x, with a weight that may be of another type."""
    if weight.dtype == x.dtype:
        return F.linear(x, weight, bias)
    wanted = x.requires_grad and torch.is_grad_enabled()
    if x.dtype == torch.float32 and x.device.type == "cpu" and not wanted and native.library() is not None:
        return cpu.quant_linear(x, weight, bias)
    blocks = weight.split(_ROWS_AT_ONCE)
    y = torch.cat([F.linear(x, rows.to(x.dtype)) for rows in blocks], dim=-1)
    return y if bias is None else y + bias


def layout_for(device: torch.device) -> Literal["planes", "rows"]:
    """The layout that the kernels of a device read."""
    return "planes" if device.type == "cuda" else "rows"
