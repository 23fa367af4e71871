"""Everything that a record of a study depends on besides its seed and learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from polyak._checks import is_integer, is_number
from polyak.rules import LIVE
from polyak.study._loop import SOURCES, Run
from polyak.study._record_format import (
    COUNT,
    FLAG,
    MAPPING,
    NOT_NEGATIVE,
    NUMBER,
    POSITIVE,
    TEXT,
    Kind,
    Listed,
    Record,
    RecordFormat,
    fingerprint,
)
from polyak.study._schedules import described
from polyak.study._study import Arm, Ensemble, Study
from polyak.study._trial import tried

VALUE = Kind("a finite number or null", lambda value: value is None or is_number(value))
STEP = Kind("an integer >= 1 or null", lambda value: value is None or is_integer(value, 1))


class Conditions:
    """The conditions of a study's runs, and the format of their records."""

    def __init__(self, study: Study, vary: tuple[str, ...] = SOURCES) -> None:
        self._study = study
        self._common = {
            "study": study.name,
            "steps": study.steps,
            "batch_size": study.batch_size,
            "evaluations": study.evaluations,
            "arms": {name: described_arm(arm) for name, arm in study.arms.items()},
            "metrics": {name: metric.lower_is_better for name, metric in study.metrics.items()},
            "vary": list(vary),
            "stacked": study.stacked > 0,
            "torch": torch.__version__,
            **tried(study),
        }

    def of(self, schedule: str) -> dict[str, Any]:
        """The conditions of the runs of a schedule."""
        text = described(self._study.schedules[self._study.require_schedule(schedule)])
        return {**self._common, "schedule": text}

    def marked(self, run: Run, measured: Record) -> Record:
        """The record of a run: what it is of, and what was measured."""
        conditions = self.of(run.schedule)
        head = {"seed": run.seed, "study": self._study.name}
        head |= {"schedule": run.schedule, "learning_rate": run.learning_rate}
        head |= {"fingerprint": fingerprint(conditions), "conditions": conditions}
        return {**head, **measured}

    def format(self) -> RecordFormat:
        """The format of the file."""
        return RecordFormat(
            lambda record: self.of(str(record.get("schedule"))),
            lambda record: fields(self._study, record.get("steps")),
        )


def described_arm(arm: Arm | Ensemble) -> str:
    """An arm as text."""
    if isinstance(arm, Ensemble):
        combine = getattr(arm.combine, "__qualname__", type(arm.combine).__name__)
        how = "" if combine == "_mean" else f", combined by {combine}"
        return f"ensemble of {arm.size}, every {arm.every}{how}"
    start = f", from {arm.start:g} of the run" if arm.start else ""
    how = ", recalibrated" * arm.recalibrate + ", swept" * arm.swept
    return f"{arm.rule}, every {arm.every}{start}{how}"


def fields(study: Study, steps: Any) -> dict[str, Any]:
    """The fields of a record with this many evaluated steps."""
    arms, count = study.arms, len(steps) if isinstance(steps, list) else None
    curve = dict.fromkeys(study.metrics, Listed(VALUE, count))
    values = dict.fromkeys(study.metrics, VALUE)
    judged: Mapping[str, Any] = {"last": values, "selected": {"step": STEP, **values}}
    return {
        "seed": NOT_NEGATIVE,
        **dict.fromkeys(("study", "schedule", "fingerprint"), TEXT),
        "learning_rate": POSITIVE,
        "conditions": MAPPING,
        "steps": Listed(COUNT),
        "train_loss": Listed(VALUE, count),
        "rates": Listed(NUMBER, count),
        "curves": dict.fromkeys(study.arm_names, curve),
        "test": dict.fromkeys(study.arm_names, judged),
        **{name: dict.fromkeys(arms, Listed(VALUE, count)) for name in ("distance", "cosine")},
        "seconds": dict.fromkeys(("train", "average", "evaluate"), NUMBER),
        "bytes": dict.fromkeys((LIVE, *arms), NOT_NEGATIVE),
        "forward_passes": dict.fromkeys((LIVE, *arms), COUNT),
        "stopped_early": FLAG,
        "after_stop": MAPPING,
    }
