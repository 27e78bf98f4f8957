"""The C++ path of `quant_linear` (``kernels/native/quant_linear.cpp``), one thread unless more are asked for.

A few tokens are multiplied by the weights as they lie, packed, in one pass over them. From `MANY` tokens on, float
activations are multiplied by PyTorch's own product, on its threads, with up to 144 rows at a time that C++ dequantizes:
so few that they are still in the cache when they are read. Int8 activations are multiplied packed whatever their
number: a byte dot product does four multiplications where a float one does one. Figures: ``docs/kernels.md``.
"""

import ctypes
from functools import cache
from typing import Literal

import torch
from compress.kernels.native import Library, library
from compress.kernels.quant_linear.structure import ACTIVATIONS, CompressLinear, describe
from compress.kernels.quant_linear.weight import QuantWeight
from torch import Tensor

MANY = 24  # tokens from which dequantizing once for all of them is worth it
BLOCK = 16  # rows that lie together, as in quant_linear.h
PANEL = 9  # blocks dequantized at once, at most


def supports(x: Tensor, weight: QuantWeight) -> bool:
    """Whether the C++ path takes these arguments: a weight in layout "rows", activations of at most 32 bits."""
    return weight.layout == "rows" and x.device.type == "cpu" and x.dtype != torch.float64


def quant_linear(
    x: Tensor,
    weight: QuantWeight | Tensor,
    bias: Tensor | None = None,
    activations: Literal["float", "int8"] = "float",
    threads: int = 1,
    build: Library | None = None,
) -> Tensor:
    """y = x W^T + bias, see :func:`compress.kernels.quant_linear.quant_linear`.

    Args:
        x: [..., K] floating point; computed in float32.
        weight: [N, K] in layout "rows", or a plain matrix in float32, float16 or bfloat16.
        bias: [N] or None.
        activations: "float", or "int8" to round x to 8 bits over every 32 inputs.
        threads: that share the output rows out; the result doesn't depend on it.
        build: the compiled library, by default the best for this processor.

    Returns:
        [..., N] in the dtype of x.

    Raises:
        ValueError: arguments that don't fit together, or no compiled library.
        MemoryError: no memory for the prepared activations.
    """
    build = build or library()
    if build is None:
        raise ValueError("quant_linear: compress was installed without its compiled CPU kernels")
    rows, columns = weight.shape
    if x.shape[-1] != columns or threads < 1:
        raise ValueError(f"x {list(x.shape)} and threads={threads}: expected [..., {columns}] and at least 1")
    ready = x.dtype == torch.float32 and x.is_contiguous()
    inputs = x if ready else x.detach().to(torch.float32).contiguous()
    wide_bias = None if bias is None else bias.detach().to(torch.float32).contiguous()
    layer = describe(weight, wide_bias)
    count = x.numel() // columns
    if activations == "float" and count >= MANY and isinstance(weight, QuantWeight):
        y = _expanded(build, layer, inputs.view(count, columns))
        y = (y if wide_bias is None else y.add_(wide_bias)).view(*x.shape[:-1], rows)
        return y if ready else y.to(x.dtype)
    y = torch.empty(*x.shape[:-1], rows)
    failed = declared(build).compress_quant_linear(
        layer, inputs.data_ptr(), y.data_ptr(), count, ACTIVATIONS[activations], threads
    )
    if failed:
        raise MemoryError(f"no memory for the activations of {count} tokens")
    return y if ready else y.to(x.dtype)


def _expanded(build: Library, layer: CompressLinear, x: Tensor) -> Tensor:
    """x [M, K] times dequantized rows, a panel of them after the other."""
    rows, columns = layer.rows, layer.columns
    blocks = -(-rows // BLOCK)
    step = -(-blocks // -(-blocks // PANEL))  # even shares
    scratch = torch.empty(columns * step * BLOCK)
    y = torch.empty(x.shape[0], rows)
    for first in range(0, blocks, step):
        last = min(blocks, first + step)
        panel = scratch[: columns * (last - first) * BLOCK].view(columns, -1)
        declared(build).compress_expand(layer, first, last, panel.data_ptr())
        begin, end = first * BLOCK, min(last * BLOCK, rows)
        torch.mm(x, panel[:, : end - begin], out=y[:, begin:end])
    return y


@cache
def declared(build: Library) -> ctypes.CDLL:
    """The library's functions with the types of the arguments that they take."""
    functions = build.functions
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    functions.compress_quant_linear.argtypes = (ctypes.POINTER(CompressLinear), pointer, pointer, size, size, size)
    functions.compress_quant_linear.restype = size
    functions.compress_expand.argtypes = (ctypes.POINTER(CompressLinear), size, size, pointer)
    functions.compress_expand.restype = None
    return functions
