"""The C++ kernels: one set of sources, built three times when the package is installed, the best one loaded.

The builds differ in their compiler flags alone (``pyproject.toml``, ``ext-modules``), and none is required: without a
compiler the package installs all the same and every operation takes its PyTorch reference. They are plain shared
libraries with C functions, called through ``ctypes``, so that neither torch's headers nor its version matter.
"""

import ctypes
import importlib.machinery
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

BUILDS = ("portable", "avx2", "avx512")  # by the level that `compress_cpu_level` returns


@dataclass(frozen=True)
class Library:
    """A loaded build: its name, and its C functions as attributes of ``functions``."""

    name: str
    functions: ctypes.CDLL


@cache
def library() -> Library | None:
    """The best build that this processor can run, or None, with one warning, where none was compiled."""
    portable = built("portable")
    if portable is None:
        warnings.warn(
            "compress was installed without its compiled CPU kernels and runs slower; "
            "install a C++ compiler (g++ or clang++) and reinstall",
            stacklevel=2,
        )
        return None
    level = int(portable.functions.compress_cpu_level())
    return next(found for name in reversed(BUILDS[: level + 1]) if (found := built(name)) is not None)


def built(name: str) -> Library | None:
    """One build by name, or None if it wasn't compiled; calling one that the processor can't run kills the process."""
    folder = Path(__file__).parent
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = folder / f"_{name}{suffix}"
        if path.is_file():
            functions = ctypes.CDLL(str(path))
            functions.compress_cpu_level.restype = ctypes.c_int64
            return Library(name, functions)
    return None


def runnable() -> tuple[Library, ...]:
    """Every compiled build that this processor can run, from the plainest to the best; for tests and ``doctor``."""
    portable = built("portable")
    if portable is None:
        return ()
    level = int(portable.functions.compress_cpu_level())
    return tuple(found for name in BUILDS[: level + 1] if (found := built(name)) is not None)
