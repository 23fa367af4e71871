"""The documentation site: built, complete, whole without a network, and readable on a telephone."""

from __future__ import annotations

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from browsing import NARROW, PATIENCE, browser, visits
from polyak import Averager

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "tools/site/build.py"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("docs")
    done = subprocess.run([sys.executable, BUILD, out], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out / "site"


class Page(HTMLParser):
    """The links, the loaded files and the anchors of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        of = {key: value or "" for key, value in attrs}
        self.anchors |= {of[key] for key in ("id", "name") if key in of}
        loaded = of.get("src") or (of.get("href") if tag in ("a", "link") else None)
        if loaded and of.get("rel") != "canonical":
            self.links.append(loaded)


@pytest.mark.slow
def test_every_link_within_the_site_leads_somewhere(site: Path) -> None:
    pages = {path.resolve(): Page(path) for path in site.rglob("*.html")}
    assert len(pages) > 40
    dead = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            known = pages[target].anchors if target in pages else set()
            if not target.is_file() or (parts.fragment and unquote(parts.fragment) not in known):
                dead.append(f"{path.relative_to(site)}: {link}")
    assert not dead, "\n".join(dead)


@pytest.mark.slow
def test_doctests_of_docstrings_are_code(site: Path) -> None:
    pages = [path.read_text() for path in (site / "api").glob("*.html")]
    assert "Exponential" in "".join(pages)
    assert not any("<blockquote>" in page for page in pages)
    assert any('class="gp"' in page for page in pages)  # the prompt of a doctest


@pytest.mark.slow
def test_the_averager_has_all_its_methods_on_its_page(site: Path) -> None:
    methods = {name for name in dir(Averager) if not name.startswith("_")}
    anchors = Page(site / "api/averager.html").anchors
    assert {f"polyak.averager.Averager.{name}" for name in methods} <= anchors


@pytest.mark.slow
def test_pages_open_without_a_network_and_fit_a_telephone(site: Path) -> None:
    with browser() as opened:
        faults = [
            f"{page.relative_to(site)}: {visit}"
            for page, visit in visits(opened, sorted(site.rglob("*.html")), NARROW)
            if visit.requests or visit.errors or visit.width > NARROW
        ]
    assert not faults, "\n".join(faults)


@pytest.mark.slow
def test_the_search_works_from_the_folder(site: Path) -> None:
    with browser() as opened, opened.new_page() as tab:
        tab.set_default_timeout(PATIENCE)
        tab.goto((site / "index.html").as_uri())
        tab.click(".md-search__button")
        tab.get_by_placeholder("Search").fill("Switch-EMA")
        tab.get_by_text("Using the average").first.wait_for()


def test_every_page_is_in_the_navigation() -> None:
    told = yaml.safe_dump(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    for page in [*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")]:
        assert str(page.relative_to(ROOT)) in told, page
