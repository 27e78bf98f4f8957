"""Giving memory back: what Python and the C library keep of finished work adds to the next step's peak."""

import ctypes
import ctypes.util
import gc


def release() -> None:
    """Collect garbage and, with the GNU C library, return free heap pages to the operating system.

    Worker threads allocate from heaps of their own, and glibc keeps those at their largest: after a run over the layers
    of a 135M model that was 300 MB, a fifth of the peak (docs/log.md).
    """
    gc.collect()
    name = ctypes.util.find_library("c")
    trim = getattr(ctypes.CDLL(name), "malloc_trim", None) if name else None
    if trim is not None:
        trim(0)
