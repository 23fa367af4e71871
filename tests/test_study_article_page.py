"""The folder of the article's study: complete, whole, and readable without a network."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from polyak.cli import app
from polyak.study import recipes, report, run
from polyak.study._text import Table, number, percent
from study_cases import short

SEEDS, EPOCHS = 2, 22


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    result = run(short(EPOCHS), folder, seeds=SEEDS, jobs=1)
    page = report(result, folder, "polyak study article")
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


@pytest.mark.slow
def test_the_page_opens_offline(folder: Path) -> None:
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Links(text)
    assert page.loads == ["data:,"]  # the icon, which a browser would ask for otherwise
    assert all(target.startswith("#") for target in page.targets)
    assert len(set(page.ids)) == len(page.ids)
    assert "default-src 'none'" in text and not re.search(r"@import|url\(\s*['\"]?http", text)


@pytest.mark.slow
def test_the_page_has_the_articles_claims_figures_and_curves(folder: Path) -> None:
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Links(text)
    for section in ("verdicts", "effects", "curves", "after", "published", "costs", "caveats"):
        assert section in page.ids and f"#{section}" in page.targets
    for claim in recipes()["article"].claims:
        assert claim.sentence.replace("'", "&#39;") in text and claim.what.split("'")[0] in text
    drawn = {i.removeprefix("chart-") for i in page.ids if i.startswith("chart-")}
    wanted = {"one_mse", "one_mae", "one_r2", "curves_plateau", "after_stop", "pairs_plateau"}
    assert wanted <= drawn
    assert text.count('<table class="sortable wide">') == 1 and "ensemble_<wbr>20" in text
    files = {path.name for path in (folder / "charts").iterdir()}
    assert files == {f"{name}.{ending}" for name in drawn for ending in ("png", "svg")}
    for said in ("10000 resamples", "no test part", "article_ema sets the learning rate"):
        assert said in text


@pytest.mark.slow
def test_the_articles_tables_are_there_as_markdown(folder: Path) -> None:
    tables = folder / "tables"
    found = {path.stem: path.read_text(encoding="utf-8") for path in tables.iterdir()}
    for name in short(EPOCHS).arm_names:
        assert f"| {name} |" in found["arms_plateau"]
    assert "| epoch 10: train loss | 0.0843 | " in found["published_1"]
    assert "| epoch 50: live loss | 0.0037 | no seed | 0 | no seed |" in found["published_1"]
    assert "| MSE, change by the EMA | −20.00 % | " in found["published_2"]
    assert "| epoch of the early stop | 97 | 22 [22, 22] | 2 | 100 % " in found["published_4"]


@pytest.mark.slow
def test_the_data_files_are_json(folder: Path) -> None:
    verdicts = json.loads((folder / "verdicts.json").read_text(encoding="utf-8"))
    assert {claim["verdict"] for claim in verdicts} == {"undecided"}  # two seeds
    lines = (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["seed"] for line in lines] == list(range(SEEDS))
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.parametrize(("option", "said"), [("--seeds", "seeds is 0"), ("--jobs", "jobs is 0")])
def test_no_seed_and_no_process_are_errors(option: str, said: str, tmp_path: Path) -> None:
    command = ["study", "article", option, "0", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2 and said in done.stderr
    assert not list(tmp_path.iterdir())


def test_numbers_as_text() -> None:
    assert number(-0.00001) == "0.0000"
    assert number(-1.5, 1) == "−1.5"
    assert percent(0.0011, 2) == "0.11 %"


def test_a_table_as_markdown() -> None:
    table = Table("t", "Title", ("a", "b"), (("1", "2"),), "Note.")
    assert table.markdown() == "# Title\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n\nNote.\n"
