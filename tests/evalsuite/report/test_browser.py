"""The pages in a real browser, on a desk and on a phone, by day and by night."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from chromium import find_chromium
from compress.evalsuite.report import render, render_comparison
from playwright.sync_api import Browser, Page, sync_playwright
from report_builders import full_report, other_report

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: `make browser` installs one")

LONG = "a-folder-with-a-very-long-name-that-nobody-would-want-to-type-SmolLM2-135M-Instruct-W3-g64"

CHARTS = """() => [...document.querySelectorAll('figure.chart')].map(figure => {
  const seen = [...figure.querySelectorAll('svg')].filter(svg => svg.getBoundingClientRect().width > 0);
  return seen.map(svg => {
    const box = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll('text')].map(text => text.getBoundingClientRect());
    return {
      name: svg.getAttribute('aria-label'),
      width: box.width,
      height: box.height,
      shapes: svg.querySelectorAll('path, use').length,
      texts: texts.length,
      scale: box.width / svg.viewBox.baseVal.width,
      size: Math.min(...[...svg.querySelectorAll('text')].map(text => parseFloat(getComputedStyle(text).fontSize))),
      outside: texts.filter(text => text.left < box.left - 1 || text.right > box.right + 1
        || text.top < box.top - 1 || text.bottom > box.bottom + 1).length,
    };
  });
})"""
COLOURS = """() => [document.body, ...document.querySelectorAll('.tile, .lead, svg text')].map(element => {
  const style = getComputedStyle(element);
  return [style.color, style.backgroundColor, style.fill].join();
})"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    many = [(LONG, full_report()), ("W2", other_report()), (LONG + "-2", full_report()), ("d", other_report())]
    bare = {key: value for key, value in full_report().items() if key in ("model", "recipe", "artifact")}
    texts = {
        "full": render(full_report(), LONG),
        "bare": render(bare, "bare"),
        "two": render_comparison([("W3", full_report()), ("W2", other_report())]),
        "many": render_comparison(many),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in texts}


def opened(browser: Browser, file: Path, width: int, theme: Any) -> tuple[Page, list[str]]:
    """The page, and everything that went wrong on it: console, errors, requests other than for the file."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme, bypass_csp=True)
    page, problems = context.new_page(), []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: problems.append(request.url) if request.url != file.as_uri() else None)
    page.goto(file.as_uri())
    return page, problems


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("name", ["full", "bare", "two", "many"])
def test_charts_are_seen_whole_and_nothing_sticks_out(
    browser: Browser, pages: dict[str, Path], name: str, width: int
) -> None:
    page, problems = opened(browser, pages[name], width, "light")
    charts = page.evaluate(CHARTS)
    assert len(charts) == {"full": 10, "bare": 1, "two": 7, "many": 7}[name]
    for figure in charts:
        (chart,) = figure  # of the two widths exactly one is shown
        assert chart["width"] > 100, chart
        assert chart["height"] > 40, chart
        assert chart["shapes"] > 1, chart
        assert chart["texts"] > 1, chart
        assert chart["size"] * chart["scale"] >= 10.5, chart  # can be read
        assert chart["outside"] == 0, chart
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for handle in page.query_selector_all("details > summary"):
        handle.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert problems == []
    page.context.close()


@pytest.mark.parametrize(
    ("name", "width", "theme"),
    [("full", 400, "dark"), ("full", 1400, "light"), ("two", 400, "light"), ("two", 1400, "dark")],
)
def test_the_page_is_accessible(browser: Browser, pages: dict[str, Path], name: str, width: int, theme: str) -> None:
    """The rules of axe-core, contrast (WCAG AA) among them."""
    page, _ = opened(browser, pages[name], width, theme)
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    assert any(rule["id"] == "color-contrast" for rule in found.response["passes"])
    page.context.close()


def test_night_is_not_day(browser: Browser, pages: dict[str, Path]) -> None:
    light, dark = (opened(browser, pages["full"], 1400, theme)[0] for theme in ("light", "dark"))
    day, night = light.evaluate(COLOURS), dark.evaluate(COLOURS)
    assert len(day) == len(night) > 50
    assert not [one for one, other in zip(day, night, strict=True) if one == other]

    def brightness(page: Page) -> float:
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
        return float(sum(colour) / 3)

    assert brightness(light) > 200
    assert brightness(dark) < 60
