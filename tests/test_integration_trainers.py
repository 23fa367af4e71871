"""Trainers that evaluate or log in their own way: an average's metrics are its own, under its own names.

A kind of Trainer joins `KINDS` by one line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
from transformers import Trainer, TrainerCallback

import tiny_trainers as tiny
from polyak.integrations.transformers import AveragerCallback
from quick import some_quick

Metrics = dict[str, float]
MEASURED = ("runtime", "per_second", "preparation_time")


class WithoutPrefix(Trainer):
    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None) -> Metrics:  # type: ignore[override]
        return super().evaluate(eval_dataset, ignore_keys)


class AnotherPrefix(Trainer):
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "val"
    ) -> Metrics:
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)


class AnyArguments(Trainer):
    def evaluate(self, *args: Any, **kwargs: Any) -> Metrics:
        return super().evaluate(*args, **kwargs)


class AnotherMetric(Trainer):
    """Whatever the prefix is, it writes "eval_"."""

    def evaluate(self, *args: Any, **kwargs: Any) -> Metrics:
        found = super().evaluate(*args, **kwargs)
        (loss,) = (value for name, value in found.items() if name.endswith("_loss"))
        return {**found, "eval_half": loss / 2, "half": 0.5}


class AnotherLog(Trainer):
    """As TRL's do, it adds what it has counted in the evaluation to what is logged."""

    def log(self, logs: Metrics, *args: Any, **kwargs: Any) -> None:
        losses = [value for name, value in logs.items() if name.endswith("_loss")]
        more = {} if "train_loss" in logs or not losses else {"eval_half": losses[0] / 2}
        super().log({**logs, **more}, *args, **kwargs)


KINDS: dict[str, tuple[type[Trainer], dict[str, Any]]] = {
    "plain": (Trainer, {}),
    "an evaluation without a prefix": (WithoutPrefix, {}),
    "an evaluation with another prefix": (AnotherPrefix, {}),
    "an evaluation of any arguments": (AnyArguments, {}),
    "a metric of its own": (AnotherMetric, {}),
    "a log of its own": (AnotherLog, {}),
    "losses alone": (Trainer, {"prediction_loss_only": True}),
    "smoothed labels": (Trainer, {"label_smoothing_factor": 0.1}),
    "noise in embeddings": (Trainer, {"neftune_noise_alpha": 5.0}),
    "an evaluation first": (Trainer, {"eval_on_start": True}),
}


class Heard(TrainerCallback):
    """What callbacks are told, of an evaluation as it is logged and as it has ended."""

    def __init__(self) -> None:
        self.told: list[Metrics] = []

    def on_log(self, *_: Any, logs: Metrics, **__: Any) -> None:  # type: ignore[override]
        self.told.append(dict(logs))

    def on_evaluate(self, *_: Any, metrics: Metrics, **__: Any) -> None:  # type: ignore[override]
        self.told.append(dict(metrics))


def exact(found: Metrics) -> Metrics:
    """The metrics that are equal in every run."""
    others = {"epoch", "step", "total_flos"}
    return {
        name: value
        for name, value in found.items()
        if name not in others and not any(each in name for each in MEASURED)
    }


def of_average(found: Metrics) -> Metrics:
    """An average's metrics, under the names of live weights."""
    return {name.replace("_ema", "", 1): value for name, value in found.items() if "_ema_" in name}


def trained(folder: Path, kind: str, *, averages: bool) -> tuple[Trainer, Heard, Any]:
    base, options = KINDS[kind]
    heard = Heard()
    one = tiny.trainer(folder, kind=base, callbacks=[heard], max_steps=4, **options)
    callback = AveragerCallback({"ema": "exponential(0.7)"}).attach(one) if averages else None
    one.train()
    return one, heard, callback


@pytest.mark.parametrize("kind", some_quick(KINDS, ("plain", "a metric of its own")))
def test_live_metrics_are_those_without_averages_and_an_averages_are_its_own(
    kind: str, tmp_path: Path
) -> None:
    """In the result, in the log, and in what other callbacks are told."""
    one, heard, callback = trained(tmp_path / "a", kind, averages=True)
    without, wanted, _ = trained(tmp_path / "b", kind, averages=False)
    entries = [exact(each) for each in one.state.log_history]
    live = [e for e in entries if not any("ema" in name for name in e)]
    assert live == [exact(each) for each in without.state.log_history]
    told = [e for e in map(exact, heard.told) if not any("ema" in name for name in e)]
    assert told == list(map(exact, wanted.told))

    judged = Heard()
    judge = tiny.trainer(tmp_path / "c", kind=KINDS[kind][0], callbacks=[judged], **KINDS[kind][1])
    cast(Any, judge.model).load_state_dict(callback.averager.average("ema"))
    found, alone = exact(one.evaluate()), exact(judge.evaluate())
    assert {name: found[name] for name in alone} == exact(without.evaluate())
    assert of_average(found) == {n: v for n, v in alone.items() if n != "half"} != {}
    logged, wanted_log = (each.state.log_history[-1] for each in (one, judge))
    assert of_average(exact(logged)) == exact(wanted_log)
    last = [of_average(exact(each)) for each in heard.told[-2:]]
    assert last == list(map(exact, judged.told[-2:]))
