"""The wheel holds everything, as seen from a folder that isn't the project's."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from compress.kernels import native
from runs import quick

from compress.runtime import load

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


UNCOMPILED = """
import sys, warnings
from pathlib import Path
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import compress
    from compress.kernels import native
    from compress.kernels.quant_linear import path
    from compress.runtime import PackedLinear
    assert Path(compress.__file__).is_relative_to(Path(sys.argv[1])), compress.__file__
    assert native.library() is None and not list(native.FOLDER.glob("*.so"))
    model, tokenizer = compress.load(sys.argv[2])
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert layers and {path(torch.ones(1, layer.in_features), layer.packed) for layer in layers} == {"reference"}
    ids = tokenizer("in a hen", return_tensors="pt").input_ids
    made = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    compress.load(sys.argv[2])
told = [str(warning.message) for warning in caught if "compress" in str(warning.message)]
assert len(told) == 1 and "install a C++ compiler" in told[0], told
print(made[0].tolist())
"""


BUILDS = {f"compress.kernels.native._{name}" for name in native.BUILDS}  # on x86 with a compiler, as tests run


def modules() -> set[str]:
    """The names of all modules and packages of the project, from its files."""
    found = set()
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found.add(".".join(parts if room == "compress" else ("compress", *parts)).removesuffix(".__init__"))
    return {name for name in found if not name.startswith(OPTIMUM)} - {"compress"}


def installed(target: Path, folder: Path, **variables: str) -> dict[str, str]:
    """Build a wheel with some environment variables and install it; returns the environment to use it in."""
    source = folder / "source"
    source.mkdir()
    for room in ROOMS:  # a copy, because a build leaves its folders behind
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source / file)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    building = {**os.environ, **variables}
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source, env=building)
    (wheel,) = folder.glob("compress-*.whl")
    run(*pip, "install", "--no-deps", "--target", target, wheel)
    environment = {**os.environ, "PYTHONPATH": str(target)}
    environment.pop("PYTHONSAFEPATH", None)
    return environment


@pytest.mark.slow
def test_the_wheel_works_from_elsewhere(tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = installed(target, tmp_path)
    told = run(sys.executable, "-c", USE, target, cwd=elsewhere, env=environment)
    assert set(told.split()) == modules() | BUILDS
    assert (target / "optimum" / "commands" / "register" / "register_compress.py").is_file()
    listed = run(sys.executable, target / "bin" / "compress", "recipes", cwd=elsewhere, env=environment)
    assert "rsq-paper" in listed
    assert not (set(ROOMS) - {"compress"}) & {path.name for path in target.iterdir()}


@pytest.mark.slow
def test_an_install_without_a_compiler(tmp_path: Path, tiny: Callable[[str], Path], text: Path) -> None:
    artifact = quick(tiny("llama"), "rtn", tmp_path / "artifact", text).out
    target, elsewhere, building = (tmp_path / name for name in ("target", "elsewhere", "building"))
    elsewhere.mkdir()
    building.mkdir()
    nowhere = str(tmp_path / "no compiler")
    environment = installed(target, building, CC=nowhere, CXX=nowhere)
    told = run(sys.executable, "-c", UNCOMPILED, target, artifact, cwd=elsewhere, env=environment)
    model, tokenizer = load(artifact)
    ids = tokenizer("in a hen", return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert json.loads(told) == expected[0].tolist()
