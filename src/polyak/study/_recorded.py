"""The description of a study that the records in its folder give, if there is no recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from polyak.rules import Uniform
from polyak.study._conditions import fields
from polyak.study._record_format import Record, RecordFormat
from polyak.study._records import opened
from polyak.study._result import Result
from polyak.study._schedules import constant
from polyak.study._study import Arm, Metric, Study

RESULTS = "results.jsonl"


def existing(folder: Path) -> Path:
    """The file of a folder's records. Raise `FileNotFoundError` if there is none."""
    path = folder / RESULTS
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {RESULTS}; run the study first")
    return path


def first_conditions(folder: Path) -> Mapping[str, Any]:
    """The conditions in a folder's first line; none if it cannot be read: the check of all lines comes later."""
    with existing(folder).open(encoding="utf-8") as file, suppress(ValueError, TypeError, KeyError):
        stored = json.loads(file.readline())["conditions"]
        return stored if isinstance(stored, dict) else {}
    return {}


def recorded(folder: Path) -> Result:
    """The records of a folder with a study that has the names that they use; it cannot run.

    Raises `FileNotFoundError` for a folder without results.jsonl; `ValueError` for a file without records, and
    for a line that is not a record of the study of the first line.
    """
    path, conditions = existing(folder), first_conditions(folder)
    if not path.stat().st_size:
        raise ValueError(f"{path} has no records; run the study first")
    try:
        study = _named(conditions)
    except (KeyError, TypeError, ValueError, AttributeError):
        wanted = "wanted a record of `polyak study run` with its conditions"
        raise ValueError(f"{path}, line 1: {wanted}") from None

    def expected(record: Record) -> Mapping[str, Any]:
        own = record.get("conditions")
        return {**conditions, "schedule": own.get("schedule") if isinstance(own, dict) else None}

    form = RecordFormat(expected, lambda record: fields(study, record.get("steps")))
    with opened(path, form) as results:
        records = list(results.by_run.values())
    schedules = {record["schedule"]: constant for record in records}
    rates = tuple(sorted({record["learning_rate"] for record in records}))
    return Result(replace(study, schedules=schedules, learning_rates=rates), records)


def _named(conditions: Mapping[str, Any]) -> Study:
    """A study with the names and sizes of conditions, which cannot run."""
    return Study(
        name=conditions["study"],
        model=_cannot_run, data=_cannot_run, loss=_cannot_run,
        arms={name: Arm(Uniform()) for name in conditions["arms"]},
        metrics={name: Metric(_cannot_run, lower) for name, lower in conditions["metrics"].items()},
        learning_rates=(1.0,),
        steps=conditions["steps"], batch_size=conditions["batch_size"],
        evaluations=conditions["evaluations"],
    )  # fmt: skip


def _cannot_run(*_: Any) -> NoReturn:
    raise TypeError("this study was made from its records, and cannot run")
