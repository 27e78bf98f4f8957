"""Giving memory back: what Python and the C library keep of finished work adds to the next step's peak."""

import ctypes
import gc
import sys


def release() -> None:
    """Collect garbage, then :func:`trim`."""
    gc.collect()
    trim()


def trim() -> None:
    """With the GNU C library, return free heap pages to the operating system; elsewhere nothing happens.

    Worker threads allocate from heaps of their own, and glibc keeps those at their largest: after a run over the layers
    of a 135M model that was 300 MB, a fifth of the peak (docs/log.md). Once a large block was freed, glibc also takes
    further blocks of up to that size (at most 32 MB) from its heaps, and keeps twice as much of them free.
    """
    if sys.platform == "linux" and (give_back := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        give_back(0)
