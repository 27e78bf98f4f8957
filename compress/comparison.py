"""``compress compare``: artifacts side by side, from their stored reports."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.calibrate.errors import InputError
from compress.evalsuite.report import Comparison, compare_reports, render_comparison
from compress.report_page import stored_report
from compress.work import write_text


def compare_artifacts(paths: Sequence[Path]) -> Comparison:
    """Lay artifacts side by side.

    Args:
        paths: their folders, at least two; the first is the one that others have to be comparable with.

    Returns:
        One row a figure, with the original first; figures that were measured differently are marked.

    Raises:
        InputError: fewer than two folders, the same one twice, or one without a report.
    """
    if len(paths) < 2:
        raise InputError("ARTIFACT", paths[0] if paths else None, "a comparison needs at least two artifacts")
    return compare_reports(named_reports(paths))


def named_reports(paths: Sequence[Path]) -> list[tuple[str, dict[str, Any]]]:
    """The reports of artifacts, each with a name that tells it apart.

    Raises:
        InputError: the same folder twice, or one without a report.
    """
    resolved = [path.resolve() for path in paths]
    for path, place in zip(paths, resolved, strict=True):
        if resolved.count(place) > 1:
            raise InputError("ARTIFACT", path, "is named twice")
    reports = [stored_report(path, "ARTIFACT") for path in paths]
    return list(zip(_names(resolved), reports, strict=True))


def write_comparison(page: Path, comparison: Comparison) -> None:
    """Write a comparison as one HTML file."""
    write_text(page, render_comparison(list(zip(comparison.names, comparison.reports, strict=True))))


def _names(places: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as it takes to tell them apart."""
    for depth in range(1, max(len(place.parts) for place in places)):
        names = [Path(*place.parts[-depth:]).as_posix() for place in places]
        if len(set(names)) == len(names):
            return names
    return [str(place) for place in places]
