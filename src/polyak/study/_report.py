"""Report: a folder with all results, and one HTML page that opens offline."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import vl_convert

from polyak import charts
from polyak._files import writing
from polyak.study import _claims as claims
from polyak.study import _costs as costs
from polyak.study import _figures as figures
from polyak.study import _tables as tables
from polyak.study._record_format import Record
from polyak.study._settings import Settings, as_json
from polyak.study._statistics import BOOTSTRAP_SEED, FEWEST_SEEDS, RESAMPLES
from polyak.study._text import Table, figure

PAGE = "report.html"
PACKAGES = ("torch", "numpy", "scipy", "scikit-learn", "altair", "joblib")


@dataclass(frozen=True)
class Report:
    """The verdicts and tables of a study, and the path of its page."""

    judgements: list[claims.Judgement]
    tables: dict[str, Table]
    page: Path


def write_report(
    records: Sequence[Record], settings: Settings, measured: costs.Costs, folder: Path, made: str
) -> Report:
    """Write verdicts.json, costs.json, tables/, charts/ and report.html into a folder."""
    judgements = claims.judge(records)
    made_tables = _tables(records, judgements, measured)
    drawn = figures.charts(records)
    _write(folder / "verdicts.json", _json(claims.as_json(judgements)))
    _write(folder / "costs.json", _json(costs.as_json(measured)))
    for name, table in made_tables.items():
        _write(folder / "tables" / f"{name}.md", table.markdown())
    for name, chart in drawn.items():
        charts.save(chart, folder / "charts", name)
    page = _page(records, settings, judgements, made_tables, drawn, made)
    _write(folder / PAGE, page)
    return Report(judgements, made_tables, folder / PAGE)


def _tables(
    records: Sequence[Record], judgements: list[claims.Judgement], measured: costs.Costs
) -> dict[str, Table]:
    made = (
        tables.verdicts(judgements),
        tables.evidence(judgements),
        tables.epochs(records),
        tables.final(records),
        tables.deviations(records),
        tables.arms(records, measured),
        tables.metrics(records),
        tables.in_words(records, measured),
    )
    return {table.name: table for table in made}


def _page(
    records: Sequence[Record],
    settings: Settings,
    judgements: list[claims.Judgement],
    made_tables: dict[str, Table],
    drawn: dict[str, Any],
    made: str,
) -> str:
    """The HTML page: the texts, the specs of the charts, and the code that draws them."""
    template = files("polyak.study").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(template).render(
        bundle=vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"),
        summary=tables.summary(records),
        figure=figure,
        specs={name: chart.to_dict() for name, chart in drawn.items()},
        judgements=judgements,
        tables=made_tables,
        seeds=len(records),
        stops=[record["stop_epoch"] for record in records],
        fingerprint=records[0]["fingerprint"],
        settings=as_json(settings),
        made=made,
        versions={name: importlib.metadata.version(name) for name in PACKAGES},
        machine=f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}",
        rule={"seed": BOOTSTRAP_SEED, "resamples": RESAMPLES, "fewest": FEWEST_SEEDS},
    )


def _write(path: Path, text: str) -> None:
    """Writes a file that is there whole or not at all."""
    with writing(path) as file:
        file.write(text.encode())


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
