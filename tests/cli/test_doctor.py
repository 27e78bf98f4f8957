"""``compress doctor``: the machine and the kernels, as a user sees them."""

import json

import pytest
from click.testing import CliRunner
from compress.cli.main import main
from compress.kernels.aot import Readout, Row

import compress.doctor
from compress import doctor

GOOD = Row("op", "w4", "sm_90", Readout(96, 0, 16600, {"HGMMA": 8}, 0, 0), 1.0, ())
SPILLED = Row("op", "w4", "sm_80", Readout(255, 56, 16600, {}, 2, 0), 1.0, ("spills: 56 bytes of stack a thread",))
BROKEN = Row("op", "w2", "sm_80", None, 1.0, ("doesn't compile: no",))


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(compress.doctor, "hub_problem", lambda: "the Hub is switched off")


def invoke(*arguments):
    return CliRunner().invoke(main, ["doctor", *arguments])


def test_says_what_is_there():
    result = invoke()
    assert result.exit_code == 0
    found = dict(line.split("  ", 1) for line in result.stdout.splitlines())
    assert found["compress"].strip() == "0.1.0"
    assert "the Hub is switched off" in found["Hub"]
    assert json.loads(invoke("--json").stdout).keys() == {name.strip() for name in found}


def test_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(doctor.native, "runnable", lambda: ())
    monkeypatch.setattr(doctor, "_PACKAGES", ("surely-not-installed",))
    lines = invoke().stdout
    assert "no C++ compiler was there" in lines
    assert "surely-not-installed  not installed" in lines


def test_kernels_within_their_limits(monkeypatch):
    monkeypatch.setattr(doctor, "rows", lambda cache, jobs: [GOOD])
    result = invoke("--kernels", "--jobs", "1")
    assert result.exit_code == 0
    assert "op         w4             sm_90   96    0      16600   8 HGMMA  0    ok" in result.stdout
    assert result.stdout.endswith("1 kernels compiled, 0 outside their limits\n")


def test_kernels_outside_their_limits(monkeypatch):
    monkeypatch.setattr(doctor, "rows", lambda cache, jobs: [GOOD, SPILLED, BROKEN])
    result = invoke("--kernels")
    assert result.exit_code == 1
    assert "spills: 56 bytes" in result.stdout
    assert "doesn't compile: no" in result.stdout
    assert "3 kernels compiled, 2 outside" in result.stdout
    printed = invoke("--kernels", "--json")
    assert printed.exit_code == 1
    assert json.loads(printed.stdout)["kernels"][1]["readout"]["stack"] == 56


@pytest.mark.parametrize(
    ("name", "value", "problem"), [("AVAILABLE", False, "isn't installed"), ("interpreting", lambda: True, "INTERPRET")]
)
def test_kernels_without_a_compiler(monkeypatch, name, value, problem):
    monkeypatch.setattr(doctor.triton_support, name, value)
    result = invoke("--kernels")
    assert result.exit_code == 2
    assert problem in result.stderr
