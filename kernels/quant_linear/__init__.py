"""A linear layer with packed 2, 3, 4 or 8-bit weights, by Triton on a GPU and in C++ on a CPU."""

from typing import Literal

import torch
from compress.kernels import dispatch
from compress.kernels.quant_linear import cpu, reference, triton
from compress.kernels.quant_linear.weight import (
    QuantWeight,
    dequantize,
    from_codes,
    from_compressed_tensors,
    from_gptq,
    to_codes,
    to_compressed_tensors,
    to_gptq,
)
from torch import Tensor

Activations = Literal["float", "int8"]


def quant_linear(
    x: Tensor, weight: QuantWeight, bias: Tensor | None = None, activations: Activations = "float", threads: int = 1
) -> Tensor:
    """y = x W^T + bias for packed weights, which are never held as a dense matrix where a kernel exists.

    Args:
        x: [..., K] floating point.
        weight: [N, K] packed: layout "planes" on a GPU, "rows" for the fast path of a CPU.
        bias: [N] or None.
        activations: "float", or "int8" (W4A8) to round x to 8 bits over every 32 inputs: in C++ on a CPU; a GPU has
            only the reference for it, which dequantizes.
        threads: of the C++ path, which share the outputs out; no result depends on their number.

    Returns:
        [..., N] in the dtype of x.

    Raises:
        ValueError: arguments that don't fit together, a gradient with regard to x that is wanted from a kernel, or a
            GPU that can't run the kernels.
    """
    taken = path(x, weight, bias, activations)
    if taken != "reference" and x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"quant_linear has no gradient on the path {taken}: use torch.no_grad() or dequantize(weight)")
    if taken == "triton":
        return triton.quant_linear(x, weight, bias)
    if taken != "reference":
        return cpu.quant_linear(x, weight, bias, activations, threads)
    return reference.quant_linear(x, weight, bias, activations)


def path(
    x: Tensor, weight: QuantWeight, bias: Tensor | None = None, activations: Activations = "float"
) -> dispatch.Path:
    """The path that `quant_linear` takes for these arguments.

    Raises:
        ValueError: as `quant_linear`.
    """
    _check(x, weight, bias, activations)
    has_triton = activations == "float" and triton.supports(x, weight)
    return dispatch.pick(x.device, has_triton=has_triton, has_native=cpu.supports(x, weight))


def _check(x: Tensor, weight: QuantWeight, bias: Tensor | None, activations: str) -> None:
    N, K = weight.shape
    if activations not in ("float", "int8"):
        raise ValueError(f"activations={activations!r}: unknown; allowed: float, int8")
    if not x.is_floating_point() or x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(f"activations must be floating point of shape [..., {K}], got {x.dtype} {list(x.shape)}")
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"the bias must have shape [{N}], got {list(bias.shape)}")
    devices = {tensor.device for tensor in (x, weight.codes, bias) if tensor is not None}
    if len(devices) > 1:
        raise ValueError(f"activations, weight and bias are on different devices: {sorted(map(str, devices))}")
    if weight.layout == "rows" and x.device.type != "cpu":
        raise ValueError(f'a weight in layout "rows" is for a CPU, and the activations are on {x.device}')


__all__ = [
    "Activations",
    "QuantWeight",
    "dequantize",
    "from_codes",
    "from_compressed_tensors",
    "from_gptq",
    "path",
    "quant_linear",
    "to_codes",
    "to_compressed_tensors",
    "to_gptq",
]
