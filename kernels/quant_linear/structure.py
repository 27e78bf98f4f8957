"""A linear layer as the C++ kernels see it: `CompressLinear` of ``kernels/native/quant_linear.h``."""

import ctypes
from typing import Final

import torch
from compress.kernels.quant_linear.weight import QuantWeight
from torch import Tensor

KINDS: Final = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
ACTIVATIONS: Final = {"float": 0, "int8": 1}


class CompressLinear(ctypes.Structure):
    """Addresses and sizes; it owns nothing, so the tensors must outlive it."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("zero", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("bits", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("kind", ctypes.c_int64),
    )


def describe(weight: QuantWeight | Tensor, bias: Tensor | None) -> CompressLinear:
    """The structure of a layer.

    Args:
        weight: packed in layout "rows", or a plain contiguous matrix [N, K] in float32, float16 or bfloat16.
        bias: [N] float32 contiguous, or None.

    Raises:
        ValueError: another layout, dtype, device or memory order.
    """
    if bias is not None and (bias.dtype != torch.float32 or bias.shape != (weight.shape[0],)):
        raise ValueError(f"the bias must be float32 of shape [{weight.shape[0]}], got {bias.dtype} {list(bias.shape)}")
    bias_at = None if bias is None else _address(bias)
    if isinstance(weight, Tensor):
        if weight.dim() != 2 or weight.dtype not in KINDS:
            raise ValueError(f"a plain weight must be a matrix of 16 or 32-bit floats, got {weight.dtype}")
        rows, columns = weight.shape
        return CompressLinear(_address(weight), None, None, bias_at, rows, columns, 0, columns, KINDS[weight.dtype])
    if weight.layout != "rows":
        raise ValueError(f'the CPU kernels read layout "rows", got "{weight.layout}"')
    zero = None if weight.zero is None else _address(weight.zero)
    sizes = (*weight.shape, weight.bits, weight.group_size, KINDS[weight.scale.dtype])
    return CompressLinear(_address(weight.codes), _address(weight.scale), zero, bias_at, *sizes)


def _address(tensor: Tensor) -> int:
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(f"the CPU kernels read contiguous tensors in memory, got strides {tensor.stride()}")
    return tensor.data_ptr()
