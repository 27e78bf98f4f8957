"""The Hadamard matrix of any order that has a construction, dense and as a fast transform.

Convention, the same in both: H_n = H_K (x) H_2^e with K from `find_base(n)` and Sylvester's H_2^e in natural order.
H_K need not be symmetric (Paley I is not), so x @ H and H @ x differ.
"""

import math

import torch
from compress.kernels.hadamard.construct import base_matrix, find_base, sylvester_matrix
from torch import Tensor

# Sylvester's part is applied in Kronecker factors of this order: few passes over memory, each a small matrix product.
_RADIX = 64


def hadamard_matrix(n: int) -> Tensor:
    """H_n: [n, n] float64 of +-1 with H H^T = n I.

    Raises:
        ValueError: no construction is known for n.
    """
    H = torch.ones(1, 1, dtype=torch.int8)
    for factor in _kronecker_factors(n):
        H = torch.kron(H, factor)
    return H.to(torch.float64)


def hadamard_transform(x: Tensor) -> Tensor:
    """x @ H_n / sqrt(n) without forming H_n; 16-bit types are computed in float32.

    Costs n (K + 64 log_64 2^e) multiply-adds a row. The result keeps the 2-norm of every row.

    Args:
        x: [..., n], floating point.

    Returns:
        [..., n], a new tensor in the dtype of x.

    Raises:
        ValueError: no construction is known for n, or x isn't floating point.
    """
    if not x.is_floating_point():
        raise ValueError(f"a Hadamard transform needs a floating point tensor, got {x.dtype}")
    n = x.shape[-1]
    outer, inner = 1, n
    y = x if x.dtype == torch.float64 else x.float()
    for factor in _kronecker_factors(n):
        order = factor.shape[0]
        inner //= order
        # Row vectors: (x H)[j] = sum_i x[i] H[i, j], hence the transpose.
        y = factor.to(device=x.device, dtype=y.dtype).T @ y.reshape(-1, outer, order, inner)
        outer *= order
    return (y.reshape(x.shape) * (1.0 / math.sqrt(n))).to(x.dtype)


def _kronecker_factors(n: int) -> list[Tensor]:
    """[H_K, H_64, ..., H_r] with H_n their Kronecker product, each int8 of +-1."""
    base = find_base(n)
    if base is None:
        raise ValueError(f"no Hadamard construction is known for order {n}")
    factors = [base_matrix(base)]
    rest = n // base.order
    while rest > 1:
        order = min(rest, _RADIX)
        factors.append(sylvester_matrix(order))
        rest //= order
    return factors
