"""The Hessian of a linear layer's output error: ``H = sum_t w_t x_t x_t^T`` over calibration tokens."""

import torch
from torch import Tensor

TILE = 512  # columns a tile; only tiles on and above the diagonal are computed


class Hessian:
    """Accumulates ``H [n, n]`` from layer inputs, in float64, from float32 products.

    Attributes:
        value: the sum so far, float64 on the device of the inputs.
        tokens: how many tokens went in.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self.value = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, x: Tensor, weight: Tensor | None = None) -> None:
        """Add one sample.

        Args:
            x: inputs ``[T, n]``, float32.
            weight: importance of every token ``[T]``, or None for ones. A sample of equal weights and no weights give
                the same bits.
        """
        if weight is not None:
            x = x * weight.sqrt().unsqueeze(1)
        size = x.shape[1]
        for row in range(0, size, TILE):
            rows = slice(row, min(row + TILE, size))
            self.value[rows, row:] += x[:, rows].t() @ x[:, row:]
        self.tokens += x.shape[0]

    def mean(self) -> Tensor:
        """``H / tokens`` with both triangles filled, float64 ``[n, n]``."""
        upper = torch.triu(self.value)
        return (upper + torch.triu(upper, 1).t()) / max(self.tokens, 1)
