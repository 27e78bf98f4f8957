"""How ``report.json`` is laid out: indented, with one line a record and one line a list of figures.

A report holds a figure for every question and every module. With one line each, their lines would bury the rest, and a
difference between two reports couldn't be read.
"""

import json
from typing import Any

WIDTH = 120


def report_text(report: dict[str, Any]) -> str:
    """A report as JSON text; what reads JSON reads it back equal.

    A value takes one line if that is short enough, if it is a list of figures, or if it is a record: an entry of a list
    that holds no list or mapping of its own.

    Args:
        report: the content of ``report.json``; what JSON doesn't know is told as text.
    """
    return _laid_out(json.loads(json.dumps(report, default=str)), 0) + "\n"


def _laid_out(value: Any, depth: int, before: int = 0, entry: bool = False) -> str:
    """A value as text whose first line begins behind ``before`` characters of its own line.

    Args:
        value: of JSON types.
        depth: of the line, in spaces.
        before: the width of the key.
        entry: whether it stands in a list.
    """
    line = json.dumps(value)
    if depth + before + len(line) < WIDTH or not isinstance(value, dict | list) or _one_line(value, entry):
        return line
    inner = " " * (depth + 1)
    if isinstance(value, list):
        parts = [inner + _laid_out(item, depth + 1, entry=True) for item in value]
        return "\n".join(["[", ",\n".join(parts), f"{' ' * depth}]"])
    keys = {f"{json.dumps(key)}: ": item for key, item in value.items()}
    parts = [inner + key + _laid_out(item, depth + 1, len(key)) for key, item in keys.items()]
    return "\n".join(["{", ",\n".join(parts), f"{' ' * depth}}}"])


def _one_line(value: dict[str, Any] | list[Any], entry: bool) -> bool:
    """Whether a value is a list of figures or a flat record, however long."""
    if isinstance(value, list):
        return all(item is None or isinstance(item, int | float) for item in value)
    return entry and not any(isinstance(item, dict | list) for item in value.values())
