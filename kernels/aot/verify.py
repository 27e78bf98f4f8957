"""Compile every shipped configuration for every target and hold it against its limits."""

import json
import multiprocessing
import os
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compress.kernels import triton_support
from compress.kernels.aot.readout import Readout, read, version
from compress.kernels.aot.targets import TARGETS, Target, pretended, target
from compress.kernels.proofs import Compiled, Limits, spec, specs
from compress.kernels.triton_support import Launch

SCALAR_SPILLS = 128  # they fill the lanes of two vector registers


@dataclass(frozen=True)
class Row:
    """One configuration on one target: what it takes, and every limit that it breaks.

    Attributes:
        op: the operation.
        configuration: its name within the operation.
        target: the target's name.
        readout: the figures; None where it doesn't compile.
        seconds: time to compile and read.
        problems: broken limits, in words; empty if all is well.
    """

    op: str
    configuration: str
    target: str
    readout: Readout | None
    seconds: float
    problems: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def matrix() -> list[tuple[str, str, str]]:
    """(operation, configuration, target) of everything that is shipped."""
    return [(op.name, made.name, to.name) for op in specs() for made in op.configurations for to in TARGETS]


def compiled(launch: Launch, to: Target, cache: Path) -> Any:
    """Compile a launch for a target without a GPU; what Triton knows of it is read with `readout.read`.

    Args:
        launch: with tensors on the ``meta`` device, which count as aligned to 16 bytes, as those of PyTorch are.
        to: the target.
        cache: folder of results, shared by any number of processes.

    Raises:
        ValueError: Triton isn't installed or is the interpreter in this process.
    """
    if not triton_support.AVAILABLE:
        raise ValueError("Triton isn't installed: pip install triton")
    if triton_support.interpreting():
        raise ValueError("this process has TRITON_INTERPRET=1, and the interpreter compiles nothing")
    with pretended(to, cache):
        return launch.kernel.warmup(**launch.arguments, **launch.constexprs, **launch.options, grid=launch.grid)


def row(op: str, configuration: str, to: str, cache: Path) -> Row:
    """Compile one configuration for one target and check it."""
    made = next(found for found in spec(op).configurations if found.name == configuration)
    return check(op, made, target(to), cache)


def check(op: str, made: Compiled, to: Target, cache: Path) -> Row:
    """As `row`, for a configuration in hand."""
    started = time.perf_counter()
    try:
        found = _kept_readout(compiled(made.launch(), to, cache), cache)
    except _compiler_errors() as error:
        seconds = time.perf_counter() - started
        return Row(op, made.name, to.name, None, seconds, (f"doesn't compile: {str(error).splitlines()[0]}",))
    return Row(op, made.name, to.name, found, time.perf_counter() - started, problems(found, made.limits, to))


def rows(cache: Path, jobs: int, wanted: Iterable[tuple[str, str, str]] | None = None) -> list[Row]:
    """Check everything that is shipped, or what is wanted of `matrix`, in ``jobs`` processes at once."""
    places = list(matrix() if wanted is None else wanted)
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(row, *zip(*places, strict=True), [cache] * len(places))) if places else []


def problems(found: Readout, limits: Limits, to: Target) -> tuple[str, ...]:
    """Every limit that a compiled kernel breaks, in words."""
    shared = to.shared if limits.shared is None else min(limits.shared, to.shared)
    group = to.name == "sm_90" and limits.wgmma
    checks = (
        (found.stack == 0, f"spills: {found.stack} bytes of stack a thread"),
        (found.spills == 0, f"spills: {found.spills} vector registers or moves to and from accumulation registers"),
        (
            found.scalar_spills <= SCALAR_SPILLS,
            f"spills: {found.scalar_spills} scalar registers, at most {SCALAR_SPILLS}",
        ),
        (found.atomics == 0, f"{found.atomics} atomic operations"),
        (found.shared <= shared, f"{found.shared} bytes of shared memory, at most {shared}"),
        (
            to.backend != "cuda" or found.registers <= limits.registers,
            f"{found.registers} registers, at most {limits.registers}",
        ),
        (not limits.mma or bool(found.mma), "no tensor-core instructions"),
        (not group or bool({"HGMMA", "IGMMA"} & found.mma.keys()), "no warp-group tensor-core instructions"),
        (
            limits.conversions is None or found.conversions <= limits.conversions,
            f"{found.conversions} integer-to-float conversions, at most {limits.conversions}",
        ),
    )
    return tuple(text for kept, text in checks if not kept)


def _kept_readout(kernel: Any, cache: Path) -> Readout:
    """The figures of a kernel, read once: its hash stands for source, options, target and Triton's version.

    The reader's own version is part of the name, so that a changed reader reads again.
    """
    kept = cache / f"{kernel.hash}-{version()}.json"
    if kept.exists():
        return Readout(**json.loads(kept.read_text()))
    found = read(kernel)
    unfinished = kept.with_suffix(f".{os.getpid()}")  # two processes may come to the same kernel
    unfinished.write_text(json.dumps(asdict(found)))
    unfinished.replace(kept)
    return found


def _compiler_errors() -> tuple[type[Exception], ...]:
    """What Triton and its assemblers raise for a kernel that doesn't compile; other errors are faults of ours."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import TritonError

    return CompilationError, TritonError, RuntimeError
