"""Several artifacts side by side, from their reports alone: one row a figure, the original first.

Figures are compared only where they were measured in the same way. What decides that travels with every figure, as its
conditions; an artifact whose conditions differ from those of the first that has the figure is marked with them, and
nothing is concluded from it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from compress.evalsuite.report.blocks import Tone
from compress.evalsuite.report.figures import SECTIONS, Figure, figures
from compress.evalsuite.report.wording import MISSING, dig

SCHEMA = "compress.comparison/1"


@dataclass(frozen=True)
class Entry:
    """A figure of one artifact.

    Attributes:
        value: the figure; None if it isn't finite.
        text: the same with its unit and error.
        change: against the artifact's own original, empty if nothing can be said.
        tone: whether the change is good or bad.
        differs: how it was measured differently from the row's first figure; empty if it can be compared.
    """

    value: float | None
    text: str
    change: str
    tone: Tone
    differs: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """One figure of all artifacts.

    Attributes:
        section: one of ``figures.SECTIONS``.
        key: unique in its section.
        label: what the figure is.
        about: more on it, for a reader who doesn't know it.
        higher_is_better: which way is up, if known.
        original: the original's figure, where the first artifact's report has it.
        original_text: the same with its unit.
        entries: one for each artifact, None where it lacks the figure.
    """

    section: str
    key: str
    label: str
    about: str
    higher_is_better: bool | None
    original: float | None
    original_text: str
    entries: tuple[Entry | None, ...]

    def comparable(self, index: int) -> bool:
        """Whether an artifact has the figure, measured as the others."""
        entry = self.entries[index]
        return entry is not None and not entry.differs


@dataclass(frozen=True)
class Comparison:
    """Artifacts side by side.

    Attributes:
        names: of the artifacts, all different.
        reports: theirs, in the same order.
        rows: all figures that at least one of them has.
    """

    names: tuple[str, ...]
    reports: tuple[Mapping[str, Any], ...]
    rows: tuple[Row, ...]

    def of(self, section: str) -> list[Row]:
        """The rows of a section."""
        return [row for row in self.rows if row.section == section]

    @property
    def models(self) -> list[str]:
        """The different models that the artifacts were made from."""
        return list(dict.fromkeys(str(dig(report, "model", "name") or "unknown") for report in self.reports))

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        return {"schema": SCHEMA, "artifacts": list(self.names), "rows": [asdict(row) for row in self.rows]}

    def lines(self) -> list[str]:
        """For a terminal: one table, and below it how figures were measured differently."""
        notes: dict[tuple[str, ...], int] = {}
        table = [["", "original", *self.names]]
        for row in self.rows:
            cells = [row.label, row.original_text or MISSING]
            for entry in row.entries:
                if entry is None:
                    cells.append(MISSING)
                elif entry.differs:
                    cells.append(f"{entry.text} [{notes.setdefault(entry.differs, len(notes) + 1)}]")
                else:
                    cells.append(f"{entry.text} ({entry.change})" if entry.change else entry.text)
            table.append(cells)
        widths = [max(len(cells[column]) for cells in table) for column in range(len(table[0]))]
        lines = []
        for index, cells in enumerate(table):
            padded = [
                cell.ljust(width) if not column else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
            ]
            lines.append(f"| {' | '.join(padded)} |")
            if index == 0:
                lines.append(
                    "|"
                    + "|".join("-" * (width + 1) + ("-" if not column else ":") for column, width in enumerate(widths))
                    + "|"
                )
        lines += [
            f"[{number}] not compared, measured differently: {'; '.join(differs)}" for differs, number in notes.items()
        ]
        return lines


def compare_reports(reports: Sequence[tuple[str, Mapping[str, Any]]]) -> Comparison:
    """Lay reports side by side.

    Args:
        reports: a name that nobody else has, and the content of ``report.json``, for each artifact.
    """
    found = [{(figure.section, figure.key): figure for figure in figures(report)} for _, report in reports]
    keys = dict.fromkeys(key for own in found for key in own)
    order = {name: index for index, name in enumerate(SECTIONS)}
    rows = [_row([own.get(key) for own in found]) for key in sorted(keys, key=lambda key: order[key[0]])]
    return Comparison(tuple(name for name, _ in reports), tuple(report for _, report in reports), tuple(rows))


def _row(found: Sequence[Figure | None]) -> Row:
    first = next(figure for figure in found if figure is not None)
    return Row(
        section=first.section,
        key=first.key,
        label=first.label,
        about=first.about,
        higher_is_better=first.higher_is_better,
        original=first.original,
        original_text=first.original_text,
        entries=tuple(None if figure is None else _entry(figure, first) for figure in found),
    )


def _entry(figure: Figure, first: Figure) -> Entry:
    differs = [
        f"{name}: {figure.conditions.get(name) or 'unknown'}, not {first.conditions.get(name) or 'unknown'}"
        for name in dict.fromkeys([*first.conditions, *figure.conditions])
        if figure.conditions.get(name) != first.conditions.get(name)
    ]
    if not differs and not _near(figure.original, first.original):
        differs = [f"score of the original: {figure.original_text}, not {first.original_text}"]
    return Entry(figure.value, figure.text, figure.change, figure.tone, tuple(differs))


def _near(one: float | None, other: float | None) -> bool:
    """Equal but for the rounding of another machine."""
    if one is None or other is None:
        return one is other
    return abs(one - other) <= 0.002 * max(abs(one), abs(other))
