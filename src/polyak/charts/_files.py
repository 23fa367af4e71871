"""A chart is written as PNG, as SVG, and as a page that loads nothing and is readable on a phone, in the dark and on paper."""

from __future__ import annotations

import re
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert

from polyak._files import making_folder, writing
from polyak.charts._drawing import INK, LINE, SERIES, SOFT, STYLE

# A panel in polyak's style is as wide as a phone. A chart in another style keeps its size and its colours.
_SIZE = {"width": 380, "height": 240, "autosize": {"type": "fit-x", "contains": "padding"}}
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{css}header, main {{ max-width: 60rem; }}
</style>
</head>
<body>
<header><h1>{title}</h1>{about}</header>
<main class="figures-grid">
{figures}
</main>
</body>
</html>
"""


def save(chart: alt.TopLevelMixin, folder: Path, name: str) -> None:
    """Write `folder/name.png` (at twice the resolution), `.svg` and `.html` (which opens offline)."""
    with alt.data_transformers.enable("default", max_rows=None):  # the data go into the files
        spec = chart.to_dict()
    drawn = svg(spec)
    page = _page(spec, name)
    contents = {"png": vl_convert.svg_to_png(drawn, scale=2), "svg": drawn.encode(), "html": page.encode()}  # fmt: skip
    with making_folder(folder):
        for kind, content in contents.items():
            with writing(folder / f"{name}.{kind}") as file:
                file.write(content)


def svg(spec: dict[str, Any]) -> str:
    """The picture of a chart's definition."""
    drawn: str = vl_convert.vegalite_to_svg(spec)
    return drawn


def inline(name: str, svg: str) -> str:
    """The SVG for use inside a page: a picture without roles of its parts, whose ids no other chart has.

    A point of a chart that describes its marks shows its values under the mouse.
    """
    point = r'<path aria-label="([^"]*)"([^>]*aria-roledescription="point"[^>]*)/>'
    titled = re.sub(point, r"<path\2><title>\1</title></path>", svg)
    plain = re.sub(r' (?:role|aria-\w+)="[^"]*"', "", titled)
    return re.sub(r'( id="|url\(#)', rf"\g<1>{name}-", plain)


def css() -> str:
    """The colours and sizes of pages with charts, in light, dark, print and the system's own colours."""
    names = {INK: "ink", SOFT: "soft", LINE: "line", **{c: f"s{i}" for i, c in enumerate(SERIES)}}
    light = " ".join(f"--{name}: {colour};" for colour, name in names.items())
    drawn = (
        f'.chart [{kind}="{colour}"] {{ {kind}: var(--{name}); }}\n'
        for colour, name in {"white": "paper", **names}.items()
        for kind in ("fill", "stroke")
    )
    rest = files("polyak.charts").joinpath("page.css").read_text(encoding="utf-8")
    return f":root {{ {light} }}\n{rest}{''.join(drawn)}"


def _page(spec: dict[str, Any], name: str) -> str:
    title, about = _title(spec.get("title"))
    title = escape(title or name)
    config = spec.get("config", {})
    is_own = config == STYLE | {"view": config.get("view")}
    panels = _panels(spec) if is_own else [{k: v for k, v in spec.items() if k != "title"}]
    kind = 'class="chart"' if is_own else 'class="picture" tabindex="0"'
    figures = (
        f'<figure><div {kind} role="img" aria-label="{escape(_words(panel)) or title}">{inline(f"panel-{i}", svg(panel))}</div></figure>'
        for i, panel in enumerate(panels)
    )
    return _PAGE.format(
        title=title,
        about="".join(f'<p class="about">{escape(line)}</p>' for line in about),
        css=css(),
        figures="\n".join(figures),
    )


def _title(title: Any) -> tuple[str, list[str]]:
    """The text of a title, and the lines below it."""
    parts = title if isinstance(title, dict) else {"text": title}
    text, below = (_lines(parts.get(part)) for part in ("text", "subtitle"))
    return " ".join(text), below


def _lines(text: Any) -> list[str]:
    """The lines of a text; none if only the drawing computes it."""
    return text if isinstance(text, list) else [text] if isinstance(text, str) else []


def _panels(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """The panels of a chart, each as a chart of its own without the title of all."""
    beside = next((kind for kind in ("concat", "hconcat") if kind in spec), "")
    whole = {k: v for k, v in spec.items() if k not in (beside, "title", "columns", "spacing")}
    return [_sized(whole | panel) for panel in spec.get(beside, [{}])]


def _sized(panel: dict[str, Any]) -> dict[str, Any]:
    """A panel in the width of a phone."""
    if "layer" in panel:
        layers = ({k: v for k, v in layer.items() if k not in _SIZE} for layer in panel["layer"])
        panel = panel | {"layer": list(layers)}
    return panel | _SIZE


def _words(panel: dict[str, Any]) -> str:
    """The title and the axes of a panel, in words."""
    first = panel.get("layer", [panel])[0]
    axes = [first.get("encoding", {}).get(axis, {}) for axis in "yx"]
    titles = [_title(axis.get("title") or (axis.get("axis") or axis).get("title")) for axis in axes]
    shown = " over ".join(title for title, _ in titles if title)
    return ": ".join(filter(None, (_title(panel.get("title") or first.get("title"))[0], shown)))
