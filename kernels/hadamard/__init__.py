"""Hadamard matrices and transforms, and the seeded rotations made from them: plain PyTorch on any device."""

from compress.kernels.hadamard.construct import Base, base_order, find_base
from compress.kernels.hadamard.reference import hadamard_matrix, hadamard_transform
from compress.kernels.hadamard.rotation import (
    RotationKind,
    random_hadamard,
    random_orthogonal,
    rotation,
    rotation_name,
)

__all__ = [
    "Base",
    "RotationKind",
    "base_order",
    "find_base",
    "hadamard_matrix",
    "hadamard_transform",
    "random_hadamard",
    "random_orthogonal",
    "rotation",
    "rotation_name",
]
