"""A matplotlib figure as inline SVG: text stays text, colours are the page's CSS variables, ids are unique.

matplotlib knows only fixed colours, so a drawing names a colour by :func:`role`, a code that nothing else uses, and the
code is replaced by ``var(--role)`` once the SVG is written. One drawing then serves the light and the dark theme.
"""

import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure

RAMP = 8
"""Steps of a colour ramp."""

SERIES = 6
"""Colours that tell series apart."""

ROLES = (
    "ink",
    "muted",
    "line",
    "surface",
    "good",
    "bad",
    "neutral",
    "missing",
    "on-low",
    "on-high",
    *(f"series-{index}" for index in range(SERIES)),
    *(f"cool-{index}" for index in range(RAMP)),
    *(f"warm-{index}" for index in range(RAMP)),
)
"""The colours that ``page.css`` defines for each theme."""

SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "compress",
    "text.parse_math": False,
    "axes.unicode_minus": True,
    "path.simplify": False,
}

_CODE = "#0c0d{:02x}"
_FOUND = re.compile(r"#0c0d([0-9a-f]{2})")
_FAMILY = re.compile(r"font-family: [^;]*;? ?")
_DECIMALS = re.compile(r"-?\d+\.\d+")
_XLINK = "{http://www.w3.org/1999/xlink}href"


@dataclass
class Drawing:
    """A figure, with the text that appears over some of its parts.

    Attributes:
        figure: one unit is one pixel at 72 dots an inch.
        titles: by the ``gid`` of an artist, a text for each of its shapes.
    """

    figure: Figure
    titles: dict[str, tuple[str, ...]] = field(default_factory=dict)


def role(name: str) -> str:
    """The code that stands for a colour of the page.

    Raises:
        ValueError: there is no such colour.
    """
    return _CODE.format(ROLES.index(name))


def to_svg(draw: Callable[[], Drawing], name: str, css_class: str, label: str) -> str:
    """The SVG element of a drawing.

    Args:
        draw: makes the drawing; it is called where matplotlib's settings are the page's.
        name: prefix of its ids, unique on the page.
        css_class: its class.
        label: what it shows, for those who can't see it.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        # the browser has the glyphs that matplotlib's font lacks
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        drawing = draw()
        drawing.figure.savefig(buffer, format="svg", transparent=True)
    root = ElementTree.fromstring(buffer.getvalue())
    used = set(re.findall(r'(?:url\(|href=")#([\w-]+)', buffer.getvalue()))
    _clean(root, name, used, drawing.titles)
    width, height = (float(size) for size in root.attrib["viewBox"].split()[2:])
    root.attrib.clear()
    root.attrib |= {
        "class": css_class,
        "viewBox": f"0 0 {width:g} {height:g}",
        "width": f"{width:g}",
        "height": f"{height:g}",
        "role": "img",
        "aria-label": label,
    }
    return ElementTree.tostring(root, encoding="unicode")


def _clean(element: ElementTree.Element, prefix: str, used: set[str], titles: dict[str, tuple[str, ...]]) -> None:
    """Strip what a page doesn't need; ids are kept where something refers to them."""
    element.tag = element.tag.rpartition("}")[2]
    told = titles.get(element.attrib.get("id", ""), ())
    for key, value in list(element.attrib.items()):
        del element.attrib[key]
        if key == "id" and value in used:
            element.set("id", f"{prefix}-{value}")
        elif key == _XLINK:
            element.set("href", f"#{prefix}-{value[1:]}")
        elif key == "style":
            element.set("style", _FOUND.sub(_variable, _FAMILY.sub("", value)).strip().removesuffix(";"))
        elif key in ("d", "x", "y", "width", "height") or (key == "transform" and "rotate(-0" not in value):
            element.set(key, _DECIMALS.sub(_rounded, value).replace("\n", ""))
        elif key == "clip-path":
            element.set(key, value.replace("#", f"#{prefix}-"))
        elif key in ("viewBox", "href"):
            element.set(key, value)
    children = []
    for child in element:
        _clean(child, prefix, used, titles)
        if child.tag == "g" and not child.attrib:
            children += list(child)
        elif not _invisible(child):
            children.append(child)
    element[:] = children
    element.text = element.text if element.tag in ("text", "title") else None
    element.tail = None
    shapes = [shape for shape in element.iter() if shape.tag in ("path", "use") and shape is not element]
    for shape, title in zip(shapes, told, strict=False):
        if title:
            ElementTree.SubElement(shape, "title").text = title


def _invisible(element: ElementTree.Element) -> bool:
    if element.tag in ("metadata", "style"):
        return True
    if element.tag == "path":
        return element.get("style") == "fill: none"
    return element.tag in ("g", "defs") and not len(element)


def _variable(code: re.Match[str]) -> str:
    return f"var(--{ROLES[int(code[1], 16)]})"


def _rounded(decimal: re.Match[str]) -> str:
    text = f"{float(decimal[0]):.1f}".removesuffix(".0")
    return "0" if text == "-0" else text
