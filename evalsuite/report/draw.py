"""The five kinds of chart, drawn with matplotlib at a given width in pixels.

Every chart is drawn twice, once for a page and once for a phone, so that its text is never scaled down.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from compress.evalsuite.report.svg import RAMP, Drawing, role
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

WIDE, NARROW = 960, 340
FONT = 12
MARKERS = ("o", "s", "D", "^", "v", "P")
"""Markers of series, so that colour isn't all that tells them apart."""

MARKER_TEXT = ("●", "■", "◆", "▲", "▼", "✚")
"""The same markers as characters, for a legend."""

Ticks = tuple[str, Callable[[float], str]]
"""The name of an axis, and how its numbers are written."""

_EM = 0.58  # mean width of a character, in font sizes
_BOLD = 1.2  # of the width of bold characters to that of others


@dataclass(frozen=True)
class Bar:
    """A horizontal bar: ``text`` stands at its end, ``title`` appears over it."""

    label: str
    value: float
    text: str
    colour: str = "series-0"
    title: str = ""


@dataclass(frozen=True)
class Cell:
    """A field of a grid: its colour, the text on it, and the text that appears over it."""

    colour: str
    text: str = ""
    title: str = ""


@dataclass(frozen=True)
class Interval:
    """A figure with its range; without a range it is a point."""

    value: float
    low: float | None
    high: float | None
    colour: str
    series: int = 0
    title: str = ""


@dataclass(frozen=True)
class Line:
    """A line through points, or points alone; ``label`` stands beside the last of them."""

    x: tuple[float, ...]
    y: tuple[float, ...]
    series: int
    colour: str
    titles: tuple[str, ...] = ()
    label: str = ""


def bars(width: int, items: Sequence[Bar]) -> Drawing:
    """Horizontal bars from zero, with their labels before them, or above them where there is little room."""
    longest = max(len(item.label) for item in items)
    above = width < WIDE and longest > 21
    step = 46 if above else 26
    left = 2 if above else _text_width(longest) + 10
    room = width - left - _BOLD * _text_width(max(len(item.text) for item in items)) - 12
    top = max(item.value for item in items) or 1.0
    figure, axes = _pixels(width, step * len(items) + 4)
    boxes = []
    for index, item in enumerate(items):
        middle = 2 + (index + 0.5) * step + (10 if above else 0)
        end = left + max(room * item.value / top, 1.5)
        boxes.append([(left, middle - 9), (end, middle - 9), (end, middle + 9), (left, middle + 9)])
        _text(axes, end + 7, middle, item.text, "left", weight="bold")
        if above:
            _text(axes, left, middle - 20, item.label, "left")
        else:
            _text(axes, left - 8, middle, item.label, "right")
    colours = [role(item.colour) for item in items]
    axes.add_collection(PolyCollection(boxes, facecolors=colours, edgecolors="none", gid="bars"), autolim=False)
    return Drawing(figure, {"bars": tuple(item.title for item in items)})


