"""Fixtures for all tests: tiny random models, built once a session."""

from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from models import save_tiny, save_tiny_gguf


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``tiny(name)`` is the path of a tiny model, shared by all tests: copy it before you change it.

    Names: the keys of ``models.CONFIGS`` for a folder with safetensors and a tokenizer; with ``.gguf`` behind it for a
    float32 GGUF file, with ``-q8_0.gguf`` for a quantized one (llama only: rows must divide by 32).
    """
    root = tmp_path_factory.mktemp("tiny")

    def build(name: str) -> Path:
        path = root / name
        if path.exists():
            return path
        if name.endswith("-q8_0.gguf"):
            return save_tiny_gguf(name.removesuffix("-q8_0.gguf"), path, gguf.GGMLQuantizationType.Q8_0)
        if name.endswith(".gguf"):
            return save_tiny_gguf(name.removesuffix(".gguf"), path)
        return save_tiny(name, path)

    return build
