"""The face of optimum: its quantizer class, and a command of its command line."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from compress.calibrate.errors import InputError
from optimum.commands.optimum_cli import main
from optimum.quantization_base import OptimumQuantizer
from runs import Log, digest, quick

from compress.events import LayerDone
from compress.optimum_quantizer import CompressQuantizer

Tiny = Callable[[str], Path]
SETS = ("eval=null", "weights.group_size=8", "weights.clip_grid=4")


@pytest.fixture(scope="module")
def expected(tiny: Tiny, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What ``compress.run`` leaves behind."""
    return digest(quick(tiny("llama"), "rtn", tmp_path_factory.mktemp("plain") / "out", text).out)


def test_the_quantizer_runs_a_recipe(tiny: Tiny, tmp_path: Path, expected: dict[str, str]) -> None:
    log = Log()
    quantizer = CompressQuantizer.from_pretrained(tiny("llama"))
    assert isinstance(quantizer, OptimumQuantizer)
    result = quantizer.quantize(save_dir=tmp_path / "out", recipe="rtn", set=SETS, on_event=log)
    assert digest(tmp_path / "out") == expected
    assert result.report["recipe"]["name"] == "rtn"
    assert len(log.of(LayerDone)) == 3


def test_a_gguf_file_in_a_folder(tiny: Tiny, tmp_path: Path) -> None:
    file = tiny("llama.gguf")
    quantizer = CompressQuantizer.from_pretrained(file.parent, file_name=file.name)
    recipe: dict[str, Any] = {"weights": {"method": "rtn", "group_size": 8, "clip": "none"}}
    quantizer.quantize(tmp_path / "out", recipe=recipe)
    assert (tmp_path / "out" / "model.safetensors").is_file()
    with pytest.raises(InputError, match="file_prefix"):
        quantizer.quantize(tmp_path / "other", "prefix", recipe=recipe)


def test_optimum_cli_lists_the_command() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("optimum-cli")), "--help"], capture_output=True, text=True, check=True
    )
    assert any(line.split()[:1] == ["compress"] for line in done.stdout.splitlines()), done.stdout


def cli(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["optimum-cli", "compress", *map(str, arguments)])
    main()


def test_the_command_does_what_compress_run_does(
    tiny: Tiny,
    tmp_path: Path,
    expected: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sets = [part for item in SETS for part in ("--set", item)]
    cli(monkeypatch, "-m", tiny("llama"), "-o", tmp_path / "out", "--recipe", "rtn", *sets)
    assert digest(tmp_path / "out") == expected
    assert capsys.readouterr().out.startswith(f"llama -> {tmp_path / 'out'}")


def test_bad_input_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli(monkeypatch, "-m", tmp_path / "nothing", "-o", tmp_path / "out")
    assert stopped.value.code == 2
    told = capsys.readouterr().err.splitlines()
    assert told[-1].startswith("error: --model")