def grids(
    width: int,
    panels: Sequence[tuple[str, Mapping[tuple[int, int], Cell]]],
    rows: Sequence[str],
    columns: Sequence[str],
    axis_names: tuple[str, str] = ("", ""),
) -> Drawing:
    """Coloured fields, in one panel or in several with the same rows and columns.

    Panels stand side by side where they fit. Column labels that would touch are left out, so many columns keep every
    fifth or tenth.

    Args:
        width: in pixels; several panels may take less.
        panels: title of each and its cells by (row, column); an absent cell stays empty.
        rows: labels from top to bottom.
        columns: labels from left to right.
        axis_names: what rows and columns are.
    """
    left = _text_width(max(max(map(len, rows), default=1), len(axis_names[0]))) + 12
    widest = _text_width(max(map(len, columns), default=1)) + 4
    titled = 4 + _BOLD * _text_width(max(len(title) for title, _ in panels)) - left
    room = max(titled, _text_width(len(axis_names[1])))  # what stands above the cells
    least = max(38.0, widest, room / len(columns)) if len(panels) > 1 else 0.0
    beside = min(len(panels), max(1, int((width + 20) / (left + least * len(columns) + 20))))
    gap = 20.0 if beside > 1 else 0.0
    cell = min(((width + gap) / beside - gap - left - 2) / len(columns), max(60.0, least) if len(panels) > 1 else 88.0)
    height = 26.0 if len(rows) <= 12 else 19.0
    top = 24.0 + 18 * bool(axis_names[1]) + 24 * any(title for title, _ in panels)
    share, band = left + cell * len(columns) + gap + 2, top + height * len(rows) + 8
    size = (math.ceil(share * beside - gap), math.ceil(band * -(-len(panels) // beside)))
    figure, axes = _pixels(*size)
    titles: dict[str, tuple[str, ...]] = {}
    for index, (title, cells) in enumerate(panels):
        x, y = index % beside * share, index // beside * band
        if title:
            _text(axes, x + 4, y + 12, title, "left", weight="bold")
        _text(axes, x + left, y + top - 30, axis_names[1], "left", colour="muted")
        _text(axes, x + left - 8, y + top - 11, axis_names[0], "right", colour="muted")
        every = next((step for step in (1, 2, 5, 10, 20, 50) if widest <= cell * step), 100)
        for column in range(0, len(columns), every):
            _text(axes, x + left + (column + 0.5) * cell, y + top - 11, columns[column], "center")
        for row, label in enumerate(rows):
            _text(axes, x + left - 8, y + top + (row + 0.5) * height, label, "right")
        titles |= _cells(axes, cells, (x + left, y + top), (cell, height), f"cells-{index}")
    return Drawing(figure, titles)


def _cells(
    axes: Axes,
    cells: Mapping[tuple[int, int], Cell],
    corner: tuple[float, float],
    size: tuple[float, float],
    name: str,
) -> dict[str, tuple[str, ...]]:
    """Fields of one size from a corner, and their texts."""
    boxes = []
    for (row, column), cell in cells.items():
        x, y = corner[0] + column * size[0] + 0.75, corner[1] + row * size[1] + 0.75
        right, bottom = x + size[0] - 1.5, y + size[1] - 1.5
        boxes.append([(x, y), (right, y), (right, bottom), (x, bottom)])
        if cell.text and _text_width(len(cell.text)) <= size[0]:
            _text(axes, (x + right) / 2, (y + bottom) / 2, cell.text, "center", colour=_on(cell.colour))
    colours = [role(cell.colour) for cell in cells.values()]
    axes.add_collection(PolyCollection(boxes, facecolors=colours, edgecolors="none", gid=name), autolim=False)
    return {name: tuple(cell.title for cell in cells.values())}


def intervals(
    width: int,
    rows: Sequence[tuple[str, Sequence[Interval]]],
    reference: float,
    axis: Ticks,
    log: bool = False,
) -> Drawing:
    """Figures with their ranges around a reference line, one row a label.

    Args:
        width: in pixels.
        rows: label, and one interval for each series.
        reference: where nothing has changed.
        axis: its name, and how its numbers are written.
        log: whether the scale is logarithmic, for ratios.
    """
    longest = max(len(label) for label, _ in rows)
    above = width < WIDE and longest > 14
    tallest = max(len(items) for _, items in rows)
    step = max(26, 15 * tallest + 8) + (18 if above else 0)
    left = 12 if above else _text_width(longest) + 14
    height = step * len(rows) + 50
    figure, axes = _frame(width, height, (left, 18, 4, 46))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    if log:
        axes.set_xscale("log")
    axes.axvline(reference, color=role("muted"), linewidth=1.5, zorder=1)
    titles: dict[str, tuple[str, ...]] = {}
    for index, (label, items) in enumerate(rows):
        for item in items:
            shift = (item.series - (tallest - 1) / 2) * 15 / step if tallest > 1 else 0.0
            y = index + shift + (9 / step if above else 0)
            titles |= _interval(axes, item, y, f"interval-{index}-{item.series}")
        if above:
            axes.annotate(
                label, (0, index - 0.5), xycoords=("axes fraction", "data"), xytext=(-8, -9),
                textcoords="offset points", ha="left", va="center", fontsize=FONT, color=role("ink"),
            )  # fmt: skip
    _span(axes, [item for _, items in rows for item in items], reference, log)
    axes.set_yticks([] if above else range(len(rows)), [] if above else [label for label, _ in rows])
    if log:
        axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 1.5, 2, 3, 5, 7), numticks=99))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5 if width < WIDE else 9))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: axis[1](value)))
    _plain(axes)
    axes.grid(axis="x", color=role("line"), linewidth=1)
    axes.set_axisbelow(True)
    axes.set_xlabel(axis[0], fontsize=FONT, color=role("muted"))
    return Drawing(figure, titles)


def lines(width: int, series: Sequence[Line], x_axis: Ticks, y_axis: Ticks) -> Drawing:
    """Lines over a common axis, from zero upwards.

    Args:
        width: in pixels.
        series: what to draw.
        x_axis: name of the axis, and how its numbers are written.
        y_axis: the same.
    """
    drawing, axes = _plot(width, x_axis, y_axis)
    for index, line in enumerate(series):
        # the first is the widest, so that lines that coincide are all seen
        wide = 2 + 1.8 * (len(series) - 1 - index)
        axes.plot(line.x, line.y, zorder=3 + index, color=role(line.colour), linewidth=wide)
        drawing.titles |= _markers(axes, line, f"line-{index}", 7 if len(line.x) < 12 else 4)
    xs = sorted({x for line in series for x in line.x})
    if len(xs) <= 6:
        room = (xs[-1] - xs[0]) * 34 / (width - 82)  # what a label takes
        axes.set_xticks([x for x, after in zip(xs, [*xs[1:], math.inf], strict=True) if after - x >= room])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5 if width < WIDE else 10, integer=True))
    axes.set_ylim(0, max(y for line in series for y in line.y) * 1.08 or 1.0)
    return drawing


