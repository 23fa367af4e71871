"""Reproducing published figures: the lines hold, wrong ones do not, and files and words say so."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from polyak.cli import app
from polyak.study import Region
from polyak.study import _reproduce_decisions as decisions
from polyak.study import _reproduce_engine as engine
from polyak.study import _reproduce_exact as exact
from polyak.study import _reproduce_trained as trained
from polyak.study._reproduce import Line, Reproduced, reproduce
from polyak.study._statistics import Interval, bootstrap

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "benchmarks/results/reproduced.md"
ALL = [*exact.lines(), *decisions.lines(), *engine.lines()]
FAST = [
    *exact._acting(),
    *exact._merging(),
    *decisions._two_seeds(),
    *(line for line in ALL if "lag of the EMA" in line.sentence or "gamma" in line.sentence),
]


def test_fast_lines_hold() -> None:
    found = reproduce(FAST)
    assert len(found.outcomes) >= 18 and not found.missed
    assert {outcome.verdict for outcome in found.outcomes} == {"holds"}


@pytest.mark.parametrize("line", FAST, ids=lambda line: line.sentence)
def test_another_figure_would_not_hold(line: Line) -> None:
    """The tolerance is that of the figure: 1 % beside it, the line fails. A bound fails turned around."""
    got = line.measure()
    assert isinstance(got, float | int)
    bounded = math.isfinite(line.region.low) and math.isfinite(line.region.high)
    middle = (line.region.low + line.region.high) / 2
    width = (line.region.high - line.region.low) / 2 if bounded else 0.0
    if bounded:
        other = Region(middle * 1.01 + width, middle * 1.01 + 3 * width)
    else:
        other = Region.above(line.region.high) if math.isinf(line.region.low) else Region.below(line.region.low)  # fmt: skip
    wrong = Line("", line.sentence, "", "", other, lambda: got)
    assert [o.verdict for o in reproduce([wrong]).missed] == ["does not hold"]


def broken() -> float:
    raise ZeroDivisionError("no steps")


def test_a_line_that_fails_does_not_hold_and_the_others_are_measured(tmp_path: Path) -> None:
    seen: list[tuple[int, int, bool]] = []
    lines = [
        Line.figure("t", "breaks", "s", 1, 0.1, broken),
        Line.figure("t", "is NaN", "s", 1, 0.1, lambda: math.nan),
        Line.figure("t", "is far", "s", 1, 0.1, lambda: 1.11),
        Line.figure("t", "is near", "s", 1, 0.1, lambda: 1.09),
        Line.claim("t", "few seeds", "s", Region.above(0), lambda: bootstrap([1.0, 2.0, 3.0])),
        Line.claim("t", "seeds", "s", Region.above(0), lambda: bootstrap([1.0, 2.0, 3.0] * 3)),
        Line.claim("t", "wrong sign", "s", Region.below(0), lambda: Interval(2.0, 1.0, 3.0, 9)),
    ]
    found = reproduce(lines, progress=lambda *done: seen.append(done))
    verdicts = [outcome.verdict for outcome in found.outcomes]
    assert verdicts == [
        "does not hold", "undecided", "does not hold", "holds", "undecided", "holds", "does not hold",
    ]  # fmt: skip
    assert seen[-1] == (7, 7, True)
    found.write(tmp_path)
    content = json.loads((tmp_path / "reproduced.json").read_text(), parse_constant=pytest.fail)
    assert content[0]["error"] == "ZeroDivisionError: no steps"
    assert content[1]["got"] == {"estimate": None, "low": None, "high": None}
    text = (tmp_path / "reproduced.md").read_text()
    assert "ZeroDivisionError: no steps" in text and "1 ± 10 %" in text and "9 seeds" in text
    assert "2 of 7 hold, 3 do not, 2 are undecided" in text


RECIPE = """
import torch
from polyak.study import Claim, Data, Region, Study, gain

def data(split):
    seeded = torch.Generator().manual_seed(split)
    rows = torch.randn(64, 3, generator=seeded)
    part = (rows, rows.sum(1, keepdim=True))
    return Data(part, part, part)

