"""Compress a pretrained language model with one command, and prove what it cost.

The names below are loaded when first used: ``import compress`` itself pulls in neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.artifact.hub import push as push
    from compress.pipeline import run as run
    from compress.runtime import load as load

__version__ = "0.1.0"
__all__ = ["__version__", "load", "push", "run"]

_HOMES = {"load": "compress.runtime", "push": "compress.artifact.hub", "run": "compress.pipeline"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
