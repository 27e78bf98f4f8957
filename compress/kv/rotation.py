"""The rotation of keys and queries before packing: one Hadamard matrix for all layers (arXiv 2404.00456, section 4)."""

import torch
from torch import Tensor

from compress.kernels.hadamard import rotation


class Rotation:
    """Turns the last dimension of tensors, ``head_dim`` wide, by an orthogonal matrix.

    Attributes:
        matrix: [head_dim, head_dim] float32 on the CPU.
    """

    def __init__(self, width: int) -> None:
        self.matrix = rotation(width, "hadamard", 0)[0].float()
        self._there: Tensor | None = None  # of the device and type that was asked for last

    def __call__(self, states: Tensor) -> Tensor:
        """``states R``; dot products of turned vectors are those of the vectors themselves."""
        if self._there is None or self._there.device != states.device or self._there.dtype != states.dtype:
            self._there = self.matrix if states.dtype == torch.float32 and states.is_cpu else self.matrix.to(states)
        return states @ self._there

    def back(self, states: Tensor) -> Tensor:
        """``states R^T`` of float32 states: vectors as they were before they were turned."""
        return states @ self.matrix.T.to(states.device)

    @property
    def nbytes(self) -> int:
        """Bytes that it occupies."""
        held = self._there is not None and self._there is not self.matrix
        return self.matrix.nbytes + (self._there.nbytes if held and self._there is not None else 0)
