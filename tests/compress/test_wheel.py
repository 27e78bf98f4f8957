"""The wheel holds everything, as seen from a folder that isn't the project's."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from compress.kernels import native

ROOT = Path(__file__).parents[2]
ROOMS = ("calibrate", "cli", "compress", "evalsuite", "kernels")
OPTIMUM = "compress.cli.optimum."  # goes where optimum-cli looks for it

USE = """
import pkgutil, sys
from importlib.resources import files
from pathlib import Path
import compress, compress.kernels.hadamard, compress.kernels.native, compress.kernels.packing
from compress.cli.main import main
from compress.recipe import Recipe
here = Path(sys.argv[1])
assert Path(compress.__file__).is_relative_to(here), compress.__file__
assert Path(compress.kernels.__file__).is_relative_to(here), compress.kernels.__file__
assert {"rtn", "gptq", "rsq", "rsq-paper"} <= set(Recipe.shipped())
assert "front_matter" in (files("compress.artifact") / "card.md.j2").read_text()
assert all((files("compress.evalsuite.report") / name).is_file() for name in ("page.html.j2", "page.css"))
assert (files("compress") / "py.typed").is_file()
assert (files("compress.kernels.native") / "quant_linear.cpp").is_file()
assert compress.kernels.native.library() is not None
print("\\n".join(module.name for module in pkgutil.walk_packages(compress.__path__, "compress.")))
"""


def run(*command: object, **kwargs: object) -> str:
    line = [str(part) for part in command]
    done = subprocess.run(line, capture_output=True, text=True, check=False, **kwargs)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


BUILDS = {f"compress.kernels.native._{name}" for name in native.BUILDS}  # on x86 with a compiler, as tests run


def modules() -> set[str]:
    """The names of all modules and packages of the project, from its files."""
    found = set()
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found.add(".".join(parts if room == "compress" else ("compress", *parts)).removesuffix(".__init__"))
    return {name for name in found if not name.startswith(OPTIMUM)} - {"compress"}


@pytest.mark.slow
def test_the_wheel_works_from_elsewhere(tmp_path: Path) -> None:
    source, target, elsewhere = tmp_path / "source", tmp_path / "target", tmp_path / "elsewhere"
    source.mkdir()
    elsewhere.mkdir()
    for room in ROOMS:  # a copy, because a build leaves its folders behind
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source / file)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source)
    (wheel,) = tmp_path.glob("compress-*.whl")
    run(*pip, "install", "--no-deps", "--target", target, wheel)
    environment = {**os.environ, "PYTHONPATH": str(target)}
    environment.pop("PYTHONSAFEPATH", None)
    told = run(sys.executable, "-c", USE, target, cwd=elsewhere, env=environment)
    assert set(told.split()) == modules() | BUILDS
    assert (target / "optimum" / "commands" / "register" / "register_compress.py").is_file()
    listed = run(sys.executable, target / "bin" / "compress", "recipes", cwd=elsewhere, env=environment)
    assert "rsq-paper" in listed
    assert not (set(ROOMS) - {"compress"}) & {path.name for path in target.iterdir()}
