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
FOLDER = Path(__file__).parent
FUNCTIONS = (  # a build without one of them is of another version
    "compress_cpu_level",
    "compress_quant_linear",
    "compress_expand",
    "compress_block_before",
    "compress_block_after",
    "compress_norm_linear",
    "compress_decode_attention",
    "compress_attention_row",
    "compress_attention_mix",
    "compress_kv_pack",
    "compress_segment_attention",
)


@dataclass(frozen=True)
class Library:
    """A loaded build: its name, and its C functions as attributes of ``functions``."""

    name: str
    functions: ctypes.CDLL


@cache
def library(folder: Path = FOLDER) -> Library | None:
    """The best build in a folder that this processor can run, or None, with one warning, where there is none."""
    portable = built("portable", folder)
    if portable is None:
        if _file("portable", folder) is None:  # for a file that is no good, `built` has warned
            warnings.warn(
                "compress was installed without its compiled CPU kernels and runs slower; "
                "install a C++ compiler (g++ or clang++) and reinstall",
                stacklevel=2,
            )
        return None
    level = int(portable.functions.compress_cpu_level())
    return next(found for name in reversed(BUILDS[: level + 1]) if (found := built(name, folder)) is not None)


@cache
def built(name: str, folder: Path = FOLDER) -> Library | None:
    """One build by name, or None if it wasn't compiled; calling one that the processor can't run kills the process.

    A file that can't be loaded, or that lacks a function because it is of another version, counts as none, with one
    warning.
    """
    path = _file(name, folder)
    if path is None:
        return None
    try:
        functions = ctypes.CDLL(str(path))
        missing = [function for function in FUNCTIONS if not hasattr(functions, function)]
        problem = f"it lacks {missing[0]}" if missing else None
    except OSError as error:
        problem = str(error)
    if problem is not None:
        warnings.warn(
            f"the compiled CPU kernels {path.name} aren't used ({problem}) and compress runs slower; reinstall it",
            stacklevel=2,
        )
        return None
    functions.compress_cpu_level.restype = ctypes.c_int64
    return Library(name, functions)


def _file(name: str, folder: Path) -> Path | None:
    paths = (folder / f"_{name}{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


def runnable() -> tuple[Library, ...]:
    """Every compiled build that this processor can run, from the plainest to the best; for tests and ``doctor``."""
    portable = built("portable", FOLDER)
    if portable is None:
        return ()
    level = int(portable.functions.compress_cpu_level())
    return tuple(found for name in BUILDS[: level + 1] if (found := built(name, FOLDER)) is not None)
