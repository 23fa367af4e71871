"""The folder that a study leaves: complete, whole, and readable without a network."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from polyak.study import run_article
from polyak.study._arms import all_arms
from polyak.study._text import Table, number, percent
from study_cases import SMALL

SEEDS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    page = run_article(SEEDS, folder, jobs=1, settings=SMALL)
    assert page == folder / "report.html"
    return folder


class Links(HTMLParser):
    """Every address that a page would load, and its ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.ids += [found["id"]] if "id" in found else []
        if tag == "a":
            self.targets.append(found["href"])
        else:
            self.loads += [found[name] for name in ("src", "href", "data") if name in found]


def test_the_page_opens_offline(folder: Path) -> None:
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Links(text)
    assert page.loads == ["data:,"]  # the icon, which a browser would ask for otherwise
    assert all(target.startswith("#") for target in page.targets)
    assert len(set(page.ids)) == len(page.ids)
    assert "default-src 'none'" in text and not re.search(r"@import|url\(\s*['\"]?http", text)
    assert len(text) < 5_000_000


def test_the_page_has_every_section(folder: Path) -> None:
    page = Links((folder / "report.html").read_text(encoding="utf-8"))
    sections = [
        "verdicts", "curves", "epochs", "final", "deviations", "stop", "arms", "words",
        "evidence", "caveats", "made",
    ]  # fmt: skip
    assert [i for i in page.ids if i in sections] == sections
    assert sorted(page.targets) == sorted(f"#{section}" for section in ["main", *sections])
    charts = {
        "losses", "r2", "losses_one", "r2_one", "pairs", "improvement", "epoch_best", "epoch_lead",
        "epoch_stop", "after_stop", "arms",
    }  # fmt: skip
    drawn = {i.removeprefix("chart-") for i in page.ids if i.startswith("chart-")}
    assert drawn == charts
    files = {path.name for path in (folder / "charts").iterdir()}
    assert files == {f"{name}.{ending}" for name in drawn for ending in ("png", "svg")}


def test_the_page_says_how_it_was_made(folder: Path) -> None:
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert f"polyak study article --seeds {SEEDS}" in text
    for wanted in (
        "torch 2.",
        "processors",
        "10000 resamples",
        "undecided",
        "no test set",
        "commit ",
    ):
        assert wanted in text


def test_the_tables_are_there_as_markdown(folder: Path) -> None:
    names = {path.stem for path in (folder / "tables").iterdir()}
    assert names == {
        "verdicts", "evidence", "epochs", "final", "deviations", "arms", "metrics", "in_words"
    }  # fmt: skip
    arms = (folder / "tables" / "arms.md").read_text(encoding="utf-8")
    for name in all_arms(SMALL).names():
        assert f"| {name} |" in arms
    epochs = (folder / "tables" / "epochs.md").read_text(encoding="utf-8")
    assert "| 50 | the article | 0.0369 | 0.0037 | 0.9964 | 0.0051 | 0.9951 |" in epochs
    final = (folder / "tables" / "final.md").read_text(encoding="utf-8")
    assert "| MSE, the article | 0.0055 | 0.0044 | 20.00 % |" in final


def test_the_data_files_are_json(folder: Path) -> None:
    verdicts = json.loads((folder / "verdicts.json").read_text(encoding="utf-8"))
    assert {claim["verdict"] for claim in verdicts.values()} == {"undecided"}  # three seeds
    costs = json.loads((folder / "costs.json").read_text(encoding="utf-8"))
    assert set(costs["arms"]) == set(all_arms(SMALL).names())
    lines = (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["seed"] for line in lines] == list(range(SEEDS))
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.slow
def test_a_study_prints_its_main_tables(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_article(SEEDS, folder, jobs=1, settings=SMALL)
    printed = capsys.readouterr()
    assert f"seeds {SEEDS}/{SEEDS}" in printed.err and "seeds " not in printed.out.splitlines()[0]
    for wanted in ("Verdicts", "table 4.3", "All arms", "report.html"):
        assert wanted in printed.out


def test_no_seed_and_no_process_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seeds is 0, wanted at least 1"):
        run_article(0, tmp_path / "out")
    with pytest.raises(ValueError, match="jobs is 0, wanted a number of processes"):
        run_article(1, tmp_path / "out", jobs=0)
    assert not list(tmp_path.iterdir())


def test_numbers_as_text() -> None:
    assert number(-0.00001) == "0.0000"
    assert number(-1.5, 1) == "−1.5"
    assert percent(0.0011, 2) == "0.11 %"


def test_a_table_as_markdown() -> None:
    table = Table("t", "Title", ("a", "b"), (("1", "2"),), "Note.")
    assert table.markdown() == "# Title\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n\nNote.\n"
