"""The report in a real browser: accessible, narrow, silent, and offline, in light, dark and print."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page

import browsing
from polyak.study import Claim, Region, compare, gain, run
from polyak.study._report import write
from study_cases import short
from study_results import CLAIMS, folder, result

RULES = {"rules": {"target-size": {"enabled": True}}}  # of WCAG 2.2, not in axe's default

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing.browser() as opened:
        yield opened


def article(place: Path) -> Path:
    return write(run(short(22), place, seeds=3, jobs=1), place, "polyak study article").page


def study(place: Path) -> Path:
    long = Claim("Short_is_better_" * 8, gain("short"), Region.above(0), "a_paper_" * 15)
    return write(result(claims=(*CLAIMS, long)), place, "polyak study run made").page


def compared(place: Path) -> Path:
    folders = (folder(place / f"{seeds}", result(seeds)) for seeds in (9, 12, 3))
    return compare(*folders, out=place / "out")


PAGES = {"article": article, "study": study, "compared": compared}


@pytest.fixture(scope="module", params=PAGES)
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return PAGES[request.param](tmp_path_factory.mktemp(request.param))


def opened(browser: Browser, report: Path, **options: Any) -> Page:
    page = browser.new_page(**options)
    page.set_default_timeout(browsing.PATIENCE)
    page.goto(report.as_uri(), wait_until="load")
    return page


def open_details(page: Page) -> None:
    page.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(browser: Browser, report: Path, scheme: Any) -> None:
    narrow = {"width": browsing.NARROW, "height": 800}  # so that tables scroll
    page = opened(browser, report, color_scheme=scheme, viewport=narrow)
    if scheme == "light":  # the tables of a chart's data are many, and dark as the other tables are
        open_details(page)
    found = Axe().run(page, options=RULES).response
    problems = {v["id"]: [n["html"] for n in v["nodes"]] for v in found["violations"]}
    page.close()
    assert problems == {}
    assert {"target-size", "color-contrast"} <= {rule["id"] for rule in found["passes"]}


@pytest.mark.parametrize("width", [320, 390, 768])
def test_no_page_is_wider_than_the_screen(browser: Browser, report: Path, width: int) -> None:
    """A wide table scrolls, and its caption stays whole."""
    page = opened(browser, report, viewport={"width": width, "height": 800})
    open_details(page)
    wide = page.evaluate("document.documentElement.scrollWidth")
    captions = page.evaluate(
        "[...document.querySelectorAll('caption span')].map(s => s.getBoundingClientRect().right)"
    )
    page.close()
    assert wide <= width
    assert captions and max(captions) <= width


def test_the_page_is_silent_and_loads_nothing(browser: Browser, report: Path) -> None:
    page = browser.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(report.as_uri(), wait_until="networkidle", timeout=browsing.PATIENCE)
    page.close()
    assert said == [] and asked == [report.as_uri()]
    assert report.stat().st_size < 5_000_000


def test_the_first_key_skips_to_the_results_and_shows_where_it_is(
    browser: Browser, report: Path
) -> None:
    page = opened(browser, report)
    page.keyboard.press("Tab")
    focus = "getComputedStyle(document.activeElement)"
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.evaluate(f"parseFloat({focus}.outlineWidth)") >= 2
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == "#main"
    page.keyboard.press("Tab")
    inside = page.evaluate("document.querySelector('main').contains(document.activeElement)")
    page.close()
    assert inside


def test_keys_sort_a_table(browser: Browser, report: Path) -> None:
    page = opened(browser, report)
    open_details(page)
    table = page.locator("table.sortable").first
    if report.parent.name == "out":  # a comparison has no table to sort
        assert table.count() == 0
        return
    headings = table.locator("thead th").count()
    for column in range(headings):
        cells = table.locator(f"tbody tr :nth-child({column + 1})")
        before = cells.all_inner_texts()
        button = table.locator("thead button").nth(column)
        for key, falling in (("Enter", False), ("Space", True)):
            button.press(key)
            after = cells.all_inner_texts()
            numbers = [float(text.replace("−", "-")) for text in after]
            assert numbers == sorted(numbers, reverse=falling)
            assert sorted(after) == sorted(before)
            wanted = "descending" if falling else "ascending"
            heading = table.locator("thead th").nth(column)
            assert heading.get_attribute("aria-sort") == wanted
            assert table.locator("thead th[aria-sort]").count() == 1
    page.close()


def test_a_reader_s_wishes_are_followed(browser: Browser, report: Path) -> None:
    """Reduced motion, the system's own colours, and paper, which is white and has no menu."""
    page = opened(browser, report, color_scheme="dark", reduced_motion="reduce")
    style = "getComputedStyle(document.{})"
    assert page.evaluate(f"{style.format('documentElement')}.scrollBehavior") == "auto"
    dark = page.evaluate(f"{style.format('body')}.backgroundColor")
    page.emulate_media(media="print")
    paper = page.evaluate(f"{style.format('body')}.backgroundColor")
    menu = page.evaluate("getComputedStyle(document.querySelector('nav')).display")
    page.emulate_media(media="screen", forced_colors="active")
    line = "getComputedStyle(document.querySelector('.chart [stroke=\"#1b6ca8\"]')).stroke"
    ink = page.evaluate("getComputedStyle(document.querySelector('nav a')).color")
    stroke = page.evaluate(line)
    page.close()
    assert (paper, menu) == ("rgb(255, 255, 255)", "none") and dark != paper
    assert stroke == ink


def test_every_chart_has_words_and_its_data(browser: Browser, report: Path) -> None:
    page = opened(browser, report)
    figures = page.locator("figure")
    count = figures.count()
    assert count > 0
    for i in range(count):
        figure = figures.nth(i)
        words = figure.locator("[role=img]").get_attribute("aria-label") or ""
        assert len(words) > 40 and any(c.isdigit() for c in words)
        assert figure.locator("table caption").count() == 1
        assert figure.locator("tbody tr").count() > 0
        assert figure.locator("svg").count() == 1
    page.close()