def points(width: int, series: Sequence[Line], x_axis: Ticks, y_axis: Ticks) -> Drawing:
    """One point a series with its label beside it; arguments as of :func:`lines`."""
    drawing, axes = _plot(width, x_axis, y_axis)
    xs = [line.x[0] for line in series]
    for index, line in enumerate(series):
        drawing.titles |= _markers(axes, line, f"point-{index}", 11)
        before = line.x[0] > (min(xs) + max(xs)) / 2
        axes.annotate(
            line.label, (line.x[0], line.y[0]), xytext=(-10 if before else 10, 0), textcoords="offset points",
            ha="right" if before else "left", va="center_baseline", fontsize=FONT, color=role("ink"),
        )  # fmt: skip
    axes.margins(0.12, 0.2)
    axes.xaxis.set_major_locator(MaxNLocator(4 if width < WIDE else 8))
    return drawing


def _plot(width: int, x_axis: Ticks, y_axis: Ticks) -> tuple[Drawing, Axes]:
    """Empty axes with horizontal lines; the name of the y axis stands above it."""
    height = 300 if width < WIDE else 340
    figure, axes = _frame(width, height, (62, 20, 30, 50))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: x_axis[1](value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: y_axis[1](value)))
    _plain(axes)
    axes.grid(axis="y", color=role("line"), linewidth=1)
    axes.set_axisbelow(True)
    axes.set_xlabel(x_axis[0], fontsize=FONT, color=role("muted"))
    figure.text(4 / width, 1 - 12 / height, y_axis[0], va="center", fontsize=FONT, color=role("muted"))
    return Drawing(figure), axes


def _markers(axes: Axes, line: Line, name: str, size: float) -> dict[str, tuple[str, ...]]:
    (markers,) = axes.plot(
        line.x, line.y, MARKERS[line.series % len(MARKERS)], markersize=size, color=role(line.colour),
        markeredgecolor=role("surface"), clip_on=False, zorder=20,
    )  # fmt: skip
    markers.set_gid(name)
    return {name: line.titles}


def _interval(axes: Axes, item: Interval, y: float, name: str) -> dict[str, tuple[str, ...]]:
    colour = role(item.colour)
    if item.low is not None and item.high is not None:
        axes.plot([item.low, item.high], [y, y], color=colour, linewidth=3, solid_capstyle="round", zorder=2)
    marker = MARKERS[item.series % len(MARKERS)]
    (point,) = axes.plot(
        [item.value], [y], marker, markersize=9, color=colour, markeredgecolor=role("surface"), markeredgewidth=1.2,
        zorder=3, clip_on=False,
    )  # fmt: skip
    return _named(point, name, item.title)


def _span(axes: Axes, items: Sequence[Interval], reference: float, log: bool) -> None:
    """Limits that show every interval and the reference, with air on both sides."""
    ends = [reference] + [end for item in items for end in (item.low, item.value, item.high) if end is not None]
    low, high = min(ends), max(ends)
    if log:
        air = max((high / low) ** 0.08, 1.06)
        axes.set_xlim(low / air, high * air)
    else:
        air = 0.08 * (high - low) or 1.0
        axes.set_xlim(low - air, high + air)


def _pixels(width: int, height: int) -> tuple[Figure, Axes]:
    """A figure whose axes count pixels from the upper left corner."""
    figure, axes = _frame(width, height, (0, 0, 0, 0))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.axis("off")
    return figure, axes


def _frame(width: int, height: float, margins: tuple[float, float, float, float]) -> tuple[Figure, Axes]:
    """A figure of the size in pixels with axes inside the margins (left, right, top, bottom)."""
    left, right, top, bottom = margins
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    inner = (width - left - right) / width, (height - top - bottom) / height
    axes = figure.add_axes((left / width, bottom / height, *inner))
    return figure, axes


def _plain(axes: Axes) -> None:
    """No frame and no tick marks, labels of one size."""
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(which="both", length=0, labelsize=FONT, labelcolor=role("ink"), pad=6)


def _text(
    axes: Axes, x: float, y: float, text: str, align: str, *, colour: str = "ink", weight: str = "normal"
) -> None:
    if text:
        axes.text(
            x,
            y,
            text,
            ha=align,
            va="center_baseline",
            fontsize=FONT,
            color=role(colour),
            fontweight=weight,
            clip_on=False,
        )


def _named(artist: Artist, name: str, title: str) -> dict[str, tuple[str, ...]]:
    """Give an artist a name under which its title is found."""
    if not title:
        return {}
    artist.set_gid(name)
    return {name: (title,)}


def _on(colour: str) -> str:
    """The colour of text on a step of a ramp: its upper half is far from the page's own colour."""
    step = colour.rpartition("-")[2]
    return "on-high" if step.isdigit() and int(step) >= RAMP // 2 else "on-low"


def _text_width(characters: int) -> float:
    return _EM * FONT * characters
