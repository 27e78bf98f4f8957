"""``compress bench`` as a user meets it; what it calls is replaced by stand-ins."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner, Result
from compress.cli.main import main

from compress.options import BenchOptions

SECTION = {
    "model": "m",
    "baseline": "b",
    "device": "cpu",
    "threads": 2,
    "dtype": "float32",
    "prompt_tokens": 8,
    "new_tokens": 4,
    "rounds": 3,
    "spread": "min-max",
    "rows": [],
    "kv": [],
    "notes": [],
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What is asked of ``compress.bench``; an artifact called ``other`` can't be saved to."""
    found: list[tuple[Any, ...]] = []
    module: Any = ModuleType("compress.bench")

    def bench(model: str, against: str, options: BenchOptions, on_event: Any) -> dict[str, Any]:
        found.append(("bench", model, against, options))
        return SECTION

    def save(artifact: str, against: str, section: dict[str, Any]) -> Path | None:
        found.append(("save", artifact, against, section))
        return None if artifact == "other" else Path(artifact) / "report.json"

    module.bench, module.save = bench, save
    monkeypatch.setitem(sys.modules, "compress.bench", module)
    return found


def invoke(*line: str) -> Result:
    result = CliRunner().invoke(main, ["bench", *line])
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def test_defaults_are_those_of_the_options(calls: list[tuple[Any, ...]]) -> None:
    result = invoke("out")
    assert calls == [("bench", "out", "dense", BenchOptions()), ("save", "out", "dense", SECTION)]
    assert result.stdout.splitlines()[0] == "m against b: cpu, 2 threads, float32, 8 + 4 tokens, 3 rounds"
    assert result.stderr.splitlines()[-1] == "saved in out/report.json"


def test_every_option_arrives(calls: list[tuple[Any, ...]]) -> None:
    line = "out --against x --prompt-tokens 9 --new-tokens 5 --rounds 2 --lengths 7,2048 --dtype bfloat16 --seed 4"
    result = invoke(*line.split(), "--one-at-a-time", "--no-save", "--device", "cpu", "--trust-remote-code", "--json")
    assert calls == [("bench", "out", "x", BenchOptions(9, 5, 2, (7, 2048), "cpu", "bfloat16", True, 4, True))]
    assert json.loads(result.stdout) == SECTION
    assert "saved" not in result.stderr


def test_what_is_not_saved_is_said(calls: list[tuple[Any, ...]]) -> None:
    assert "not saved" in invoke("other", "--against", "x").stderr


@pytest.mark.parametrize(
    "line",
    ["", "out --rounds 0", "out --new-tokens 1", "out --lengths 5,x", "out --lengths 0", "out --device gpu"],
)
def test_bad_options(calls: list[tuple[Any, ...]], line: str) -> None:
    result = CliRunner().invoke(main, ["bench", *line.split()])
    assert result.exit_code == 2
    assert not calls
