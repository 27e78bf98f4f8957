"""The GPUs that kernels are compiled for, and a driver that pretends to be one of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Target:
    """A GPU architecture.

    Attributes:
        name: as the vendor's assembler calls it.
        backend: Triton's name of the back end.
        arch: Triton's name of the architecture.
        warp_size: threads a warp.
        shared: most bytes of shared memory that one program may have.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared: int


TARGETS = (
    Target("sm_80", "cuda", 80, 32, 163 << 10),
    Target("sm_90", "cuda", 90, 32, 227 << 10),
    Target("gfx942", "hip", "gfx942", 64, 64 << 10),
)


def target(name: str) -> Target:
    """A target by name."""
    return next(found for found in TARGETS if found.name == name)


@contextmanager
def pretended(target: Target, cache: Path) -> Iterator[None]:
    """Within this context Triton compiles for ``target`` and keeps its results in ``cache``; no GPU or driver is asked.

    Triton keeps the driver for the process, so use it from one thread. A target has its own device number, because
    Triton remembers compiled kernels by that number.
    """
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.runtime.driver import driver

    class Pretended(DriverBase):
        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            raise NotImplementedError("a pretended GPU launches nothing")

        def get_current_target(self) -> Any:
            return GPUTarget(target.backend, target.arch, target.warp_size)

        def get_current_device(self) -> int:
            return 1000 + TARGETS.index(target)

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("meta")

        def get_benchmarker(self) -> Any:
            raise NotImplementedError("a pretended GPU measures nothing")

    before = driver._active
    driver.set_active(Pretended())
    try:
        with knobs.cache.scope(), knobs.compilation.scope():
            knobs.cache.dir = str(cache)
            knobs.compilation.disable_line_info = True  # nobody steps through it, and it takes a sixth of the time
            yield
    finally:
        driver.set_active(before)
