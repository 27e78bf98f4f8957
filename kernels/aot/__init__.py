"""Kernels compiled for GPUs that aren't there, and held against limits on registers, memory and instructions."""

from compress.kernels.aot.readout import Readout, read
from compress.kernels.aot.targets import TARGETS, Target, target
from compress.kernels.aot.verify import Row, check, compiled, matrix, problems, row, rows

__all__ = [
    "TARGETS",
    "Readout",
    "Row",
    "Target",
    "check",
    "compiled",
    "matrix",
    "problems",
    "read",
    "row",
    "rows",
    "target",
]
