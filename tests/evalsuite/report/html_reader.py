"""An HTML page read strictly: tags that don't match, ids twice and references to nothing are errors."""

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "hr", "img", "input"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    content: list["str | Element"] = field(default_factory=list)

    @property
    def children(self) -> list["Element"]:
        return [part for part in self.content if isinstance(part, Element)]

    def all(self, tag: str) -> list["Element"]:
        """Every element below of a tag, in the order of the page."""
        found = []
        for child in self.children:
            found += ([child] if child.tag == tag else []) + child.all(tag)
        return found

    def text(self) -> str:
        """What is written in this element and below, with single spaces."""
        parts = [part if isinstance(part, str) else part.text() for part in self.content]
        return "" if self.tag == "style" else " ".join(" ".join(parts).split())


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(self.open[-1].children[-1])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"<{tag}> has an attribute twice"
        self.open[-1].content.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].content.append(data)


def read(page: str) -> Element:
    """The page as a tree; everything about its structure that must hold of every page is checked."""
    assert page.startswith("<!doctype html>")
    reader = _Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == [reader.root], f"<{reader.open[-1].tag}> isn't closed"
    ids = re.findall(r'\sid="([^"]*)"', page)
    assert len(set(ids)) == len(ids), "an id is used twice"
    named = re.findall(r'(?:href="#|url\(#|aria-labelledby=")([^")]*)', page)
    assert set(named) <= set(ids), set(named) - set(ids)
    return reader.root


def elements(root: Element) -> list[Element]:
    """All elements of a tree."""
    return [root, *(found for child in root.children for found in elements(child))]
