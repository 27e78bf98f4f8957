"""What a packed linear layer means: dequantize, then multiply."""

import torch
import torch.nn.functional as F
from compress.kernels.quant_linear.weight import QuantWeight, dequantize
from torch import Tensor

ACTIVATION_CHUNK = 32


def quant_linear(x: Tensor, weight: QuantWeight, bias: Tensor | None = None, activations: str = "float") -> Tensor:
    """y = x W^T + bias in float32 (float64 for float64 activations), rounded to the dtype of x.

    Args:
        x: [..., K].
        weight: [N, K] packed, in either layout.
        bias: [N] or None.
        activations: "float", or "int8" to round x first, see :func:`round_activations`.

    Returns:
        [..., N] in the dtype of x.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if activations == "int8":
        wide = round_activations(wide, weight.group_size)
    W = dequantize(weight, wide.dtype)
    return F.linear(wide, W, None if bias is None else bias.to(wide.dtype)).to(x.dtype)


def round_activations(x: Tensor, group_size: int) -> Tensor:
    """Activations on the grid of the W4A8 kernels: 255 steps over every 32 inputs of a group, sized by the largest.

    Args:
        x: [..., K] floating point.
        group_size: G; chunks of 32 inputs don't cross groups, and the last one of a group may be shorter.

    Returns:
        [..., K], the rounded activations in the dtype of x.
    """
    groups = x.unflatten(-1, (-1, group_size))
    chunks = F.pad(groups, (0, -group_size % ACTIVATION_CHUNK)).unflatten(-1, (-1, ACTIVATION_CHUNK))
    largest = chunks.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, 127 / largest, 0)
    rounded = (chunks * inverse).round().clamp(-127, 127) * (largest / 127)
    return rounded.flatten(-2)[..., :group_size].flatten(-2)
