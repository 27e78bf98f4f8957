"""The page's section on attention calibration."""

from typing import Any

import pytest
from compress.evalsuite.report import render

LAYERS = [
    {"layer": 0, "sinks": 0.5, "slopes": [0.0, -0.1], "calibrated": []},
    {"layer": 1, "sinks": 1.5, "slopes": [0.4, 0.02], "calibrated": [0]},
]
CHECK = {"difference": -0.0312, "low": -0.05, "high": -0.01, "n": 38, "p_value": 0.015}


def report(**changed: Any) -> dict[str, Any]:
    act = {
        "summary": "1 KV heads gain by sinks of 0.4 of their weight",
        "beta": 0.4,
        "threshold": None,
        "alpha": 5.0,
        "objective": "answer",
        "calibrated": True,
        "heads": [{"layer": 1, "head": 0, "t": 3.21, "p": 0.0007}],
        "held_out": {"loss": CHECK, "right": None},
        "questions": {"choosing": 154, "held_out": 38, "sources": ["piqa"], "median_tokens": 27},
        "layers": LAYERS,
    }
    return {"act": {**act, **changed}}


def test_heads_and_what_they_bring_are_shown() -> None:
    page = render(report(), "out")
    for told in ("Attention sinks with less weight", "layer 1, KV head 0", "−0.0312", "154 questions choose", "piqa"):
        assert told in page
    assert "0.4 of what it was" in page
    assert "above 5 times the average" in page


def test_a_published_threshold_and_a_choice_are_told() -> None:
    page = render(report(threshold=0.1, alpha=None, objective="choice"), "out")
    assert "above 10.0 %" in page
    assert "the choice of an answer" in page


@pytest.mark.parametrize("changed", [{"calibrated": False, "heads": [], "held_out": None}, {"layers": []}])
def test_what_was_not_found_is_left_out(changed: dict[str, Any]) -> None:
    page = render(report(**changed), "out")
    assert "Attention sinks with less weight" in page
    if not changed.get("layers", LAYERS):
        assert "sinks-map" not in page
    if changed.get("held_out", CHECK) is None:
        assert "On questions held out" not in page


def test_a_report_without_it_has_no_such_section() -> None:
    assert "Attention sinks with less weight" not in render({"share": None}, "out")
