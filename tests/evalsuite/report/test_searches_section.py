"""The page's section on searches for far tokens."""

from typing import Any

from compress.evalsuite.report import render

LAYER = {
    "layer": 3,
    "recall": 0.8125,
    "recall_of_sink_and_window": 0.6,
    "search_seconds": 0.05,
    "attention_seconds": 0.15,
    "dense_seconds": 0.5,
}
ESTIMATOR = {"layer": 3, "heads": [0, 2], "before": 3.5, "after": 1.25, "mean_map": 1.3, "grid": 0.75}


def report(**changed: Any) -> dict[str, Any]:
    found = {"method": "hip", "summary": "HiP: 4 KV heads", "measured_tokens": 4096, "layers": [LAYER]}
    return {"sparse": {**found, **changed}}


def test_recall_and_time_of_layers_are_shown() -> None:
    page = render(report(), "out")
    for told in (
        "Tokens that are searched for",
        "layer 3",
        "81.2 %",
        "60.0 %",
        "0.050",
        "0.150",
        "2.50×",
        "4,096 tokens",
    ):
        assert told in page
    assert "Estimator" not in page


def test_estimators_are_shown_where_there_are_some() -> None:
    page = render(report(estimators=[ESTIMATOR]), "out")
    assert "Average map" in page
    assert "1.250" in page


def test_what_was_not_measured_is_left_out() -> None:
    page = render(report(layers=[]), "out")
    assert "Tokens that are searched for" in page
    assert "Dense / both" not in page
    assert "Tokens that are searched for" not in render({}, "out")
