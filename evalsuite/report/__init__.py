"""``report.html``: what a run made, what it gained and what it lost, on one page that needs nothing else.

Everything on the page is in ``report.json``; every section is left out where the report lacks its figures.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from compress.evalsuite.report import (
    costs,
    layers,
    needles,
    origin,
    scores,
    searches,
    sharing,
    side_by_side,
    sinks,
    tuning,
)
from compress.evalsuite.report.blocks import Page
from compress.evalsuite.report.comparison import Comparison, compare_reports
from compress.evalsuite.report.page import to_html
from compress.evalsuite.report.summary import summary, verdict
from compress.evalsuite.report.wording import dig

__all__ = ["Comparison", "compare_reports", "render", "render_comparison"]

SECTIONS = (
    scores.scores,
    scores.divergence,
    needles.long_context,
    costs.size,
    costs.speed,
    costs.cache,
    layers.errors,
    layers.bits,
    tuning.tuning,
    sharing.sharing,
    searches.searches,
    sinks.calibration,
    origin.check,
    origin.origin,
)
"""In the order in which they are read; each gives None where the report lacks its figures."""


def render(report: Mapping[str, Any], title: str) -> str:
    """The page of one artifact.

    Args:
        report: the content of its ``report.json``; every key may be absent.
        title: its name.

    Returns:
        A self-contained HTML document.
    """
    sections = [section for make in SECTIONS if (section := make(report)) is not None]
    version = dig(report, "versions", "compress")
    page = Page(
        title=title,
        kicker="Compression report",
        verdict=verdict(report),
        summaries=(summary(report),),
        sections=tuple(sections),
        foot=f"Made by compress{f' {version}' if version else ''}. Every figure is also in report.json beside"
        " this page.",
    )
    return to_html(page)


def render_comparison(reports: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """The page of several artifacts.

    Args:
        reports: a name that nobody else has, and the content of ``report.json``, for each artifact.

    Returns:
        A self-contained HTML document. Figures that weren't measured in the same way are marked, not compared.
    """
    return to_html(side_by_side.page(compare_reports(reports)))
