"""The pages of charts in a real browser: silent, offline, readable on a phone, in the dark and on paper."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import altair as alt
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser

import browsing
from polyak import charts
from polyak.charts import _drawing as drawing
from polyak.charts._files import css, inline
from polyak.offline import Baseline, Point, Sweep
from quick import first_quick
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


def selected() -> Any:
    """Two panels, of which one shows what is selected in the other."""
    brush = alt.selection_interval(name="brush")
    return own().add_params(brush) | own().transform_filter(brush)


class Places:
    """6000 places, as a data frame of places gives them: more rows than altair takes by itself."""

    features = tuple(
        {
            "type": "Feature",
            "properties": {"a": n},
            "geometry": {"type": "Point", "coordinates": [n % 90, n % 50]},
        }
        for n in range(6000)
    )
    __geo_interface__ = {"type": "FeatureCollection", "features": features}  # noqa: RUF012


def ranked(colour: str = "a:N") -> Any:
    return own().encode(color=colour)


# A title, and what the page has above: its heading and the lines below it.
TITLES: dict[str, tuple[Any, list[str]]] = {
    "none": (alt.Undefined, ["it"]),
    "text": ("A & B", ["A &amp; B"]),
    "empty": ("", ["it"]),
    "lines": (["A", "B"], ["A B"]),
    "with a subtitle": (alt.Title("A", subtitle="under"), ["A", "under"]),
    "with lines below": (alt.Title(["A", "B"], subtitle=["C", "<D>"]), ["A B", "C", "&lt;D&gt;"]),
    "computed": (alt.Title(alt.expr("'A'")), ["it"]),
}  # fmt: skip
# Charts in another style than polyak's; a new kind is one line.
FOREIGN: dict[str, Callable[[], Any]] = {
    "one plot": own,
    "one below the other": lambda: alt.vconcat(own(), own()),
    "panels with titles": lambda: own().properties(title=TITLES["with a subtitle"][0]) | own().properties(title=["A", "B"]),
    "nested panels": lambda: (own() | own()) & own(),
    "facets": lambda: own().facet("a:N", columns=1),
    "rows": lambda: own().encode(row="a:N"),
    "columns": lambda: own().encode(column="a:N"),
    "wrapped": lambda: own().encode(facet=alt.Facet("a:N", columns=2)),
    "repeated": lambda: own().encode(x=alt.X(alt.repeat("column"), type="quantitative")).repeat(column=["a", "b"]),
    "repeated in layers": lambda: own().encode(y=alt.Y(alt.repeat("layer"), type="quantitative")).repeat(layer=["a", "b"]),
    "layers": lambda: alt.layer(alt.layer(own(), own().mark_line()), own()),
    "two axes": lambda: alt.layer(own(), own().mark_line()).resolve_scale(y="independent"),
    "linked panels": selected,
    "a slider": lambda: own().add_params(alt.param("least", value=1, bind=alt.binding_range(min=1, max=2))).transform_filter("datum.a > least"),
    "a zoom": lambda: own().interactive(),
    "transformed": lambda: own().transform_calculate(c="2 * datum.a").encode(x="c:Q"),
    "one colour scale": lambda: ranked() | ranked().transform_filter("datum.a > 1"),
    "one axis": lambda: (own() | own().transform_filter("datum.b > 1")).resolve_scale(y="shared"),
    "named data": lambda: own().properties(data=alt.NamedData("d"), datasets={"d": [{"a": 1, "b": 2}]}),
    "many rows": lambda: alt.Chart(Places()).mark_geoshape(),
    "a map": lambda: alt.Chart(alt.sphere()).mark_geoshape().project("naturalEarth1", scale=90),
    "as wide as its container": lambda: own().properties(width="container"),
    "a step for each bar": lambda: own().mark_bar().encode(x="a:O").properties(width=alt.Step(60)),
    "places in pixels": lambda: own().properties(width=600) + own().mark_rule().encode(x=alt.value(590), y=alt.value(299)),
    "no axes": lambda: own().mark_arc(outerRadius=150).encode(x=alt.Undefined, y=alt.Undefined, theta="a:Q"),
    "lines of an axis title": lambda: own().encode(x=alt.X("a:Q", title=["A", "B"])),
    "dark": lambda: own().configure(background="#222").configure_axis(labelColor="white", titleColor="white"),
    "nothing": alt.vconcat,
}  # fmt: skip
SIX = [f"exponential(half_life={10**n}, debias=True)" for n in range(6)]
# A new chart is one line; those of results are a line of `RESULTS`.
CHARTS: dict[str, Callable[[], Any]] = {
    **{name: partial(drawn, make) for name, (make, charted) in RESULTS.items() if charted},
    "six rules": lambda: charts.rule_chart(SIX, 1000),
    "every mark of a sweep": every_mark,
    **{name: FOREIGN[name] for name in ("one plot", "panels with titles", "columns", "linked panels", "dark")},
}  # fmt: skip


@pytest.mark.parametrize("kind", first_quick(TITLES, 3))
def test_the_heading_of_a_page_is_the_title(kind: str, tmp_path: Path) -> None:
    title, lines = TITLES[kind]
    chart = own()
    chart.title = title
    charts.save(chart, tmp_path, "it")
    page = (tmp_path / "it.html").read_text()
    assert re.findall(r'<(?:h1|p class="about")>(.*?)</', page) == lines
    assert f"<title>{lines[0]}</title>" in page and f'aria-label="{lines[0]}"' in page


@pytest.mark.slow
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_chart_in_another_style_is_one_picture(kind: str, tmp_path: Path) -> None:
    """Its panels may share scales, data and selections, and its size may have a meaning."""
    with alt.data_transformers.enable("json"):
        charts.save(FOREIGN[kind](), tmp_path, "it")
    # vl-convert counts the clips of a process.
    picture, page = (re.sub(r"clip\d+", "clip", (tmp_path / f"it.{end}").read_text()) for end in ("svg", "html"))  # fmt: skip
    assert page.count("<svg") == 1 and f">{inline('panel-0', picture)}</div>" in page
    assert int(re.findall(r'<svg[^>]* width="(\d+)"', page)[0]) > 0


@pytest.mark.parametrize("kind", ["fill", "stroke"])
def test_every_colour_of_charts_is_replaced_in_the_dark(kind: str) -> None:
    given = re.findall(rf'\.chart \[{kind}="([^"]+)"\] {{ {kind}: var\(--(\w+)\)', css())
    colours = [*drawing.SERIES, drawing.INK, drawing.SOFT, drawing.LINE, "white"]
    assert sorted(colour for colour, _ in given) == sorted(colours)
    light, dark = (
        dict(re.findall(r"--(\w+): (#\w{6})", half))
        for half in css().partition("@media (forced")[0].split("@media screen and")
    )
    assert {light[name] for _, name in given} == {*colours, "#ffffff"} - {"white"}
    assert not {dark[name] for _, name in given} & {light[name] for _, name in given}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing.browser() as opened:
        yield opened


# Of each text: its height in pixels and its colour; a halo has the colour of the paper.
TEXTS = """[...document.querySelectorAll('.chart text:not([fill="white"]), .picture text')].map(text => {
  const svg = text.ownerSVGElement, style = getComputedStyle(text), own = svg.querySelector('svg > rect');
  const paper = text.closest('.picture') ? getComputedStyle(own).fill : getComputedStyle(document.body).backgroundColor;
  return [parseFloat(style.fontSize) * svg.clientWidth / svg.viewBox.baseVal.width, style.fill, paper];
})"""
LOOKS: list[tuple[int, Any, Any]] = [
    (320, "light", "screen"), (390, "light", "screen"), (1280, "light", "screen"), (794, "dark", "print"),
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
    assert tab.locator(".picture").count() == (name in FOREIGN)
    papers = []
    for width, scheme, media in LOOKS:
        tab.set_viewport_size({"width": width, "height": 800})
        tab.emulate_media(color_scheme=scheme, media=media)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        texts, paper = tab.evaluate(TEXTS), tab.evaluate(PAPER)
        assert texts and min(height for height, *_ in texts) >= 9
        assert min(contrast(*colours) for _, *colours in texts) >= 4.5
        papers.append(paper)
    found = Axe().run(tab).response["violations"]
    tab.close()
    assert [paper == "rgb(255, 255, 255)" for paper in papers] == [True] * 4 + [False] * 2
    assert found == [] and said == [page.as_uri()]
