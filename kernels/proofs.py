"""What every operation shows of itself, so that the same four proofs hold for all of them.

An operation describes itself once, in ``kernels/<op>/spec.py``, as ``SPEC: OpSpec``. `specs` finds it, and then
``tests/kernels/test_proofs.py`` and ``compress doctor --kernels`` prove it without a line of its own:

    reference     the reference, the CPU path and the public function equal a float64 definition, on awkward cases
    interpreter   the Triton kernel in Triton's interpreter equals the same definition
    aot           every shipped configuration compiles for every target and keeps its limits (`compress.kernels.aot`)
    determinism   two runs agree bit for bit
"""

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from compress.kernels.triton_support import Launch
from torch import Tensor

Function = Callable[..., Tensor | tuple[Tensor, ...]]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """Arguments of an operation: awkward ones (ragged sizes, grouped heads, empty rows, one token, nothing at all).

    Attributes:
        name: short, unique within the operation; part of the test's name.
        make: from a generator and the dtype of the activations to the arguments, on the CPU. Keep them small: the
            interpreter takes some 0.1 ms for every Triton operation of every program.
        dtypes: activations to prove it in.
    """

    name: str
    make: Callable[[torch.Generator, torch.dtype], tuple[Any, ...]]
    dtypes: tuple[torch.dtype, ...] = DTYPES

    def arguments(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """The case's arguments, the same on every call."""
        return self.make(torch.Generator().manual_seed(0), dtype)


@dataclass(frozen=True)
class Limits:
    """What a compiled kernel may take. Spilled registers and atomic operations are never allowed.

    Attributes:
        registers: at most so many a thread, on NVIDIA targets.
        shared: at most so many bytes of shared memory a program; None for what the target has.
        mma: tensor-core instructions must be there.
        wgmma: on sm_90 they must be warp-group ones (64 rows and more, 4 warps and more).
        conversions: at most so many integer-to-float conversions; None for any number.
    """

    registers: int = 255
    shared: int | None = None
    mma: bool = True
    wgmma: bool = False
    conversions: int | None = None


@dataclass(frozen=True)
class Compiled:
    """One shipped configuration of a kernel, to be compiled ahead of time.

    Attributes:
        name: unique within the operation.
        launch: makes the launch from tensors on the ``meta`` device, by the same code that launches it for real.
        limits: what the result may take.
    """

    name: str
    launch: Callable[[], Launch]
    limits: Limits


@dataclass(frozen=True)
class OpSpec:
    """All that the proofs need to know of one operation. The functions take the arguments that its cases make.

    Attributes:
        name: the operation's package.
        public: the function that users call.
        reference: readable PyTorch, which defines the meaning.
        exact: the same from first principles in float64, as independent of the reference as can be.
        triton: launches the Triton kernels; None if there are none.
        cpu: the C++ path, called with the name of a build (`compress.kernels.native.BUILDS`) before the arguments;
            None if there is none.
        cases: arguments.
        configurations: shipped kernels.
        tolerances: largest allowed |result - exact| / max |exact| by dtype of the activations.
    """

    name: str
    public: Function
    reference: Function
    exact: Function
    triton: Function | None
    cases: tuple[Case, ...]
    cpu: Function | None = None
    configurations: tuple[Compiled, ...] = ()
    tolerances: Mapping[torch.dtype, float] = field(
        default_factory=lambda: {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
    )

    def case(self, name: str) -> Case:
        """A case by name."""
        return next(case for case in self.cases if case.name == name)


@cache
def specs() -> tuple[OpSpec, ...]:
    """Every operation that has a ``spec`` module, by name."""
    package = importlib.import_module("compress.kernels")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__) if module.ispkg)
    modules = [f"{package.__name__}.{name}.spec" for name in names]
    return tuple(importlib.import_module(name).SPEC for name in modules if importlib.util.find_spec(name))


def spec(name: str) -> OpSpec:
    """An operation's spec by name."""
    return next(found for found in specs() if found.name == name)


def outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What an operation returned, always as a tuple."""
    return (result,) if isinstance(result, Tensor) else result


def error(result: Tensor | tuple[Tensor, ...], exact: Tensor | tuple[Tensor, ...]) -> float:
    """The largest |result - exact| / max |exact| over all outputs; infinite where shapes, NaNs or infinities differ."""
    found, wanted = outputs(result), outputs(exact)
    if len(found) != len(wanted) or any(a.shape != b.shape for a, b in zip(found, wanted, strict=True)):
        return float("inf")
    return max((_tensor_error(a, b) for a, b in zip(found, wanted, strict=True)), default=0.0)


def _tensor_error(result: Tensor, exact: Tensor) -> float:
    a, b = result.double(), exact.double()
    finite = b.isfinite()
    if not torch.equal(a.isfinite(), finite) or not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return float("inf")
    a, b = a[finite], b[finite]
    if b.numel() == 0:
        return 0.0
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()


def same_bits(first: Tensor | tuple[Tensor, ...], second: Tensor | tuple[Tensor, ...]) -> bool:
    """Whether two runs agree bit for bit."""
    pairs = zip(outputs(first), outputs(second), strict=True)
    return all(torch.equal(_bytes(a), _bytes(b)) for a, b in pairs)


def _bytes(x: Tensor) -> Tensor:
    """A copy, because `contiguous` keeps odd strides in dimensions of size 1 and `view(dtype)` refuses those."""
    return x.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def triton_error(op: str, case: str, dtype: torch.dtype) -> float:
    """`error` of an operation's Triton kernels on a case, for a process whose Triton is the interpreter."""
    return error(_first_run(op, case, dtype), spec(op).exact(*spec(op).case(case).arguments(dtype)))


def triton_repeats(op: str, case: str, dtype: torch.dtype) -> bool:
    """Whether two launches on a case agree bit for bit, which they don't where memory is read before it is written."""
    return same_bits(_first_run(op, case, dtype), _run(op, case, dtype))


def _run(op: str, case: str, dtype: torch.dtype) -> Tensor | tuple[Tensor, ...]:
    launcher = spec(op).triton
    if launcher is None:
        raise ValueError(f"{op} has no Triton kernel")
    return launcher(*spec(op).case(case).arguments(dtype))


_first_run = cache(_run)  # the interpreter is slow, and two proofs look at the same run
