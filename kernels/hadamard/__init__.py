"""Hadamard matrices and transforms, and the seeded rotations made from them."""

import torch
from compress.kernels import dispatch
from compress.kernels.hadamard import reference as _reference
from compress.kernels.hadamard import triton as _triton
from compress.kernels.hadamard.construct import Base, base_order, find_base
from compress.kernels.hadamard.reference import hadamard_matrix
from compress.kernels.hadamard.rotation import (
    RotationKind,
    random_hadamard,
    random_orthogonal,
    rotation,
    rotation_name,
)
from torch import Tensor

__all__ = [
    "Base",
    "RotationKind",
    "base_order",
    "find_base",
    "hadamard_matrix",
    "hadamard_transform",
    "path",
    "random_hadamard",
    "random_orthogonal",
    "rotation",
    "rotation_name",
]


def hadamard_transform(x: Tensor) -> Tensor:
    """x @ H_n / sqrt(n) without forming H_n, by Triton on a GPU. The result keeps the 2-norm of every row.

    Args:
        x: [..., n], floating point; H_n as `hadamard_matrix` gives it.

    Returns:
        [..., n], a new tensor in the dtype of x; float32 inside, or float64 where x is.

    Raises:
        ValueError: no construction is known for n, x isn't floating point, or a GPU that can't run the kernel.
    """
    return _triton.hadamard_transform(x) if path(x) == "triton" else _reference.hadamard_transform(x)


def path(x: Tensor) -> dispatch.Path:
    """The path that `hadamard_transform` takes; "reference" is PyTorch, a small product for every factor."""
    return dispatch.pick(x.device, has_triton=x.dtype in (torch.float16, torch.bfloat16, torch.float32))
