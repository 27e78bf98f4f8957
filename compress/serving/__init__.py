"""An OpenAI-compatible server for one loaded model.

A request goes through ``guard.py`` (key, size), ``schema.py`` (is it valid, and can all of it be honoured),
``prepare.py`` (chat template, tokens, room in the context), ``engine.py`` (a bounded queue before worker threads that
generate) and ``replies.py`` (the answer, whole or streamed). ``app.py`` joins them, ``server.py`` runs them.

The names below are loaded when first used, so that the command line can look at the settings without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from compress.serving.settings import Settings

if TYPE_CHECKING:
    from compress.serving.app import create_app as create_app
    from compress.serving.server import serve as serve

__all__ = ["Settings", "create_app", "serve"]

_HOMES = {"create_app": "compress.serving.app", "serve": "compress.serving.server"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
