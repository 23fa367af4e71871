"""Two studies compared: paired within common seeds, and what cannot be compared is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from typer.testing import CliRunner

from polyak.cli import app
from polyak.rules import Uniform
from polyak.study import Metric, constant
from polyak.study._compare import Comparison
from polyak.study._compare import compare as compare_all
from polyak.study._compare_page import write
from polyak.study._effects import Effects
from polyak.study._speed import over_studies, scores_over_studies, times_to_target
from quick import first_quick
from study_results import folder, loss, result, truth


def better(arm: str, seed: int, *rest: Any) -> float:
    """A second study whose seed n is the first's seed n + 3, 20 % better, and `long` 10 % worse."""
    return truth(arm, seed + 3, *rest) * (1.1 if arm == "long" else 0.8)


def compare(first: Path, second: Path) -> Comparison:
    (found,) = compare_all([first, second]).comparisons
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("compare")
    second = result(12, better, batch_size=2)
    return folder(place / "one", result()), folder(place / "two", second, first=3)


def test_pairs_are_plain_computations(folders: tuple[Path, Path]) -> None:
    found = compare(*folders)
    assert found.seeds == (3, 4, 5, 6, 7, 8)
    gains = {(p.schedule, p.arm): p for p in found.pairings}
    assert len(gains) == 2 * 6
    for (schedule, arm), pairing in gains.items():
        first = [truth(arm, n, schedule, 0.1, "test") for n in found.seeds]
        second = [better(arm, n - 3, schedule, 0.1, "test") for n in found.seeds]
        assert pairing.first.estimate == pytest.approx(np.mean(first))
        assert pairing.other.estimate == pytest.approx(np.mean(second))
        ratio = stats.gmean(np.array(second) / first)
        assert (
            pairing.gain.estimate
            == pytest.approx(1 - ratio)
            == pytest.approx(0.2 if arm != "long" else -0.1)
        )
        assert pairing.improvement.estimate == (arm != "long")


def test_the_other_way_round_every_gain_is_the_opposite(folders: tuple[Path, Path]) -> None:
    there, back = compare(*folders), compare(*reversed(folders))
    for a, b in zip(there.pairings, back.pairings, strict=True):
        assert (1 - a.gain.estimate) * (1 - b.gain.estimate) == pytest.approx(1)
        assert a.improvement.estimate + b.improvement.estimate == 1 and a.p == b.p


def test_conditions_that_differ_are_listed(folders: tuple[Path, Path]) -> None:
    assert compare(*folders).differences == ("batch_size: 1 there, 2 now",)
    assert compare(folders[0], folders[0]).differences == ()


def test_all_conditions_that_differ_are_counted(folders: tuple[Path, Path], tmp_path: Path) -> None:
    arms = {f"arm_{i}": "uniform()" for i in range(9)}
    other = folder(tmp_path / "other", result(2, arms=arms))
    page = write(compare_all([folders[0], other]), tmp_path / "out", "c").read_text()
    assert "and 14 conditions differ" in page
    assert len(compare(folders[0], other).differences) == 14


def test_a_study_is_as_good_as_itself(folders: tuple[Path, Path]) -> None:
    for pairing in compare(folders[0], folders[0]).pairings:
        assert (pairing.gain.estimate, pairing.p, pairing.improvement.estimate) == (0.0, 1.0, 0.5)


def test_a_seed_without_a_number_is_left_out(folders: tuple[Path, Path], tmp_path: Path) -> None:
    def holed(arm: str, seed: int, *rest: Any) -> float | None:
        return None if (arm, seed) == ("long", 4) else truth(arm, seed, *rest)

    found = compare(folders[0], folder(tmp_path / "holed", result(value=holed)))
    seeds = {(p.schedule, p.arm): p.gain.seeds for p in found.pairings}
    assert {arm for (_, arm), count in seeds.items() if count == 8} == {"long"}
    assert {count for (_, arm), count in seeds.items() if arm != "long"} == {9}


def broken(place: Path, text: str) -> Path:
    place.mkdir()
    (place / "results.jsonl").write_text(text)
    return place


