"""The rule by which an operation picks its path: the device of the tensors decides.

CUDA or HIP   Triton where the operation has a kernel for these arguments, else the reference
CPU           the C++ library where the operation has a function for these arguments and a build runs here,
              else the reference
any other     the reference
"""

from typing import Literal, cast

import torch
from compress.kernels import native, triton_support

Path = Literal["triton", "native-avx512", "native-avx2", "native-portable", "reference"]


def pick(device: torch.device, has_triton: bool = True, has_native: bool = False) -> Path:
    """The path of an operation for tensors on ``device``.

    Args:
        device: where the tensors are.
        has_triton: whether the operation has a Triton kernel for these arguments.
        has_native: whether it has a C++ function for them.

    Raises:
        ValueError: a GPU without Triton, or one that the kernels don't support.
    """
    if device.type == "cuda" and has_triton:
        triton_support.check(device)
        return "triton"
    if device.type == "cpu" and has_native:
        library = native.library()
        if library is not None:
            return native_path(library)
    return "reference"


def native_path(library: native.Library) -> Path:
    """What the path through a build of the C++ library is called."""
    return cast(Path, f"native-{library.name}")
