"""Compiled builds that are missing, broken or of another version."""

import os
import re
import shutil
import subprocess
import sys
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
from compress.kernels import native

needs_a_build = pytest.mark.skipif(native.library() is None, reason="no C++ compiler was there")


def place(folder: Path, name: str) -> Path:
    return folder / f"_{name}{EXTENSION_SUFFIXES[0]}"


def copied(folder: Path, *names: str) -> None:
    for name in names:
        shutil.copy(place(native.FOLDER, name), place(folder, name))


def told(folder: Path) -> tuple[native.Library | None, list[str]]:
    """What is loaded from a folder, asked for twice, and the warnings of both times."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = native.library(folder)
        assert native.library(folder) is found
    return found, [str(warning.message) for warning in caught]


def test_no_build(tmp_path: Path) -> None:
    found, (warning,) = told(tmp_path)
    assert found is None
    assert "install a C++ compiler" in warning


@pytest.mark.parametrize("content", [b"", b"no library at all"])
def test_a_broken_build(tmp_path: Path, content: bytes) -> None:
    path = place(tmp_path, "portable")
    path.write_bytes(content)
    found, (warning,) = told(tmp_path)
    assert found is None
    assert path.name in warning
    assert "reinstall" in warning


@needs_a_build
def test_a_build_of_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied(tmp_path, "portable")
    monkeypatch.setattr(native, "FUNCTIONS", (*native.FUNCTIONS, "compress_later"))
    found, (warning,) = told(tmp_path)
    assert found is None
    assert "it lacks compress_later" in warning


@needs_a_build
def test_a_broken_build_leaves_the_next_best(tmp_path: Path) -> None:
    best = native.runnable()[-1].name
    if best == "portable":
        pytest.skip("this processor runs the portable build alone")
    copied(tmp_path, "portable")
    place(tmp_path, best).write_bytes(b"no library at all")
    found, (warning,) = told(tmp_path)
    assert found is not None
    assert found.name == "portable"
    assert f"_{best}" in warning


@needs_a_build
@pytest.mark.skipif(sys.platform != "linux", reason="limits and their counts are those of Linux")
def test_threads_that_cannot_be_had() -> None:
    script, left = Path(__file__).with_name("no_threads.py"), 512 << 20
    command = f'ulimit -s {2 * left >> 10} || exit 77; exec "$@"'
    done = subprocess.run(
        ["sh", "-c", command, "sh", sys.executable, script, str(left)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 77:
        pytest.skip("stacks may not be so large here")
    assert (done.returncode, done.stdout) == (0, "linear equal\nattention equal\n"), done.stderr


def test_every_function_of_the_sources_is_asked_for() -> None:
    sources = [path.read_text() for kind in ("*.h", "cpu.cpp") for path in native.FOLDER.glob(kind)]
    declared = set(re.findall(r"^(?:int64_t|void) (compress_\w+)\(", "\n".join(sources), re.MULTILINE))
    assert declared == set(native.FUNCTIONS)
