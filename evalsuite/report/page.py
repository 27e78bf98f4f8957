"""From blocks to one HTML file that asks nothing of the network."""

from functools import partial
from importlib.resources import files

from compress.evalsuite.report.blocks import Chart, Page
from compress.evalsuite.report.draw import NARROW, WIDE
from compress.evalsuite.report.svg import RAMP, to_svg
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup


def to_html(page: Page) -> str:
    """The page as HTML; everything that comes from outside is escaped, charts are inline SVG."""
    environment = Environment(undefined=StrictUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["svg"] = _charts
    here = files("compress.evalsuite.report")
    template = environment.from_string((here / "page.html.j2").read_text(encoding="utf-8"))
    css = Markup((here / "page.css").read_text(encoding="utf-8"))
    return template.render(page=page, css=css, steps=RAMP)


def _charts(chart: Chart) -> Markup:
    """The chart at both widths; the page shows the one that fits."""
    parts = []
    for css_class, width in (("wide", WIDE), ("narrow", NARROW)):
        parts.append(to_svg(partial(chart.draw, width), f"{chart.name}-{css_class}", css_class, chart.title))
    return Markup("\n".join(parts))