study = Study(
    name="tiny", title="Tiny", model=lambda: torch.nn.Linear(3, 1), data=data,
    loss=lambda model, x, y: torch.nn.functional.mse_loss(model(x), y),
    learning_rates=(0.01,), arms={"ema": "exponential(0.5)"}, steps=40, batch_size=8, evaluations=4,
    claims=(
        Claim("The EMA is better.", gain("ema"), Region.above(0), "nobody"),
        Claim("The EMA is worse.", gain("ema"), Region.below(0), "nobody"),
    ),
    quick={"steps": 8},
)
"""


@pytest.mark.slow
def test_the_claims_of_a_study_are_lines_over_eight_seeds(tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.py"
    recipe.write_text(RECIPE)
    lines = trained.lines(tmp_path / "out", jobs=1, names=(str(recipe),))
    found = reproduce(lines)
    assert [o.line.topic for o in found.outcomes] == ["Tiny; 8 steps"] * 2
    assert {o.got.seeds for o in found.outcomes} == {8}
    # While the loss still falls an average of older weights is worse, in each seed.
    assert [o.verdict for o in found.outcomes] == ["does not hold", "holds"]
    assert len((tmp_path / "out/tiny/results.jsonl").read_text().splitlines()) == 8


def test_the_page_has_every_line_with_its_figure_and_source(tmp_path: Path) -> None:
    """Those of studies, too: a recipe that has changed asks for a new page."""
    rows = [row[2:-2].split(" | ") for row in PAGE.read_text().splitlines() if row.startswith("| ")]
    found: list[tuple[str, ...]] = []  # an empty cell repeats the one above it
    for topic, sentence, expected, _, _, source in rows:
        above = found[-1] if found else ("", "", "", "")
        found.append((topic.strip() or above[0], sentence, expected, source.strip() or above[3]))
    wanted = [*ALL, *trained.lines(tmp_path)]
    assert {(w.topic, w.sentence, w.expected, w.source) for w in wanted} == {*found[2:]}
    verdicts = {row[4] for row in rows} - {"verdict", "---"}
    assert verdicts <= {"holds", "does not hold", "undecided"}
    counts = Counter(row[4] for row in rows)
    told_of = (
        f"{counts['holds']} hold, {counts['does not hold']} do not, and {counts['undecided']} are"
    )
    assert told_of in " ".join((ROOT / "docs/reproduced.md").read_text().split())


@pytest.mark.slow
def test_the_command_measures_every_line_and_all_hold(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["study", "reproduce", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert f"{len(ALL)} of {len(ALL)} hold, 0 do not" in done.stdout
    content = json.loads((tmp_path / "reproduced.json").read_text())
    assert [each["sentence"] for each in content] == [line.sentence for line in ALL]
    assert all(line.sentence in done.stdout for line in ALL)


def test_the_command_ends_with_1_where_a_line_does_not_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = [Line.figure("t", "wrong", "s", 1, 0.1, lambda: 2.0)]
    monkeypatch.setattr(exact, "lines", lambda: wrong)
    monkeypatch.setattr(engine, "lines", list)
    monkeypatch.setattr(decisions, "lines", list)
    done = CliRunner().invoke(app, ["study", "reproduce", "--out", str(tmp_path)])
    assert done.exit_code == 1
    assert "polyak: 1 of 1 lines do not hold" in done.stderr
    assert json.loads((tmp_path / "reproduced.json").read_text())[0]["verdict"] == "does not hold"


def test_a_table_needs_no_outcome() -> None:
    assert "0 of 0 hold" in Reproduced(()).table().note


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--out", "file"], "file is a file, wanted a folder"),
        (
            ["--studies", "--jobs", "0", "--out", "new"],
            "jobs is 0, wanted a number of processes, or -1",
        ),
    ],
)
def test_wrong_options_are_refused_before_anything_is_measured(
    options: list[str], wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    monkeypatch.setattr("polyak.study._reproduce.reproduce", lambda *_, **__: pytest.fail("ran"))
    done = CliRunner().invoke(app, ["study", "reproduce", *options])
    assert done.exit_code == 2 and wanted in done.stderr and not done.stdout
    assert not Path("new").exists()