BAD = {
    "no folder": (lambda place: place / "x", "has no results.jsonl"),
    "no record": (lambda place: broken(place / "x", ""), "has no records"),
    "no JSON": (lambda place: broken(place / "x", "{"), "line 1: wanted a record"),
    "a record of the article": (
        lambda place: broken(place / "x", json.dumps({"seed": 0, "live": {}})),
        "line 1: wanted a record of `polyak study run`",
    ),
    "nothing in common": (
        lambda place: folder(place / "x", result(2, metrics={"other": Metric(loss)}, arms={"a": Uniform()})),
        "do not all have an average, or the metric 'loss'",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_compared_is_an_error(
    make: Any, message: str, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    other = make(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        compare(folders[0], other)
    done = CliRunner().invoke(
        app, ["study", "compare", str(folders[0]), str(other), "--out", str(tmp_path / "o")]
    )
    assert done.exit_code != 0 and not (tmp_path / "o").exists()


def test_over_several_studies_each_counts_the_same(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """The score by hand: the share of runs within r times the fastest one's steps, integrated over r to 4."""
    three = [*folders, folder(tmp_path / "three", result(3, arms={"short": "exponential(0.5)"}))]
    both = compare_all(three)
    assert [each.number for each in both.comparisons] == [2, 3]
    assert [len(each.pairings) for each in both.comparisons] == [12, 4]
    studies = [Effects(each) for each in both.results]
    wanted = {arm: [score(each, arm) for each in studies] for arm in ("live", "short")}
    scores = {row[0]: row[1:] for row in scores_over_studies(studies).rows}
    assert set(scores) == set(wanted)
    for arm, shares in wanted.items():
        printed = [float(cell.split()[0]) for cell in scores[arm]]
        assert printed == pytest.approx([np.mean(shares), *shares], abs=0.006)
    (figure,) = over_studies(studies)
    last = dict(zip(figure.table.header[1:], figure.table.rows[-1][1:], strict=True))
    reached = [
        np.isfinite(times_to_target(e, "short", s)) for e in studies for s in e.study.schedules
    ]
    by_study = [np.mean(reached[2 * i : 2 * i + 2]) for i in range(3)]
    assert float(last["short"]) == pytest.approx(np.mean(by_study), abs=5e-4)


def score(effects: Effects, arm: str) -> float:
    limits = np.linspace(1, 4, 3001)
    runs = []
    for schedule in effects.study.schedules:
        ours = np.array(times_to_target(effects, arm, schedule))
        all_times = [times_to_target(effects, name, schedule) for name in ("live", "short")]
        for time, best in zip(ours, np.min(all_times, axis=0), strict=True):
            runs.append(np.mean([time <= limit * best and time < np.inf for limit in limits]))
    return float(np.mean(runs))


def test_one_folder_is_too_few(folders: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match="number of folders is 1, wanted at least 2"):
        compare_all(folders[:1])


def test_studies_without_a_common_average_have_no_fastest_one(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    other = folder(tmp_path / "other", result(3, arms={"another": "exponential(0.5)"}))
    page = write(compare_all([folders[0], other]), tmp_path / "out", "c").read_text()
    assert "better than study 1 in" in page and "soonest" not in page


OTHERS: dict[str, tuple[dict[str, Any], int]] = {
    "metric": ({"metrics": {"error": Metric(loss)}}, 0),
    "schedule": ({"schedules": {"another": constant}}, 0),
    "seed": ({}, 50),
    "direction": ({"metrics": {"loss": Metric(loss, lower_is_better=False)}}, 0),
    "number": ({"value": lambda *_: None}, 0),
}


@pytest.mark.parametrize(("fields", "first"), first_quick(OTHERS.values()), ids=OTHERS)
def test_without_common_values_only_the_times_to_the_target_are_compared(
    fields: dict[str, Any], first: int, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    other = folder(tmp_path / "other", result(3, **fields), first)
    page = write(compare_all([folders[0], other]), tmp_path / "out", "c").read_text()
    assert "Study 2 and study 1 have no loss of one arm" in page and "soonest" in page
    assert 'id="gains_2"' not in page and 'id="differences_2"' in page
    words = ["study", "compare", f"{folders[0]}", f"{other}", "--out", f"{tmp_path / 'again'}"]
    assert "Study 2 and study 1 have no loss of one arm" in CliRunner().invoke(app, words).output


@pytest.mark.slow
def test_the_command_prints_the_table_and_writes_the_page(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    done = CliRunner().invoke(app, ["study", "compare", *map(str, folders), "--out", out])
    assert done.exit_code == 0, done.output
    assert "20.0 % [20.0 %, 20.0 %]" in done.output and "differs: batch_size" in done.output
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "better than study 1 in 10 and worse in 2" in text and "--out" in text
    assert write(compare_all(folders), tmp_path / "again", "c").is_file()
