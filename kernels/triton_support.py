"""Triton as this machine has it: is it there, which GPU would run it, and how a kernel is launched.

Kernels take ``jit`` and ``tl`` from here, so that their files import where Triton has no wheel (macOS, Windows); there
``jit`` returns the plain function and no launch gets past `check`. One source serves three uses: launched on a GPU,
compiled ahead of time (`compress.kernels.aot`), and run in Triton's interpreter, which a process chooses for good by
having ``TRITON_INTERPRET=1`` before Triton is imported. Nothing here asks for a driver at import, and configurations
come from the shapes, not from tuning runs.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

AVAILABLE = importlib.util.find_spec("triton") is not None
MIN_CAPABILITY = (8, 0)
HIP_ARCHITECTURES = ("gfx942",)
PLANNING_MULTIPROCESSORS = 132  # of an H100: the figure for tensors that are on no GPU


class _Absent:
    """Stands for ``triton.language``: kernel signatures name its types when they are defined."""

    def __getattr__(self, name: str) -> Any:
        return object


tl: Any = importlib.import_module("triton.language") if AVAILABLE else _Absent()


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """``triton.jit``, with or without its options, or the function itself where Triton isn't installed.

    Name the sizes that change from step to step in ``do_not_specialize``: otherwise Triton compiles a kernel three
    times, for 1, for multiples of 16 and for the rest.
    """
    if function is None:
        return lambda decorated: jit(decorated, **options)
    return importlib.import_module("triton").jit(function, **options) if AVAILABLE else function


def interpreting() -> bool:
    """Whether this process runs Triton kernels in the interpreter, on CPU tensors."""
    return AVAILABLE and bool(importlib.import_module("triton").knobs.runtime.interpret)


def check(device: torch.device) -> None:
    """Make sure that Triton kernels run on a device.

    Raises:
        ValueError: no Triton, no GPU, or a GPU that the kernels weren't compiled and tested for.
    """
    if not AVAILABLE:
        raise ValueError(f"Triton isn't installed, and the kernels for {device} need it: pip install triton")
    if device.type == "meta" or (device.type == "cpu" and interpreting()):
        return
    if device.type != "cuda":
        raise ValueError(f"Triton kernels need a GPU, but the tensors are on {device}")
    problem = _unsupported(torch.cuda.current_device() if device.index is None else device.index)
    if problem:
        raise ValueError(problem)


@cache
def _unsupported(index: int) -> str | None:
    name = torch.cuda.get_device_name(index)
    if torch.version.hip:
        architecture = torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
        if architecture in HIP_ARCHITECTURES:
            return None
        return f"cuda:{index} ({name}) is {architecture}; the kernels support {', '.join(HIP_ARCHITECTURES)}"
    major, minor = torch.cuda.get_device_capability(index)
    if (major, minor) >= MIN_CAPABILITY:
        return None
    return f"cuda:{index} ({name}) has compute capability {major}.{minor}; the kernels need 8.0 or newer"


def multiprocessors(device: torch.device) -> int:
    """How many blocks of threads the GPU runs at once, in whole multiprocessors; an H100's where there is no GPU."""
    if device.type != "cuda":
        return PLANNING_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def compute_type(dtype: torch.dtype) -> Any:
    """The Triton type in which a kernel should multiply tensors of ``dtype``, to be passed as a constexpr.

    The type itself, but float32 for bfloat16 in the interpreter, whose arithmetic in bfloat16 is wrong
    (triton-lang/triton#11584): only loading and storing it is right there.

    Raises:
        ValueError: not float16, bfloat16 or float32.
    """
    types = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    if dtype not in types:
        raise ValueError(f"Triton kernels take float16, bfloat16 or float32, got {dtype}")
    return tl.float32 if dtype == torch.bfloat16 and interpreting() else types[dtype]


@dataclass(frozen=True)
class Launch:
    """One kernel with everything that its launch fixes.

    An operation builds the same value to run a kernel and, from tensors on the ``meta`` device, to have it compiled
    ahead of time: what is proved is what is launched.

    Attributes:
        kernel: a function decorated with `jit`.
        grid: numbers of programs, one to three.
        arguments: tensors and numbers by parameter name.
        constexprs: compile-time parameters by name.
        num_warps: warps a program.
        num_stages: depth of the software pipeline of loads.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler is told; fused multiply-adds are asked for by name because their default changes."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}

    def start(self) -> None:
        """Launch it on the device of its tensors; an empty grid is no launch.

        Raises:
            ValueError: the device can't run Triton kernels.
        """
        if 0 in self.grid:
            return
        device = next(value.device for value in self.arguments.values() if isinstance(value, Tensor))
        check(device)
        with torch.cuda.device(device if device.type == "cuda" else -1):
            self.kernel[self.grid](**self.arguments, **self.constexprs, **self.options)
