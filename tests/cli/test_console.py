import io

import pytest
from compress.cli.console import Console, module_line

from compress.events import LayerDone, LayerStarted, Message, ModuleDone, StageDone, StageStarted

Q_PROJ = ModuleDone("model.layers.3.self_attn.q_proj", 3, 64, 0.01234, 0.01, 0.42)
RUN = [
    StageStarted("calibration"),
    Message("128 windows of 2048 tokens"),
    StageDone("calibration", 1.04),
    StageStarted("weights", 2),
    LayerStarted(0, 2),
    Q_PROJ,
    LayerDone(0, 2, 12.34),
    LayerStarted(1, 2),
    Message("[layer 1] was singular", "warning"),
    LayerDone(1, 2, 11),
    StageDone("weights", 23.4),
]


def test_a_log_file_gets_plain_lines():
    stream = io.StringIO()
    with Console(stream) as console:
        for event in RUN:
            console.on_event(event)
    assert stream.getvalue().splitlines() == [
        "calibration",
        "128 windows of 2048 tokens",
        "calibration done  1.0 s",
        "weights: 2 layers",
        "model.layers.3.self_attn.q_proj  W3 g64  rel.err 0.0123  damp 0.01  0.4 s",
        "layer 1/2 done  12.3 s",
        "warning: [layer 1] was singular",
        "layer 2/2 done  11.0 s",
        "weights done  23.4 s",
    ]


def test_a_terminal_gets_a_bar_over_layers_and_a_line_a_module(monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with Console(stream) as console:
        for event in RUN[:7]:
            console.on_event(event)
        console.on_event(LayerStarted(1, 2))
    shown = stream.getvalue()
    assert module_line(Q_PROJ) in shown
    assert "weights 2/2" in shown
    assert "1/2" in shown
    assert "layer 1/2 done" not in shown
    assert shown.endswith("\x1b[2K")  # the bar is wiped out when the run is over


def test_a_long_line_is_not_cut():
    stream = io.StringIO()
    with Console(stream) as console:
        console.on_event(Message("x " * 500))
    assert stream.getvalue() == "x " * 500 + "\n"


def fail_under(console):
    with console:
        console.on_event(StageStarted("weights", 2))
        raise ValueError("stop")


def test_an_error_takes_the_bar_away_and_gives_the_cursor_back(monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setenv("TERM", "xterm")
    with pytest.raises(ValueError, match="stop"):
        fail_under(Console(stream))
    hidden, shown = stream.getvalue().rfind("\x1b[?25l"), stream.getvalue().rfind("\x1b[?25h")
    assert 0 <= hidden < shown


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (Q_PROJ, "model.layers.3.self_attn.q_proj  W3 g64  rel.err 0.0123  damp 0.01  0.4 s"),
        (ModuleDone("m", 8, 64, 1.234e-5, 0.01, 1), "m  W8 g64  rel.err 1.23e-05  damp 0.01  1.0 s"),
        (ModuleDone("m", 4, -1, None, None, 1), "m  W4 channel  1.0 s"),
        (ModuleDone("m", 4, 128, float("nan"), float("nan"), 1), "m  W4 g128  1.0 s"),
        (
            ModuleDone("m", 2, 32, 0.5, 0.1, 0, "rounded to nearest"),
            "m  W2 g32  rel.err 0.5  damp 0.1  0.0 s  (rounded to nearest)",
        ),
    ],
)
def test_module_line(event, line):
    assert module_line(event) == line
