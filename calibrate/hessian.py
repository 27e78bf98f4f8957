"""The Hessian of a linear layer's output error: ``H = sum_t w_t x_t x_t^T`` over calibration tokens."""

import torch
from torch import Tensor

TILE = 256  # columns a tile; only tiles on and above the diagonal are computed


def gram(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """One sample's share of H.

    Args:
        x: inputs ``[T, n]``, float32.
        weight: importance of every token ``[T]``, or None for ones; the two give the same bits for equal tokens.

    Returns:
        ``X^T diag(w) X [n, n]`` float32; below the tiles on the diagonal it is zero.
    """
    if weight is not None:
        x = x * weight.sqrt().unsqueeze(1)
    size = x.shape[1]
    result = torch.zeros(size, size, dtype=x.dtype, device=x.device)
    for row in range(0, size, TILE):
        rows = slice(row, min(row + TILE, size))
        torch.mm(x[:, rows].t(), x[:, row:], out=result[rows, row:])
    return result


class Hessian:
    """Sums shares of H in float64.

    Attributes:
        value: the sum so far ``[n, n]``; its lower triangle means nothing.
        tokens: how many tokens went in.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self.value = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, share: Tensor, tokens: int) -> None:
        """Add one sample's :func:`gram` ``[n, n]``, made of so many tokens."""
        self.value += share
        self.tokens += tokens

    def mean(self) -> Tensor:
        """``H / tokens`` with both triangles filled, float64 ``[n, n]``."""
        upper = torch.triu(self.value)
        return (upper + torch.triu(upper, 1).t()) / max(self.tokens, 1)
