"""What results are as the value of a notebook's cell: a chart, or a table where altair is not installed."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import polyak
from polyak import Averager, charts, offline
from polyak._shown import Charted
from polyak.theory import Column, explain, fit


@cache
def run() -> Path:
    """A run's snapshots, and the state of its averager."""
    folder = Path(tempfile.mkdtemp())
    rules = {"short": "power(relative_std=0.05)", "<b>": "power(relative_std=0.1)"}
    averager = Averager({"w": torch.ones(3)}, rules)
    recorder = polyak.Recorder(averager, folder / "run", every=5)
    for _ in range(40):
        averager.update()
        recorder.update()
    polyak.save(folder / "it.safetensors", averager)
    return folder


def summarised() -> Averager:
    averager = Averager(torch.nn.Linear(2, 2), "uniform()")
    averager.update()
    return averager


# A new result is one line: what makes it, and whether it has a chart.
RESULTS: dict[str, tuple[Callable[[], Any], bool]] = {
    "Averager": (summarised, False),
    "summary": (lambda: summarised().summary(), False),
    "explain": (lambda: explain("window(10)", 100), True),
    "advise": (lambda: polyak.theory.advise(1000, schedule="constant"), True),
    "fit": (lambda: fit([Column(None, "live", n) for n in (1, 2)], "uniform()", [1.0, 1.0]), True),
    "synthesize": (lambda: offline.synthesize(run() / "run", "exponential(half_life=10)"), True),
    "sweep": (
        lambda: offline.sweep(run() / "run", ["uniform()"], lambda w: float(w["w"][0])),
        True,
    ),
    "inspect": (lambda: offline.describe(run() / "it.safetensors"), True),
}


def test_every_chart_is_of_a_result_and_drawn_here() -> None:
    drawn = {type(make()).__name__ for make, charted in RESULTS.values() if charted}
    assert drawn == {result.__name__ for result in Charted.__subclasses__()}, "a line in RESULTS"
    assert drawn == set(charts._CHARTS), "a line in _CHARTS of polyak.charts"
    named = {name for name in charts.__all__ if name.endswith("_chart")}
    assert named == {chart.__name__ for chart in charts._CHARTS.values()}


@pytest.mark.parametrize("name", RESULTS)
def test_a_notebook_has_the_chart_or_else_a_table(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, charted = RESULTS[name]
    result = make()
    if charted:
        drawn = result.chart().to_dict()
        assert "vega" in result._repr_mimebundle_()["text/html"] and "$schema" in drawn
    monkeypatch.setitem(sys.modules, "polyak.charts", None)
    html = result._repr_html_()
    assert html.startswith(("<p>", "<pre>")) and "<b>" not in html
    assert "<table>" in html or name == "advise"
    if charted:
        assert result._repr_mimebundle_() == {"text/plain": str(result), "text/html": html}
        with pytest.raises(ModuleNotFoundError):
            result.chart()


def test_a_file_without_a_rule_has_a_table_alone(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "it.pt")
    found = offline.describe(tmp_path / "it.pt")
    with pytest.raises(LookupError, match=r"it\.pt has no average whose rule and clock are known"):
        found.chart()
    assert "<table>" in found._repr_mimebundle_()["text/html"]


def test_of_many_rows_a_notebook_has_the_first() -> None:
    averager = Averager({f"w{i}": torch.ones(1) for i in range(300)}, "uniform()")
    averager.update()
    html = averager._repr_html_()
    assert html.count("<tr>") == 1 + 200 + 1 and "and 100 more" in html
    assert str(averager.summary()).count("float32    tensor") == 300
