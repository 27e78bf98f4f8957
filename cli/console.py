"""How a run looks: a progress bar over layers and a line a module on a terminal, plain lines in a log file."""

import math
import sys
from typing import TextIO

from rich.console import Console as Terminal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as RemainingColumn

from compress.events import Event, LayerDone, LayerStarted, Message, ModuleDone, StageDone, StageStarted, StepDone


class Console:
    """Shows events on a stream; use it as a context manager, so that the bar is gone when the run is over.

    Args:
        stream: stderr by default, so that stdout holds nothing but the result.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._terminal = Terminal(file=stream or sys.stderr, highlight=False, markup=False, soft_wrap=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            RemainingColumn(),
            console=self._terminal,
            transient=True,
            disable=not self._terminal.is_terminal,
        )
        self._bar: TaskID | None = None
        self._stage = ""

    def __enter__(self) -> "Console":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def on_event(self, event: Event) -> None:
        """Show one event; hand this to ``compress.run(on_event=...)``."""
        match event:
            case StageStarted(name, total, unit):
                self._stage = name
                self._line(f"{name}: {total} {unit}" if total else name)
                self._replace_bar(total)
            case LayerStarted(index, total):
                self._update_bar(f"{self._stage} {index + 1}/{total}")
            case ModuleDone():
                self._line(module_line(event))
            case LayerDone(index, total, seconds):
                self._update_bar(f"{self._stage} {index + 1}/{total}", completed=index + 1)
                if not self._terminal.is_terminal:
                    self._line(f"layer {index + 1}/{total} done  {seconds:.1f} s")
            case StepDone(index, total, seconds, told):
                self._update_bar(f"{self._stage} {index + 1}/{total}  {told}", completed=index + 1)
                if not self._terminal.is_terminal:
                    self._line(f"step {index + 1}/{total} done  {told}  {seconds:.1f} s")
            case Message(text, level):
                self._line(f"warning: {text}" if level == "warning" else text)
            case StageDone(name, seconds):
                self._replace_bar(0)
                self._line(f"{name} done  {seconds:.1f} s")

    def _line(self, text: str) -> None:
        self._terminal.print(text)

    def _replace_bar(self, total: int) -> None:
        if self._bar is not None:
            self._progress.remove_task(self._bar)
        self._bar = self._progress.add_task(self._stage, total=total) if total else None

    def _update_bar(self, description: str, completed: int | None = None) -> None:
        if self._bar is not None:
            self._progress.update(self._bar, description=description, completed=completed)


def module_line(done: ModuleDone) -> str:
    """``model.layers.3.self_attn.q_proj  W3 g64  rel.err 0.0123  damp 0.01  0.4 s``, without what wasn't measured."""
    parts = [done.name, f"W{done.bits} {'channel' if done.group_size == -1 else f'g{done.group_size}'}"]
    if done.relative_error is not None and not math.isnan(done.relative_error):
        parts.append(f"rel.err {done.relative_error:.3g}")
    if done.damp is not None and not math.isnan(done.damp):
        parts.append(f"damp {done.damp:g}")
    parts.append(f"{done.seconds:.1f} s")
    if done.note:
        parts.append(f"({done.note})")
    return "  ".join(parts)
