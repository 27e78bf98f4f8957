"""``report.html`` beside ``report.json``: written by a run, and again from what is stored."""

import json
from pathlib import Path
from typing import Any

from compress.artifact.card import model_card, titled
from compress.artifact.export import read_report
from compress.calibrate.errors import InputError
from compress.evalsuite.report import render
from compress.work import write_text

PAGE = "report.html"


def write_page(folder: Path, report: dict[str, Any], name: str | None = None) -> Path:
    """Write the page of an artifact.

    Args:
        folder: where to, as ``report.html``.
        report: the content of ``report.json``.
        name: of the artifact; by default the folder's.

    Returns:
        The file.
    """
    page = folder / PAGE
    write_text(page, render(report, name or folder.resolve().name))
    return page


def rebuild_page(folder: Path) -> Path:
    """Write ``report.html`` of a finished artifact again.

    Raises:
        InputError: the folder holds no report.
    """
    return write_page(folder, stored_report(folder, "DIR"))


def update_report(folder: Path, **sections: Any) -> Path:
    """Put sections into an artifact's report, in the place of older ones, and write card and page again.

    Args:
        folder: of the artifact.
        sections: by the report's keys.

    Returns:
        ``report.json``.

    Raises:
        InputError: the folder holds no report.
    """
    before = stored_report(folder, "ARTIFACT")
    report = before | sections
    path = folder / "README.md"
    card = path.read_text(encoding="utf-8") if path.is_file() else ""
    title = titled(card) or folder.resolve().name
    untouched = not card or card == model_card(before, title)
    write_text(folder / "report.json", json.dumps(report, indent=1, default=str) + "\n")
    if untouched:  # a card that somebody has edited is theirs
        write_text(path, model_card(report, title))
    write_page(folder, report)
    return folder / "report.json"


def stored_report(folder: Path, option: str) -> dict[str, Any]:
    """The report of an artifact's folder.

    Args:
        folder: of the artifact.
        option: how the user named it, for the error.

    Raises:
        InputError: the folder doesn't exist, or holds no report that can be read.
    """
    if not folder.is_dir():
        raise InputError(option, folder, "there is no such folder")
    report = read_report(folder)
    if report is None:
        fix = "give the folder that `compress run` wrote"
        raise InputError(option, folder, "holds no report.json of an artifact", fix=fix)
    return report
