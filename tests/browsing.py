"""A browser for the pages that polyak writes: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from playwright.sync_api import Browser, sync_playwright

NARROW = 390  # pixels, a telephone
PATIENCE = 300_000  # ms; a busy machine is no fault
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@contextmanager
def browser() -> Iterator[Browser]:
    """A headless browser; without one the test is skipped."""
    found = shutil.which("chromium")
    if found is None:
        pytest.skip("no chromium on this machine")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=FLAGS, timeout=PATIENCE)
        yield opened
        opened.close()


class Visit(NamedTuple):
    """What a page did: requests that leave the machine, errors on the console, and how wide it is."""

    requests: list[str]
    errors: list[str]
    width: int


def visits(opened: Browser, pages: Iterable[Path], width: int) -> Iterator[tuple[Path, Visit]]:
    """Opens files one after the other in a window of some width, and tells what each does."""
    requests: list[str] = []
    errors: list[str] = []
    with opened.new_page(viewport={"width": width, "height": 800}) as tab:
        tab.set_default_timeout(PATIENCE)
        tab.on("request", lambda request: requests.append(request.url))
        tab.on("console", lambda told: errors.append(told.text) if told.type == "error" else None)
        tab.on("pageerror", lambda error: errors.append(str(error)))
        for page in pages:
            requests.clear()
            errors.clear()
            tab.goto(page.as_uri(), wait_until="load")
            wide = tab.evaluate("document.documentElement.scrollWidth")
            outgoing = [url for url in requests if not url.startswith(("file:", "data:", "blob:"))]
            yield page, Visit(outgoing, [*errors], wide)
