"""The curves and the chart of a rule: few points that keep the extremes, four panels, no warning."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyak.charts import rule_chart, save
from polyak.rules import Rule
from polyak.theory import cutoff, explain, frequency_response, profile
from polyak.theory._curves import gain_curve, learning_rate_curve, profile_curve, step_curve
from quick import first_quick
from rule_examples import RULE_EXAMPLES, each_rule

ALL = [rule for examples in RULE_EXAMPLES.values() for rule in examples]


def rows(panel: dict[str, Any], chart: dict[str, Any]) -> list[dict[str, Any]]:
    """The data of a panel, which altair may have put into the chart's data sets."""
    data = panel["data"] if "data" in panel else panel["layer"][0]["data"]
    found: list[dict[str, Any]] = (
        data["values"] if "values" in data else chart["datasets"][data["name"]]
    )
    return found


@pytest.mark.slow
@pytest.mark.parametrize("rule", each_rule(ALL), ids=str)
@pytest.mark.parametrize(("steps", "every"), [(1, 1), (100, 7)])
def test_every_rule_has_a_chart_of_four_panels(rule: Rule, steps: int, every: int) -> None:
    chart = rule_chart(rule, max(steps, every), every=every).to_dict()
    titles = [panel.get("title") or panel["layer"][0]["title"] for panel in chart["concat"]]
    assert titles == [
        "Profile", "Step response", "Frequency response", "Equivalent learning-rate schedule",
    ]  # fmt: skip
    for panel in chart["concat"]:
        points = rows(panel, chart)
        assert 1 <= len(points) <= 1002
        assert all(np.isfinite([point["x"], point["y"]]).all() for point in points)


@pytest.mark.slow
def test_a_long_chart_has_few_points() -> None:
    chart = rule_chart("exponential(0.999)").to_dict()
    assert [len(rows(panel, chart)) <= 1002 for panel in chart["concat"]] == [True] * 4


def test_thinning_keeps_the_spikes_and_the_ends() -> None:
    c = profile("bema()", 50_000)
    curve = profile_curve(c)
    assert len(curve.x) <= 1002
    assert (curve.x[0], curve.x[-1]) == (0, 49_999)
    assert (max(curve.y), min(curve.y)) == (c.max(), c.min())
    multiplier = learning_rate_curve(c)
    assert (multiplier.x[0], multiplier.x[-1]) == (1, 50_000)


def test_curves_end_where_the_weight_does() -> None:
    c = profile("window(100)", 100_000)
    assert profile_curve(c).x[-1] == 109
    assert (step_curve(c).x[0], step_curve(c).y[0]) == (0, 0)
    assert step_curve(c).y[-1] == pytest.approx(1)


def test_a_curve_at_a_coarser_cadence_has_the_updates_only() -> None:
    curve = profile_curve(profile("exponential(0.9)", 35, every=10), every=10)
    assert curve.x == [4, 14, 24, 34]
    assert profile_curve(profile("bema()", 35, every=10), every=10).x == [0, 4, 14, 24, 34]


def test_the_gain_curve_has_whole_decades_and_the_cutoff() -> None:
    c = profile("window(100)", 1000)
    gain = gain_curve(c)
    assert (gain.bottom, gain.top, gain.cutoff) == (1e-3, 1.0, cutoff(c))
    assert min(gain.curve.y) == gain.bottom


@pytest.mark.parametrize(("spec", "layers"), [("exponential(0.9)", 4), ("exponential(0.1)", 1)])
def test_the_cutoff_is_marked_where_it_exists(spec: str, layers: int) -> None:
    assert len(rule_chart(spec, 100).to_dict()["concat"][2]["layer"]) == layers


@pytest.mark.parametrize(("steps", "label"), first_quick([(4, "0.5"), (20_000, "10k")]))
def test_steps_below_a_thousand_are_plain_numbers(tmp_path: Path, steps: int, label: str) -> None:
    """An SI prefix would write 500m for half a step."""
    save(rule_chart("exponential(half_life=0.8)", steps), tmp_path, "rule")
    labels = re.findall(r">([^<>]+)</text>", (tmp_path / "rule.svg").read_text())
    assert label in labels and not [text for text in labels if re.fullmatch(r"\d+m", text)]


def test_a_chart_is_saved_as_png_svg_and_html(tmp_path: Path) -> None:
    save(rule_chart("window(3)", 20), tmp_path / "new", "rule")
    assert (tmp_path / "new/rule.png").read_bytes().startswith(b"\x89PNG")
    assert "Step response" in (tmp_path / "new/rule.svg").read_text()
    page = (tmp_path / "new/rule.html").read_text()
    assert "https://cdn" not in page and page.count('viewBox="0 0 380 ') == 4


def test_a_gain_that_crosses_half_power_many_times_is_an_envelope() -> None:
    """BEMA: a low pass plus alpha times what left the anchor, which adds to it or takes from it."""
    c = profile("bema()", 20_000)
    gain = gain_curve(c)
    assert gain.cutoff is None and gain.lower is not None
    frequencies, wanted, _ = frequency_response(c, np.array(gain.curve.x))
    inside = [
        low * 0.97 <= value <= high * 1.03  # few points make a stretch of low frequencies
        for low, value, high in zip(gain.lower.y, wanted, gain.curve.y, strict=True)
        if value > gain.bottom
    ]
    assert all(inside) and len(inside) > 50
    widths = np.array(gain.curve.y) / np.array(gain.lower.y)
    assert np.all(widths[frequencies > 0.1] > 10)
    assert [layer["mark"]["type"] for layer in _layers("bema()", 20_000)] == ["line", "area"]


def _layers(*rules: str | int) -> list[dict[str, Any]]:
    *specs, steps = rules
    chart = rule_chart([str(each) for each in specs], int(steps)).to_dict()
    layers: list[dict[str, Any]] = chart["concat"][2]["layer"]
    return layers


@pytest.mark.slow
def test_several_rules_are_lines_of_several_colours() -> None:
    rules = ["exponential(0.9)", "window(10)"]
    chart = rule_chart(rules, 300).to_dict()
    for panel in chart["concat"]:
        points = rows(panel, chart)
        assert list(dict.fromkeys(point["rule"] for point in points)) == rules
    assert len(_layers(*rules, 300)) == 1
    with pytest.raises(ValueError, match="rules is 0, wanted 1 to 6 of them"):
        rule_chart([])


def test_a_result_has_its_chart_in_a_notebook() -> None:
    about = explain("window(10)", 100)
    assert about.chart().to_dict() == rule_chart("window(10)", 100).to_dict()
    shown = about._repr_mimebundle_()
    assert shown["text/plain"] == str(about)
    assert "text/html" in shown
