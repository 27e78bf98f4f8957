"""What is told of an artifact in its folder: ``report.json``, ``report.html`` and the model card, written together."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.artifact.card import model_card, titled
from compress.artifact.export import read_report
from compress.artifact.layout import report_text
from compress.calibrate.errors import InputError
from compress.evalsuite.report import render
from compress.work import write_text

PAGE = "report.html"


def write_report(
    folder: Path, report: dict[str, Any], former: dict[str, Any] | None = None, name: str | None = None
) -> str | None:
    """Write an artifact's report, card and page; a card that somebody has edited is theirs and stays.

    Args:
        folder: of the artifact.
        report: what ``report.json`` is to hold.
        former: what it held, of which the card was made; None where there is no card yet.
        name: of the artifact; by default the folder's.

    Returns:
        A line for the user where an edited card was kept, otherwise None.
    """
    name = name or folder.resolve().name
    path = folder / "README.md"
    card = path.read_text(encoding="utf-8") if former is not None and path.is_file() else None
    title = name if card is None else titled(card) or name
    edited = card is not None and former is not None and card != model_card(former, title)
    write_text(folder / "report.json", report_text(report))
    if not edited:
        write_text(path, model_card(report, title))
    write_page(folder, report, name)
    return f"{path} was edited by hand and is left as it is" if edited else None


def write_page(folder: Path, report: Mapping[str, Any], name: str) -> Path:
    """Write the page of an artifact.

    Args:
        folder: where to, as ``report.html``.
        report: the content of ``report.json``.
        name: of the artifact.

    Returns:
        The file.
    """
    page = folder / PAGE
    write_text(page, render(report, name))
    return page


def rebuild_page(folder: Path) -> Path:
    """Write ``report.html`` of a finished artifact again.

    Raises:
        InputError: the folder holds no report.
    """
    return write_page(folder, stored_report(folder, "DIR"), folder.resolve().name)


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
    former = stored_report(folder, "ARTIFACT")
    write_report(folder, former | sections, former)
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
