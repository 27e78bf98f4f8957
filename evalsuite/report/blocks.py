"""What a page is made of: tiles, sections, and in them charts, tables, facts and notes. The template shows them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from compress.evalsuite.report.svg import Drawing

Tone = Literal["", "good", "bad", "muted"]


@dataclass(frozen=True)
class Tile:
    """One figure of the summary.

    Attributes:
        label: what it is.
        value: the figure with its unit.
        about: what it means, in a line.
        tone: whether it is good or bad news.
    """

    label: str
    value: str
    about: str
    tone: Tone = ""


@dataclass(frozen=True)
class Cell:
    """A field of a table: the figure, a smaller remark under it, and its tone."""

    text: str
    note: str = ""
    tone: Tone = ""


@dataclass(frozen=True)
class Table:
    """A table; the first column names the row.

    Attributes:
        caption: what it holds.
        head: headings of the columns.
        rows: one entry a column.
        numeric: columns whose figures stand to the right.
        folded: it is opened by a click.
        stacked: on a phone every row becomes a card.
    """

    kind: ClassVar[str] = "table"
    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str | Cell, ...], ...]
    numeric: frozenset[int] = frozenset()
    folded: bool = False
    stacked: bool = False


@dataclass(frozen=True)
class Key:
    """An entry of a chart's legend: a colour of the page, perhaps with a marker, and what it stands for."""

    colour: str
    text: str
    marker: str = ""


@dataclass(frozen=True)
class Scale:
    """The legend of a colour ramp: its name, and what its ends stand for."""

    ramp: str
    low: str
    high: str


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        name: unique on the page.
        title: what it shows, also told to those who can't see it.
        draw: draws it at a width in pixels.
        legend: what colours and markers mean.
        scale: the legend of a colour ramp.
        reading: one sentence on how to read it.
    """

    kind: ClassVar[str] = "chart"
    name: str
    title: str
    draw: Callable[[int], Drawing]
    legend: tuple[Key, ...] = ()
    scale: Scale | None = None
    reading: str = ""


@dataclass(frozen=True)
class Charts:
    """Small charts side by side where they fit, with one legend."""

    kind: ClassVar[str] = "charts"
    charts: tuple[Chart, ...]
    scale: Scale | None = None
    reading: str = ""


@dataclass(frozen=True)
class Facts:
    """Names and values; a value of several lines or a long hash is shown as code."""

    kind: ClassVar[str] = "facts"
    entries: Mapping[str, str]
    code: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Note:
    """A sentence or two; with a tone it stands out."""

    kind: ClassVar[str] = "note"
    text: str
    tone: Tone = ""


@dataclass(frozen=True)
class Source:
    """Text as it is, for instance a command; folded under a summary if it has one."""

    kind: ClassVar[str] = "source"
    text: str
    folded: str = ""


Block = Table | Chart | Charts | Facts | Note | Source


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        name: its anchor.
        title: its heading.
        short: its name in the list of contents.
        lead: one sentence: what the figures mean and which way is better.
        blocks: what follows.
    """

    name: str
    title: str
    short: str
    lead: str
    blocks: tuple[Block, ...] = ()


@dataclass(frozen=True)
class Summary:
    """The tiles of one model, with its name where the page shows several."""

    tiles: tuple[Tile, ...]
    name: str = ""


@dataclass(frozen=True)
class Page:
    """A whole page.

    Attributes:
        title: of the document and its first heading.
        kicker: what kind of page it is, above the heading.
        verdict: the outcome in a few sentences.
        summaries: tiles, once for each model.
        sections: in the order in which they are read.
        foot: the last line.
    """

    title: str
    kicker: str
    verdict: tuple[Note, ...]
    summaries: tuple[Summary, ...]
    sections: tuple[Section, ...]
    foot: str
