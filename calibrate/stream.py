"""Layer inputs on disk: the activations of all calibration samples, one memory-mapped file.

A run holds the inputs of one decoder layer at a time. For 128 x 2048 tokens of a 4096-wide model that is 4.3 GB, so
they live in files, and the operating system's page cache decides what stays in memory.
"""

import os
from pathlib import Path

import torch
from torch import Tensor


class ActivationFile:
    """Float32 activations ``[samples, tokens, width]`` in a file; ``file[i]`` is a view ``[tokens, width]``.

    Args:
        path: the file. It is created, or opened if it has the right size already.
        shape: ``(samples, tokens, width)``.

    Raises:
        ValueError: the file exists with another size.
        OSError: the disk is full. It is said here, because a write into a mapped file can't say it.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self.path = path
        self.shape = shape
        samples, tokens, width = shape
        size = samples * tokens * width
        if path.exists() and path.stat().st_size != size * 4:
            raise ValueError(f"{path} holds {path.stat().st_size} bytes, expected {size * 4}")
        if not path.exists():
            _reserve(path, size * 4)
        self._data = torch.from_file(str(path), shared=True, size=size, dtype=torch.float32).view(shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> Tensor:
        return self._data[index]

    def __setitem__(self, index: int, value: Tensor) -> None:
        self._data[index].copy_(value)

    def flush(self) -> None:
        """Return when everything written has reached the disk."""
        with self.path.open("rb+") as file:
            os.fsync(file.fileno())

    @staticmethod
    def nbytes(shape: tuple[int, int, int]) -> int:
        """Bytes that a file of this shape takes."""
        samples, tokens, width = shape
        return samples * tokens * width * 4


def _reserve(path: Path, nbytes: int) -> None:
    """Create a file with all its space, or no file at all."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, nbytes)
            else:
                file.truncate(nbytes)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
