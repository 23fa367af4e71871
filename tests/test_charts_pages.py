"""The pages of charts in a real browser: silent, offline, readable on a phone, in the dark and on paper."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import altair as alt
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser

import browsing
from polyak import charts
from polyak.charts import _drawing as drawing
from polyak.offline import Baseline, Point, Sweep
from test_notebook import RESULTS


def every_mark() -> Any:
    """A sweep with a best average, refused ones, live weights, and two kinds of rules."""
    points = [Point(f"{kind}({n})", n, n, 0.0, 1.0, None if n == 9 else abs(n - 30) / 9 + len(kind)) for kind in ("power", "window") for n in (9, 20, 40, 80)]  # fmt: skip
    lives = Baseline("last", "a.pt", 900, 8.0), Baseline("best", "b.pt", 700, 7.5)
    return charts.sweep_chart(Sweep(tuple(points), "lower", lives))


def own() -> Any:
    return alt.Chart(alt.InlineData(values=[{"a": 1, "b": 2}, {"a": 2, "b": 1}])).mark_point().encode(x="a:Q", y="b:Q")  # fmt: skip


def drawn(make: Callable[[], Any]) -> Any:
    return make().chart()


SIX = [f"exponential(half_life={10**n}, debias=True)" for n in range(6)]
# A new chart is one line; those of results are a line of `RESULTS`.
CHARTS: dict[str, Callable[[], Any]] = {
    **{name: partial(drawn, make) for name, (make, charted) in RESULTS.items() if charted},
    "six rules": lambda: charts.rule_chart(SIX, 1000),
    "every mark of a sweep": every_mark,
    "one of your own": own,
    "one below the other": lambda: alt.vconcat(own(), own(), title=["<b>&", "two lines"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["fill", "stroke"])
def test_every_colour_of_charts_is_replaced_in_the_dark(kind: str) -> None:
    css = files("polyak.charts").joinpath("page.css").read_text(encoding="utf-8")
    given = re.findall(rf'\.chart \[{kind}="([^"]+)"\] {{ {kind}: var\(--(\w+)\)', css)
    colours = [*drawing.SERIES, drawing.INK, drawing.SOFT, drawing.LINE, "white"]
    assert sorted(colour for colour, _ in given) == sorted(colours)
    light, dark = (
        dict(re.findall(r"--(\w+): (#\w{6})", half))
        for half in css.partition("@media (forced")[0].split("@media screen and")
    )
    assert {light[name] for _, name in given} == {*colours, "#ffffff"} - {"white"}
    assert not {dark[name] for _, name in given} & {light[name] for _, name in given}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing.browser() as opened:
        yield opened


# Of each text: its height in pixels and its colour; a halo has the colour of the paper.
TEXTS = """[...document.querySelectorAll('.chart text:not([fill="white"])')].map(text => {
  const svg = text.ownerSVGElement, style = getComputedStyle(text);
  return [parseFloat(style.fontSize) * svg.clientWidth / svg.viewBox.baseVal.width, style.fill];
})"""
LOOKS: list[tuple[int, Any, Any]] = [
    (320, "light", "screen"), (390, "light", "screen"), (1280, "light", "screen"), (390, "dark", "print"),
    (390, "dark", "screen"), (1280, "dark", "screen"),
]  # fmt: skip
PAPER = "getComputedStyle(document.body).backgroundColor"


def contrast(first: str, second: str) -> float:
    """WCAG 2.2's ratio of two colours, `rgb(r, g, b)`."""
    low, high = sorted(map(luminance, (first, second)))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    parts = [int(number) / 255 for number in re.findall(r"\d+", colour)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.slow
@pytest.mark.parametrize("name", CHARTS)
def test_the_page_of_a_chart(name: str, browser: Browser, tmp_path: Path) -> None:
    charts.save(CHARTS[name](), tmp_path, "it")
    page, said = tmp_path / "it.html", list[str]()
    tab = browser.new_page()
    tab.set_default_timeout(browsing.PATIENCE)
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: said.append(request.url))
    tab.goto(page.as_uri(), wait_until="load")
    papers = []
    for width, scheme, media in LOOKS:
        tab.set_viewport_size({"width": width, "height": 800})
        tab.emulate_media(color_scheme=scheme, media=media)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        texts, paper = tab.evaluate(TEXTS), tab.evaluate(PAPER)
        assert texts and min(height for height, _ in texts) >= 9
        assert min(contrast(colour, paper) for _, colour in texts) >= 4.5
        papers.append(paper)
    found = Axe().run(tab).response["violations"]
    tab.close()
    assert [paper == "rgb(255, 255, 255)" for paper in papers] == [True] * 4 + [False] * 2
    assert found == [] and said == [page.as_uri()]
