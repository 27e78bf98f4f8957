"""What this machine offers: versions, processor, GPU, compiled kernels, the Hub; and the kernels compiled for GPUs."""

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
import psutil
import torch

from compress.calibrate.errors import InputError
from compress.calibrate.hub import hub_problem
from compress.kernels import native, triton_support
from compress.kernels.aot import Row, rows

_PACKAGES = ("torch", "transformers", "compressed-tensors", "triton")
_COLUMNS = ("operation", "configuration", "target", "regs", "stack", "shared", "MMA", "I2F", "verdict")


@dataclass(frozen=True)
class Diagnosis:
    """What was found, one entry a line: a name and a sentence."""

    findings: dict[str, str]

    def lines(self) -> list[str]:
        """For people."""
        width = max(map(len, self.findings))
        return [f"{name:<{width}}  {value}" for name, value in self.findings.items()]

    def to_json(self) -> dict[str, Any]:
        """For scripts."""
        return dict(self.findings)


def examine() -> Diagnosis:
    """Look at this machine; asks the Hub once, for at most three seconds."""
    versions = {name: _version(name) for name in _PACKAGES}
    problem = hub_problem()
    return Diagnosis(
        {
            "compress": _version("compress"),
            "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
            **versions,
            "processor": _processor(),
            "CPU kernels": _native(),
            "GPU": _gpus(),
            "Hub": f"not used: {problem}" if problem else "answers",
        }
    )


def check_kernels(jobs: int) -> list[Row]:
    """Compile every shipped Triton kernel for every target; results are kept in the user's cache folder.

    Raises:
        InputError: this process has no Triton that compiles.
    """
    if not triton_support.AVAILABLE:
        raise InputError("--kernels", None, "Triton isn't installed", fix="pip install triton, where it has a wheel")
    if triton_support.interpreting():
        raise InputError("--kernels", None, "TRITON_INTERPRET is set, and the interpreter compiles nothing")
    return rows(Path(platformdirs.user_cache_dir("compress"), "kernels"), jobs)


def kernel_lines(found: Sequence[Row]) -> list[str]:
    """A table with a row a configuration and target, and a last line that sums up."""
    table = [_COLUMNS, *(_cells(row) for row in found)]
    widths = [max(len(line[i]) for line in table) for i in range(len(_COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
    broken = sum(bool(row.problems) for row in found)
    return [*lines, f"{len(found)} kernels compiled, {broken} outside their limits"]


def _cells(row: Row) -> tuple[str, ...]:
    verdict = "; ".join(row.problems) or "ok"
    figures = row.readout
    if figures is None:
        return row.op, row.configuration, row.target, "", "", "", "", "", verdict
    mma = " ".join(f"{count} {family}" for family, count in figures.mma.items()) or "-"
    numbers = (figures.registers, figures.stack, figures.shared)
    return row.op, row.configuration, row.target, *map(str, numbers), mma, str(figures.conversions), verdict


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    memory = psutil.virtual_memory().total / 2**30
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{os.cpu_count()} cores, {capability}, {memory:.0f} GiB of memory"


def _native() -> str:
    runnable = [library.name for library in native.runnable()]
    if not runnable:
        return "none: no C++ compiler was there when compress was installed, so it runs slower"
    return f"{runnable[-1]} (this processor runs {', '.join(runnable)})"


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none that PyTorch sees; everything runs on the processor"
    return "; ".join(_gpu(index) for index in range(torch.cuda.device_count()))


def _gpu(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    text = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    try:
        triton_support.check(torch.device("cuda", index))
    except ValueError as error:
        return f"{text} (unsupported: {error})"
    return text
