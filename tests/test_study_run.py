"""A study resumes, reports what fails, and refuses what does not fit before it trains."""

from __future__ import annotations

import copy
import errno
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from polyak.rules import Exponential, Uniform, Window
from polyak.specs import parse
from polyak.study import (
    Arm,
    Claim,
    Data,
    Ensemble,
    Metric,
    Plateau,
    Published,
    Region,
    Seed,
    Study,
    gain,
    mean_probability,
    read,
    recipes,
    run,
)
from polyak.study._feasible import require_feasible
from polyak.study._judge import metrics_of
from polyak.study._judging import judge
from polyak.study._loop import Run, source_seed, train
from polyak.study._recipes import opened_recipe
from polyak.study._run import units
from polyak.study._schedules import PLACES
from polyak.study._stacked import train_stacked
from polyak.study._trial import tried
from quick import first_quick
from study_models import Dimmed, arms, cnn, cross_entropy, images, mlp, study

ONE = {"schedules": {"constant": lambda _: 1.0}}


def lines(folder: Path, name: str = "results.jsonl") -> list[dict[str, Any]]:
    path = folder / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def measured(records: Any) -> list[dict[str, Any]]:
    """Records without their times."""
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def test_every_seed_schedule_and_rate_is_run_once(tmp_path: Path) -> None:
    small = study(steps=8, evaluations=2, learning_rates=(0.01, 0.1))
    first = run(small, tmp_path, seeds=1, jobs=1)
    before = (tmp_path / "results.jsonl").read_bytes()
    result = run(small, tmp_path, jobs=1)
    assert (tmp_path / "results.jsonl").read_bytes().startswith(before)
    assert len(first.records) == 4 and len(lines(tmp_path)) == 8
    assert [(r["seed"], r["schedule"], r["learning_rate"]) for r in result.records] == units(
        small, 2
    )
    assert measured(result.records) == measured(read(small, tmp_path).records)
    assert measured(result.records[:1]) == measured(
        [{**result.records[0], **train(small, Run(0, "constant", 0.01))}]
    )


def test_progress_counts_runs(tmp_path: Path) -> None:
    told: list[tuple[int, int, bool]] = []
    small = study(steps=4, evaluations=1)
    for seeds in (1, 2):
        run(small, tmp_path, seeds=seeds, jobs=1, progress=lambda *now: told.append(now))
    assert told == [
        (0, 2, False),
        (1, 2, True),
        (2, 2, True),
        (2, 4, False),
        (3, 4, True),
        (4, 4, True),
    ]


def test_a_run_that_fails_is_reported_and_the_rest_goes_on(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    marker.touch()
    metric = Metric(partial(_metric, 1, marker))
    small = study(**ONE, steps=4, evaluations=1, seeds=3, metrics={"loss": metric})
    result = run(small, tmp_path, jobs=1)
    assert [r["seed"] for r in result.records] == [0, 2]
    (failure,) = lines(tmp_path, "failures.jsonl")
    assert failure == result.failures[0] and failure["seed"] == 1
    with (tmp_path / "failures.jsonl").open("a") as torn:
        torn.write('{"study": "ima')
    assert read(small, tmp_path).failures == [failure]
    assert failure["failed"].startswith(
        "ZeroDivisionError: this seed fails (test_study_run.py, line "
    )
    marker.unlink()
    again = run(small, tmp_path, jobs=1)
    assert not again.failures and [r["seed"] for r in again.records] == [0, 1, 2]
    assert not (tmp_path / "failures.jsonl").exists()


def _metric(seed: int, marker: Path, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    if marker.exists() and torch.equal(x, images(4 * seed + 3).test[0]):
        raise ZeroDivisionError("this seed\nfails")
    return cross_entropy(model, x, y)


def test_a_full_disk_is_told_with_the_name_of_the_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    metric = Metric(partial(_wrong, iter(range(4))))
    small = study(**ONE, steps=4, evaluations=1, seeds=1, metrics={"loss": metric})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*failures\.jsonl'"):
        run(small, tmp_path, jobs=1)


def test_a_schedule_that_fails_midway_is_a_run_that_fails(tmp_path: Path) -> None:
    """It is tried at some places of the run; what it gives between them is known in the run alone."""
    odd = {"odd": lambda share: 1.0 if share in PLACES else math.nan}
    small = study(schedules={**ONE["schedules"], **odd}, steps=4, evaluations=1, seeds=1)
    result = run(small, tmp_path, jobs=1)
    assert [r["schedule"] for r in result.records] == ["constant"]
    (failure,) = result.failures
    assert "schedule 'odd', with 0.25 of the run done, is nan, wanted a finite" in failure["failed"]


def test_if_every_run_fails_the_first_error_is_told(tmp_path: Path) -> None:
    metric = Metric(partial(_wrong, iter(range(4))))
    small = study(steps=4, evaluations=1, metrics={"loss": metric})
    with pytest.raises(
        RuntimeError, match="every run failed; the first: TypeError: the value is a tensor"
    ):
        run(small, tmp_path, jobs=1)
    assert len(lines(tmp_path, "failures.jsonl")) == 4


def _wrong(tried: Iterator[int], model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """No scalar, but when it is tried before the training."""
    return model(x) if next(tried, None) is None else cross_entropy(model, x, y)


def test_a_metric_that_is_nan_is_null_and_the_run_is_kept(tmp_path: Path) -> None:
    metrics = {"loss": Metric(cross_entropy), "nan": Metric(lambda *_: torch.tensor(math.nan))}
    metrics["vast"] = Metric(lambda *_: 10**400)  # type: ignore[arg-type]  # no float is so large
    small = study(**ONE, steps=8, evaluations=2, seeds=1, metrics=metrics)
    result = run(small, tmp_path, jobs=1)
    assert result.records[0]["curves"]["ema"]["nan"] == [None, None]
    assert result.records[0]["curves"]["ema"]["vast"] == [None, None]
    assert math.isnan(result.seeds[0].value("ema", "nan"))
    assert result.seeds[0].value("ema") > 0
    assert len(run(small, tmp_path, jobs=1).records) == 1


def test_a_training_that_diverges_is_kept(tmp_path: Path) -> None:
    small = study(**ONE, seeds=1, learning_rates=(1e-2, 1e30))
    result = run(small, tmp_path, jobs=1)
    assert result.records[1]["train_loss"][-1] is None
    assert {result.tuned(arm) for arm in small.arm_names} == {1e-2}


def killing(folder: Path, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """A metric that kills its process: always with the data of seed 1, once with those of seed 2."""
    always, once = (torch.equal(x, images(4 * seed + 3).validation[0]) for seed in (1, 2))
    if always or (once and not (folder / "killed").exists()):
        (folder / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return cross_entropy(model, x, y)


@pytest.mark.slow
def test_a_run_whose_process_is_killed_is_tried_once_more(tmp_path: Path) -> None:
    metrics = {"loss": Metric(partial(killing, tmp_path))}
    small = study(**ONE, steps=4, evaluations=1, seeds=4, metrics=metrics)
    result = run(small, tmp_path / "out", jobs=2)
    assert [r["seed"] for r in result.records] == [0, 2, 3]
    (failure,) = result.failures
    assert failure["seed"] == 1 and "its process was killed, twice" in failure["failed"]


def _as(seed: int, part: str, make: Callable[[Tensor], Tensor]) -> Data:
    """The images with the inputs of a part in another layout."""
    rows, labels = getattr(images(seed), part)
    return replace(images(seed), **{part: (make(rows), labels)})


def shrinking(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """A metric that writes into the weights."""
    for parameter in model.parameters():
        parameter.data.mul_(0.9)
    return cross_entropy(model, x, y)


def replacing(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """A metric that leaves other parameters in the model."""
    model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()}, assign=True)
    return cross_entropy(model, x, y)


WRONG: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"seeds": 0}, "seeds is 0, wanted an integer >= 1"),
    ({}, {"seeds": 10**9}, "the number of runs is 2000000000, wanted at most 1000000: fewer seeds"),
    ({}, {"jobs": 0}, "jobs is 0, wanted a number of processes, or -1"),
    ({}, {"vary": ("data",)}, r"vary is \['data'\], wanted some of init, order, dropout, split"),
    ({"claims": gain("emma")}, {}, "the claim 'A claim.': there is no arm 'emma', wanted live"),
    ({"claims": gain("ema", metric="f1")}, {}, "metric is 'f1', wanted loss, accuracy"),
    ({"claims": gain("ema", schedule="wsd")}, {}, "schedule is 'wsd', wanted constant, cosine"),
    ({"claims": lambda seed: seed.curve("emma")[0]}, {}, "there is no arm 'emma'"),
    ({"claims": gain("ema", when="best")}, {}, "claim 'A claim.': when is 'best', wanted 'last' or 'sel"),  # type: ignore[arg-type]
    ({"claims": lambda seed: seed.value("ema", part="train")}, {}, "part is 'train', wanted 'test' or"),
    ({"claims": lambda seed: seed.curve("ema")[4]}, {}, r"claim 'A claim.' raised IndexError: .*\(test_study_run.py, line"),
    ({"claims": lambda seed: seed.steps()[4]}, {}, r"claim 'A claim.' raised IndexError"),
    ({"claims": lambda _: sede.value("ema")}, {}, "claim 'A claim.' raised NameError: name 'sede'"),  # type: ignore[name-defined]  # noqa: F821
    ({"arms": {"rare": Arm(Uniform(), every=41)}}, {}, "arm 'rare' is never updated: every=41, and a run has 40 steps"),
    ({"arms": {"rare": Ensemble(1, every=41)}}, {}, "arm 'rare' is never updated"),
    ({"arms": {"late": Arm(Uniform(), start=0.99)}}, {}, "arm 'late' is the live weights at the end of a run: its start is 0.99"),
    ({"arms": {"late": Arm(Uniform(), every=10, start=0.8)}}, {}, "arm 'late' is the live weights"),
    ({"arms": {"one": Window(1)}}, {}, "arm 'one' is the live weights"),
    ({"arms": {"none": "exponential(0)"}}, {}, "arm 'none' is the live weights"),
    ({"model": lambda: nn.Linear(-1, 2)}, {}, r"study's model raised RuntimeError: .*\(test_study_run.py, line"),
    ({"model": lambda: [nn.Linear(2, 1)]}, {}, "the study's model returned list, wanted Module"),
    ({"data": lambda _: 1 / 0}, {}, "the study's data raised ZeroDivisionError: division by zero"),
    ({"data": lambda _: ((), (), ())}, {}, "data returned tuple, wanted polyak.study.Data"),
    ({"optimizer": lambda *_: None}, {}, "optimizer returned NoneType, wanted one torch Optimizer; "),
    ({"optimizer": lambda p, rate: [torch.optim.SGD(p, rate)]}, {}, "returned list, wanted one torch Optimizer; parts that train apart are its parameter groups"),
    ({"loss": lambda model, x: model(x)}, {}, r"loss raised TypeError: .*takes 2 positional"),
    ({"batch_size": 91}, {}, "batch_size is 91, wanted at most the 90 rows of the training part"),
    ({"metrics": {"f": Metric(lambda model, x, _: model(x))}}, {}, r"metric 'f' on the validation part: the value is a tensor \(45, 3\), wanted a"),
    ({"metrics": {"f": Metric(lambda model, x, y: cross_entropy(model, x.mul_(0.9), y))}}, {}, "metric 'f' on the validation part, or a layer that it calls, writes into the data: every later"),
    ({"metrics": {"f": Metric(shrinking)}}, {}, "metric 'f' on the validation part, or a layer that it calls, changes 1.weight: every later"),
    ({"metrics": {"f": Metric(replacing)}}, {}, "metric 'f' on the validation part, or a layer that it calls, changes 1.weight: every later"),
    ({"metrics": {"f": Metric(lambda model, *_: model[1].weight.data.fill_(torch.nan).isnan().sum())}}, {}, "metric 'f' on the validation part, or a layer that it calls, changes 1.weight: "),
    ({"data": lambda split: _as(split, "train", Tensor.to_sparse)}, {}, "the study's data: cannot take rows of tensor 0 of its part train, of torch.sparse_coo on cpu; wanted a dense tensor"),
    ({"data": lambda split: _as(split, "test", Tensor.to_mkldnn)}, {}, "rows of tensor 0 of its part test, of torch._mkldnn on cpu; wanted a dense"),
    ({"metrics": {"f": Metric(lambda *_: "0.5")}}, {}, "metric 'f' on the validation part: the value is str, wanted a scalar"),  # type: ignore[arg-type]
    ({"metrics": {"f": Metric(lambda *_: torch.tensor(1j))}}, {}, r"metric 'f' on the validation part: the value is a tensor \(\) of complex numbers, wanted a"),
    ({"metrics": {"f": Metric(lambda *_: None)}}, {}, "metric 'f' on the validation part: the value is NoneType, wanted a scalar"),  # type: ignore[arg-type]
    ({"metrics": {"f": Metric(lambda *_: 1 / 0)}}, {}, "study's metric 'f' on the validation part raised ZeroDivisionError"),  # type: ignore[arg-type]
    ({"loss": lambda *_: 1.0}, {}, "the study's loss returned float, wanted Tensor"),
    ({"loss": lambda model, x, _: model(x).detach().sum()}, {}, "loss returned a tensor without a gradient, wanted one without detach"),
    ({"loss": torch.no_grad()(cross_entropy)}, {}, "loss returned a tensor without a gradient, wanted one without detach"),
    ({"loss": lambda model, x, _: model(x)}, {}, r"loss returned a tensor \(\d+, 3\), wanted a scalar: the mean"),
    ({"loss": lambda *_: torch.ones((), requires_grad=True)}, {}, "loss does not depend on a parameter of the model"),
    ({"loss": lambda model, x, _: model(x).sum() * math.nan}, {}, "loss is nan on the first batch, before any step"),
    ({"model": nn.Flatten}, {}, "model has no parameter with requires_grad: nothing to train"),
    ({"model": lambda: mlp().requires_grad_(False)}, {}, "model has no parameter with requires_grad"),
    ({"model": lambda: nn.LazyLinear(3)}, {}, "model has weight, which has no shape yet: run one batch"),
    ({"model": partial(lambda same: same, mlp())}, {}, "returned the same 1.weight twice, wanted a new model"),
    ({"optimizer": lambda p, _: torch.optim.SGD(p, 0.1), "learning_rates": (0.1, 0.3)}, {}, "the same learning rate 0.1 when it is called with 0.1 and 0.3"),
    ({"optimizer": torch.optim.LBFGS}, {}, r"optimizer raised TypeError: .*'closure'"),
    ({"model": lambda: sys.exit(0)}, {}, r"model raised SystemExit: 0 \(test_study_run.py, line"),
    ({"metrics": {"f": Metric(lambda model, x, y: cross_entropy(model, x, y) if torch.equal(x, images(3).validation[0]) else model(x))}}, {}, "metric 'f' on the test part: the value is a tensor"),
    ({"claims": lambda _: None}, {}, "the claim 'A claim.': its quantity is of type NoneType, wanted a number"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "options", "message"), WRONG, ids=[w[2] for w in WRONG])
def test_what_does_not_fit_is_refused_before_the_training(
    tmp_path: Path, fields: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    if claim := fields.get("claims"):
        fields = {"claims": (Claim("A claim.", claim, Region.above(0)),)}
    with pytest.raises(ValueError, match=message):
        run(study(**fields), tmp_path / "out", **{"jobs": 1, **options})
    assert not (tmp_path / "out").exists()


SHORT: list[tuple[dict[str, Any], str]] = [
    ({"arms": {"slow": "exponential(half_life=40)"}}, r"arm 'slow' is too slow .* 51 % .* of step 1;"),
    ({"arms": {"slow": Arm(parse("exponential(0.99)"), start=0.5)}}, "arm 'slow' is too slow .* step 21;"),
    ({"arms": {"sma": Window(41)}}, "arm 'sma' wants 41 snapshots and gets 40 in a run"),
    ({"arms": {"lawa": Arm(Window(5), every=5, start=0.5)}}, "arm 'lawa' wants 5 snapshots and gets 4"),
    ({"arms": {"few": Ensemble(9, every=5)}}, "arm 'few' wants 9 snapshots and gets 8"),
    ({"arms": {"fast": Arm(parse("exponential(0.7)"), swept=True)}}, "arm 'fast' is swept, and 38 % of"),
    ({"schedules": {"p": Plateau(patience=3)}}, "schedule 'p' never lowers the learning rate: patience=3"),
    ({"schedules": {"p": Plateau(patience=0, stop=4)}}, "schedule 'p' never stops a run: stop=4"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), SHORT, ids=[s[1] for s in SHORT])
def test_what_a_run_is_too_short_for_is_told(fields: dict[str, Any], message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        require_feasible(study(**fields))


@pytest.mark.parametrize(
    "arms",
    [
        {"ema": "exponential(half_life=38)", "bema": "bema(0.9)"},
        {"sma": Window(40), "lawa": Arm(Window(5), every=8), "last": Arm(Uniform(), start=0.95)},
        {"statistics": Arm(Window(1), recalibrate=True), "stale": Arm(Window(1), every=7)},
        {"slow": Arm(Exponential(half_life=20), swept=True), "mean": Arm(Window(20), swept=True)},
        {"all": Ensemble(8, every=5), "debiased": "exponential(0.999, debias=True)"},
    ],
)
def test_an_average_that_a_run_has_room_for_is_no_fault(arms: dict[str, Any]) -> None:
    require_feasible(study(arms=arms, schedules={"p": Plateau(patience=2, stop=3)}))


def test_a_quantity_that_is_not_defined_for_ones_is_no_error(tmp_path: Path) -> None:
    def quantity(seed: Seed) -> float:
        return 1 / (seed.value("ema") - 1)

    claims = (Claim("A claim.", quantity, Region.above(0)),)
    run(study(claims=claims, steps=4, evaluations=1), tmp_path, seeds=1, jobs=1)


FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"name": "a b"}, "name is 'a b', wanted a word"),
    ({"steps": 0}, "steps is 0, wanted an integer >= 1"),
    ({"evaluations": 41}, "evaluations is 41, wanted at most the 40 steps"),
    ({"learning_rates": ()}, "learning_rates is (), wanted different numbers > 0"),
    ({"learning_rates": (0.1, 0.1)}, "wanted different numbers > 0"),
    ({"learning_rates": 0.1}, "learning_rates is 0.1, wanted different numbers > 0, such as"),
    ({"learning_rates": ("a",)}, "learning_rates is ('a',), wanted different numbers > 0"),
    ({"learning_rates": (float("nan"),)}, "learning_rates is (nan,), wanted different numbers"),
    ({"schedules": {"s": lambda _: math.nan}}, "schedule 's', with 0 of the run done, is nan"),
    ({"schedules": {"s": lambda share: 0.5 - share}}, "with 0.505 of the run done, is -0.004936"),
    ({"schedules": {"s": lambda _: "a"}}, "of the run done, is 'a', wanted a finite factor"),
    ({"schedules": {"s": lambda _: 1 / 0}}, "schedule 's' raised ZeroDivisionError: "),
    ({"schedules": {"s": 0.5}}, "schedule 's' is 0.5, wanted a function of the share, or Plateau"),
    ({"schedules": ["constant"]}, "schedules is ['constant'], wanted a mapping of names"),
    ({"arms": ["uniform()"]}, "arms is ['uniform()'], wanted a mapping of names"),
    ({"arms": {1: "uniform()"}}, "arms is {1: 'uniform()'}, wanted a mapping of names"),
    ({"arms": {"": "uniform()"}}, "arms is {'': 'uniform()'}, wanted a mapping of names"),
    ({"quick": {"steps": "a"}}, "quick: steps is 'a', wanted an integer >= 1"),
    ({"quick": {"evaluations": 41}}, "quick: evaluations is 41, wanted at most the 40 steps"),
    ({"schedules": {}}, "schedules is {}, wanted at least one"),
    ({"schedules": {"p": Plateau("emma")}}, "schedule 'p': there is no arm 'emma'"),
    ({"arms": {"live": "uniform()"}}, "an arm's name is 'live', wanted another name"),
    ({"arms": {"ema": "exponentia(0.9)"}}, "arm 'ema': "),
    ({"arms": {"ema": 0.9}}, "arm 'ema': rule is float, wanted a polyak.Rule or its spec"),
    ({"quick": {"stepps": 1}}, "quick has ['stepps'], wanted fields of Study"),
    ({"metrics": {"f1": max}}, "metric 'f1' is <built-in function max>, wanted a Metric"),
    *(({name: nn.Linear(2, 3)}, f"{name} is of type Linear, wanted a function") for name in ("model", "data", "loss", "optimizer")),
    ({"claims": "live"}, "claims is of type str, wanted a tuple of Claim"),
    ({"claims": ["The EMA is better."]}, "claims[0] is of type str, wanted a tuple of Claim"),
    ({"published": (0.5,)}, "published[0] is of type float, wanted a tuple of Published"),
    ({"caveats": "small data"}, "caveats is of type str, wanted a tuple of str"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), FIELDS, ids=[f[1] for f in FIELDS])
def test_a_bad_field_is_refused_with_its_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError)) as refused:
        study(**fields)
    assert message in str(refused.value)


PIECES: list[tuple[Callable[[], Any], str]] = [
    (lambda: Claim("A claim.", gain("ema"), (0, 1)), "region is (0, 1), wanted a Region"),  # type: ignore[arg-type]
    (lambda: Claim("A claim.", "ema", Region()), "the quantity of a claim is of type str, wanted"),  # type: ignore[arg-type]
    (lambda: Published("x", 0.5, 0.5), "the quantity of a published figure is of type float"),  # type: ignore[arg-type]
    (lambda: Metric(3), "a metric's function is of type int, wanted a function"),  # type: ignore[arg-type]
    (lambda: Data(torch.zeros(3), (), ()), "train is of type Tensor, wanted a tuple of Tensor"),  # type: ignore[arg-type]
    (lambda: Data((torch.zeros(3).numpy(),), (), ()), "train[0] is of type ndarray, wanted a"),  # type: ignore[arg-type]
    (
        lambda: Data((torch.zeros(0, 2),), (), ()),
        "rows of train is [0], wanted the same number >= 1",
    ),
]


@pytest.mark.parametrize(("make", "message"), PIECES, ids=[p[1] for p in PIECES])
def test_a_bad_piece_of_a_study_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError) as refused:
        make()
    assert message in str(refused.value)


def test_a_list_is_as_good_as_a_tuple() -> None:
    part = [torch.zeros(3, 2), torch.zeros(3)]
    data = Data(part, part, part)  # type: ignore[arg-type]
    assert isinstance(data.train, tuple) and len(data.test) == 2


def test_a_claim_that_fails_for_a_seed_is_named_and_nothing_is_lost(tmp_path: Path) -> None:
    """When it is mended, the same records are judged."""

    def quantity(seed: Seed) -> float:
        return 1 / (seed.number - 1)

    small = study(**ONE, steps=4, evaluations=1, seeds=2)
    wrong = replace(small, claims=(Claim("A claim.", quantity, Region.above(0)),))
    result = run(wrong, tmp_path, jobs=1)
    before = (tmp_path / "results.jsonl").read_bytes()
    said = r"the claim 'A claim.', for seed 1, raised ZeroDivisionError: .*test_study_run.py, line"
    with pytest.raises(ValueError, match=said):
        judge(result)
    mended = replace(small, claims=(Claim("A claim.", gain("ema"), Region.above(0)),))
    assert len(judge(run(mended, tmp_path, jobs=1))) == 1
    assert (tmp_path / "results.jsonl").read_bytes() == before


def test_a_run_that_exits_is_a_run_that_fails(tmp_path: Path) -> None:
    def data(split: int) -> Data:
        return images(split) if split == 3 else sys.exit("no data")

    result = run(study(**ONE, steps=4, evaluations=1, seeds=2, data=data), tmp_path, jobs=1)
    (failure,) = result.failures
    assert failure["failed"].startswith("SystemExit: no data (test_study_run.py, line ")


def test_what_ends_this_process_ends_the_study(tmp_path: Path) -> None:
    """A signal's handler may raise its own kind of `SystemExit`, as the command line's does."""

    class Terminated(SystemExit):
        pass

    def data(split: int) -> Data:
        if split != 3:
            raise Terminated
        return images(split)

    with pytest.raises(Terminated):
        run(study(**ONE, steps=4, evaluations=1, seeds=2, data=data), tmp_path, jobs=1)
    assert len(lines(tmp_path)) == 1


def test_what_cannot_be_sent_to_other_processes_is_refused(tmp_path: Path) -> None:
    loss = partial(lambda _, *rows: cross_entropy(*rows), threading.Lock())
    with pytest.raises(ValueError, match=r"cannot be sent to other processes .*lock.*jobs=1"):
        run(study(**ONE, steps=4, evaluations=1, loss=loss), tmp_path / "out", jobs=2)
    assert not (tmp_path / "out").exists()


def test_parts_must_have_equal_rows() -> None:
    x, y = torch.zeros(3, 2), torch.zeros(2)
    with pytest.raises(ValueError, match=r"rows of validation is \[3, 2\], wanted the same number"):
        Data((x, x), (x, y), (x, x))


def moved(data: Data, row: int) -> Data:
    """The data with another entry of a training row."""
    data.train[0][row, 0, 5, 5] += 1
    return data


# What a recipe may change between two runs: a line each.
OTHER: list[tuple[dict[str, Any], str]] = [
    ({"steps": 8}, "steps: 4 there, 8 now"),
    (
        {"arms": {**arms(4), "ema": "exponential(0.6)"}},
        "arms: ema: 'exponential(0.5), every 1' there",
    ),
    ({"model": partial(mlp, 0.5)}, "first losses: "),
    ({"optimizer": lambda p, lr: torch.optim.SGD(p, lr)}, "first losses: "),
    ({"schedules": {"constant": lambda _: 0.5}}, "schedule: '1 1 1 1 1 1 1 1 1, mean 1' there"),
    (
        {"schedules": {"constant": lambda share: 1 - 0.5 * (0.03 < share < 0.06)}},
        "1 1, mean 0.98",
    ),
    ({"metrics": {"loss": Metric(lambda *rows: 2 * cross_entropy(*rows))}}, "first values: loss: "),
    (
        {"data": lambda split: replace(images(split), validation=images(split).test)},
        "first values: loss: ",
    ),
    (
        {"data": lambda split: replace(images(split), test=images(split).validation)},
        "first values: loss: ",
    ),
    (
        {"arms": {**arms(4), "ensemble": Ensemble(2, combine=mean_probability)}},
        "combined by mean_probability",
    ),
    (
        {"arms": arms(4) | {"odd": Ensemble(3, combine=lambda outputs: outputs.amax(0))}},
        "first values: loss: ",
    ),
    ({"data": lambda split: moved(images(split), row=0)}, "data: train: "),
    ({"data": lambda split: moved(images(split), row=89)}, "data: train: "),
    ({"schedules": {"other": lambda _: 0.5}}, "schedule is 'constant', wanted other"),
]


@pytest.mark.parametrize(("changes", "message"), OTHER, ids=[o[1] for o in OTHER])
def test_records_of_another_study_are_refused_and_stay(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    fields = {**ONE, "steps": 4, "evaluations": 1, "seeds": 1}
    fields |= {"arms": arms(4) | {"odd": Ensemble(3, combine=lambda outputs: outputs.mean(0))}}
    run(study(**fields), tmp_path, jobs=1)
    before = (tmp_path / "results.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"results\.jsonl, line 1: ") as refused:
        run(study(**{**fields, **changes}), tmp_path, jobs=1)
    assert message in str(refused.value)
    assert (tmp_path / "results.jsonl").read_bytes() == before


def test_a_study_whose_metric_draws_anew_continues(tmp_path: Path) -> None:
    own = torch.Generator()
    drawn = {
        "loss": Metric(cross_entropy),
        "drawn": Metric(lambda *_: torch.rand((), generator=own)),
    }
    small = study(**ONE, steps=4, evaluations=1, metrics=drawn)
    assert [len(run(small, tmp_path, seeds=seeds, jobs=1).records) for seeds in (1, 2)] == [1, 2]
    values = lines(tmp_path)[0]["conditions"]["first values"]
    assert values["drawn"] == ["random"] and len(values["loss"]) == 3


DAMAGES: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda r: r.pop("seconds"), "seconds is missing"),
    (lambda r: r["curves"].pop("ema"), "ema is missing in curves"),
    (lambda r: r["curves"]["ema"]["loss"].append(1.0), "has 2 values, wanted 1"),
    (lambda r: r["test"]["ema"]["last"].update(loss="x"), "loss is 'x', wanted a finite number or nu"),
    (lambda r: r.update(learning_rate=-1.0), "learning_rate is -1.0, wanted a finite number > 0"),
    (lambda r: r.update(more=1), "['more'] is unknown"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[d[1] for d in DAMAGES])
def test_a_damaged_record_is_refused_with_its_line(
    tmp_path: Path, damage: Callable[[dict[str, Any]], Any], message: str
) -> None:
    small = study(**ONE, steps=4, evaluations=1, seeds=1)
    run(small, tmp_path, jobs=1)
    (record,) = lines(tmp_path)
    damage(record)
    (tmp_path / "results.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(ValueError, match=r"results\.jsonl, line 1: ") as refused:
        run(small, tmp_path, jobs=1)
    assert message in str(refused.value)


def test_a_plateau_lowers_the_rate_when_a_metric_stands_still_in_either_direction() -> None:
    """torch's threshold is relative, so that -0.9 after -0.9 would be an improvement."""
    for lower in (True, False):
        metrics = {"still": Metric(lambda *_: torch.tensor(0.9), lower_is_better=lower)}
        plateau = {"plateau": Plateau(patience=1, stop=5)}
        several = study(metrics=metrics, schedules=plateau, evaluations=20)
        record = train(several, Run(0, "plateau", 1.0))
        assert record["rates"] == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
        assert record["stopped_early"]
        assert record["test"]["live"]["selected"]["step"] == 2  # the first of equal values


def test_a_folder_is_read_however_it_was_made(tmp_path: Path) -> None:
    small = study(steps=4, evaluations=1)
    run(replace(small, stacked=2), tmp_path, jobs=1, vary=("init",))
    assert len(read(small, tmp_path).records) == 4
    with pytest.raises(FileNotFoundError, match=r"has no results\.jsonl; run the study first"):
        read(small, tmp_path / "other")
    (tmp_path / "results.jsonl").write_text("no json\n")
    with pytest.raises(ValueError, match=r"results\.jsonl, line 1: it is not the record of a run"):
        read(small, tmp_path)


def test_vary_holds_the_other_sources(tmp_path: Path) -> None:
    assert [source_seed(5, s) for s in ("init", "order", "dropout", "split")] == [20, 21, 22, 23]
    assert [source_seed(5, s, ("init",)) for s in ("init", "order", "split")] == [20, 1, 3]
    small = study(**ONE, steps=4, evaluations=1)
    still = run(small, tmp_path / "none", jobs=1, vary=())
    assert len(measured(still.records)) == 2
    first, second = still.records
    assert first["curves"] == second["curves"] and first["test"] == second["test"]
    for source in ("init", "order", "dropout", "split"):
        moved = run(small, tmp_path / source, jobs=1, vary=(source,)).records
        assert moved[0]["curves"] == first["curves"] != moved[1]["curves"], source


def test_arms_evaluations_and_metrics_that_draw_do_not_change_the_training() -> None:
    noisy = {"loss": Metric(lambda m, x, y: cross_entropy(m, x, y) + 0 * torch.rand(()))}
    few = train(study(arms={}), Run(0, "cosine", 0.05))
    for changes in ({}, {"metrics": noisy}):
        many = train(study(**changes), Run(0, "cosine", 0.05))
        assert many["train_loss"] == few["train_loss"]
        assert many["curves"]["live"]["loss"] == few["curves"]["live"]["loss"]
    often = train(study(evaluations=40), Run(0, "cosine", 0.05))
    assert often["curves"]["live"]["loss"][9::10] == few["curves"]["live"]["loss"]


def test_the_caller_s_stream_and_threads_are_left_alone() -> None:
    torch.manual_seed(11)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    train(study(), Run(0, "constant", 0.05))
    assert torch.equal(before, torch.get_rng_state()) and torch.get_num_threads() == threads


def zeroed(model: nn.Module, x: Tensor, _: Tensor) -> Tensor:
    return model(x).zero_().sum()  # type: ignore[no-any-return]


def of_one_row(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(model, x[:1], y[:1])


def leaving_train_mode(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    value = cross_entropy(model.eval(), x[:1], y[:1])
    model.train()
    return value


def in_train_mode(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    value = cross_entropy(model.train(), x, y)
    model.eval()
    return value


def of_a_copy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data.mul_(0.5)
    return cross_entropy(other, x, y)


def of_a_call(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    halves = {name: parameter * 0.5 for name, parameter in model.named_parameters()}
    return functional.cross_entropy(functional_call(model, halves, (x,)), y)


def in_place_and_back(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    for parameter in model.parameters():
        parameter.mul_(0.5)
    value = cross_entropy(model, x, y)
    for parameter in model.parameters():
        parameter.mul_(2)
    return value


@pytest.mark.parametrize("metric", [of_a_copy, of_a_call, in_place_and_back])
@torch.no_grad()
def test_a_metric_may_judge_other_weights(metric: Any) -> None:
    """The model returns its last output again for the same inputs, but not for other weights."""
    part, model, half = images(0).validation, cnn().eval(), cnn().eval()
    half.load_state_dict({n: t if "running" in n else t / 2 for n, t in model.state_dict().items()})
    metrics = {"loss": Metric(cross_entropy), "other": Metric(metric)}
    found = metrics_of(study(metrics=metrics), model, part)
    assert found["loss"] == cross_entropy(model, *part)
    assert found["other"] == cross_entropy(half, *part) != found["loss"]


def test_a_metric_may_train_a_copy() -> None:
    """Of outputs that have gradients, none is kept for a call without them."""

    def tuned(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        other = copy.deepcopy(model)
        optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            with torch.enable_grad():
                cross_entropy(other, x, y).backward()
            optimizer.step()
        return cross_entropy(other, x, y)

    tuning = study(metrics={"f": Metric(tuned)}, arms={})
    assert tried(tuning)["first values"]
    assert train(tuning, Run(0, "constant", 0.05))["test"]["live"]["last"]["f"]


def stacked_alone(study: Study, run: Run) -> dict[str, Any]:
    return train_stacked(study, [run])[0]


@pytest.mark.parametrize("train", first_quick([train, stacked_alone]))
@pytest.mark.parametrize("first", [zeroed, of_one_row, cross_entropy, leaving_train_mode, in_train_mode])  # fmt: skip
def test_metrics_that_share_a_forward_pass_do_not_disturb_each_other(
    first: Any, train: Any
) -> None:
    alone = train(study(), Run(0, "constant", 0.05))
    metrics = {
        "loss": Metric(cross_entropy),
        "first": Metric(first),
        "again": Metric(cross_entropy),
    }
    record = train(study(metrics=metrics), Run(0, "constant", 0.05))
    for arm in study().arm_names:
        for name in ("loss", "again"):
            assert record["curves"][arm][name] == alone["curves"][arm]["loss"]
        same = record["curves"][arm]["first"] == alone["curves"][arm]["loss"]
        assert same == (first is cross_entropy)


@pytest.mark.parametrize("train", [train, stacked_alone])
def test_a_metric_in_train_mode_leaves_the_running_statistics(train: Any) -> None:
    metrics = {"first": Metric(in_train_mode), "loss": Metric(cross_entropy)}
    changes: list[dict[str, Any]] = [{}, {"metrics": metrics}]
    records = [train(study(model=cnn, **each), Run(0, "constant", 0.05)) for each in changes]
    for arm in study().arm_names:
        curves = [record["curves"][arm]["loss"] for record in records]
        assert curves[0] == curves[1]


@pytest.mark.parametrize("train", [train, stacked_alone])
def test_a_model_may_write_into_its_input(train: Any) -> None:
    in_place, other = (study(model=partial(Dimmed, inplace)) for inplace in (True, False))
    assert tried(in_place) == tried(other)
    records = [train(each, Run(0, "constant", 0.05)) for each in (in_place, other)]
    assert records[0]["curves"] == records[1]["curves"]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "coo": Tensor.to_sparse,
    "csr": lambda rows: rows.to_sparse(layout=torch.sparse_csr),
    "nested": lambda rows: torch.nested.as_nested_tensor(list(rows), layout=torch.jagged),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_data_that_is_not_dense_is_the_same_data(layout: str, tmp_path: Path) -> None:
    """Whole parts are given to metrics: only rows of the training part must be taken."""

    def data(make: Callable[[Tensor], Tensor], seed: int) -> Data:
        held = images(seed)
        wide = torch.ones(45, 1100).triu()
        return replace(
            held, validation=(*held.validation, make(wide)), test=(*held.test, make(wide))
        )

    def metric(model: nn.Module, x: Tensor, y: Tensor, wide: Tensor) -> Tensor:
        return cross_entropy(model, x, y) * wide.sum()

    kept = {**ONE, "metrics": {"loss": Metric(metric)}, "steps": 4, "evaluations": 1, "seeds": 1}
    run(study(**kept, data=partial(data, LAYOUTS[layout])), tmp_path, jobs=1)
    before = lines(tmp_path)
    run(study(**kept, data=partial(data, torch.clone)), tmp_path, jobs=1)
    assert lines(tmp_path) == before


def test_a_layer_may_keep_its_own_weight_below_max_norm() -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Embedding(2, 3, max_norm=0.1), nn.Flatten(), nn.LazyLinear(3))

    def built() -> nn.Module:
        made = model()
        made(torch.zeros(1, 2, dtype=torch.int64))
        return made

    def data(seed: int) -> Data:
        held = images(seed)
        parts = (held.train, held.validation, held.test)
        return Data(*(((x.flatten(1)[:, :2] > 0).long(), y) for x, y in parts))

    assert tried(study(model=built, data=data))["first values"]


def test_a_loss_may_write_into_its_batch() -> None:
    """Recalibration reads rows of the training data, too."""
    data, before = images(0), images(0).train

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(model, x.add_(0.5), y)

    arms = {"mean": Arm(Uniform(), recalibrate=True)}
    small = study(model=cnn, data=lambda _: data, loss=loss, arms=arms)
    train(small, Run(0, "constant", 0.05))
    assert all(map(torch.equal, data.train, before))


def test_an_arm_is_selected_on_validation_and_reported_on_test() -> None:
    record = train(study(evaluations=20), Run(1, "constant", 0.3))
    for arm, curve in record["curves"].items():
        place = curve["loss"].index(min(v for v in curve["loss"] if v is not None))
        assert record["test"][arm]["selected"]["step"] == record["steps"][place]


SCRIPT = """
from pathlib import Path
from polyak.study import run
from study_models import study
if __name__ == "__main__":
    run(study(steps=20, evaluations=2, seeds=500), Path({out!r}), jobs={jobs})
"""


@pytest.mark.slow
@pytest.mark.parametrize(("jobs", "sent"), [(1, signal.SIGKILL), (2, signal.SIGINT)])
def test_an_interrupted_study_goes_on_to_the_same_results(
    tmp_path: Path, jobs: int, sent: signal.Signals
) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    script = [sys.executable, "-c", SCRIPT.format(out=str(tmp_path), jobs=jobs)]
    process = subprocess.Popen(
        script, stderr=subprocess.PIPE, start_new_session=True, env=environment, text=True
    )
    while process.poll() is None and len(lines_whole(tmp_path)) < 3:
        time.sleep(0.01)
    os.killpg(process.pid, sent)
    _, said = process.communicate()
    assert "Warning" not in said
    done = lines_whole(tmp_path)
    assert 3 <= len(done) < 1000
    seeds = max(r["seed"] for r in map(json.loads, done)) + 1
    long = study(steps=20, evaluations=2, seeds=500)
    result = run(long, tmp_path, seeds=seeds, jobs=1)
    assert len(result.records) == 2 * seeds
    first = train(long, Run(0, "constant", 0.05))
    assert result.records[0]["curves"] == first["curves"]


def lines_whole(folder: Path) -> list[bytes]:
    path = folder / "results.jsonl"
    return (
        [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        if path.exists()
        else []
    )


RECIPE = """
from dataclasses import dataclass
from torch import nn
from beside import WIDTH
from polyak.study import Data, Study
import torch

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, WIDTH)
    def forward(self, x):
        return self.layer(x)

def data(seed):
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(seed))
    return Data((x, x), (x, x), (x, x))

study = Study(name="mine", model=Net, data=data, loss=lambda m, x, y: nn.functional.mse_loss(m(x), y),
              arms={"ema": "exponential(0.5)"}, steps=4, batch_size=8, evaluations=2, seeds=2, learning_rates=(0.1,))
"""


@pytest.mark.slow
def test_a_file_is_a_recipe_also_in_other_processes(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(RECIPE)
    (tmp_path / "beside.py").write_text("WIDTH = 2\n")
    before = [*sys.path]
    with opened_recipe(str(tmp_path / "mine.py")) as mine:
        result = run(mine, tmp_path / "out", jobs=2)
    assert len(result.records) == 2 and not result.failures
    assert sys.path == before


FILES: list[tuple[str, str]] = [
    ("import nothing_of_this_name", r"file.py does not run: ModuleNotFoundError: .* \(line 1\)"),
    (
        "\nstudy = (",
        r"file.py does not run: SyntaxError: [^(]*'\(' was never closed \(file.py, line 2\)$",
    ),
    ("x = 1\nx / 0", r"file.py does not run: ZeroDivisionError: .* \(line 2\)"),
    ("", "has no `study`, wanted a module-level study = Study"),
    ("\nraise SystemExit(0)", r"file.py does not run: SystemExit: 0 \(line 2\)"),
    ("study = 3", "has `study`, a int, wanted a module-level study"),
]


@pytest.mark.parametrize(("content", "message"), FILES)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "file.py").write_text(content)
    with pytest.raises(ValueError, match=message), opened_recipe(str(tmp_path / "file.py")):
        pass


def test_an_unknown_name_lists_the_names(tmp_path: Path) -> None:
    wanted = r"no study 'digit', wanted .*digits_mlp.*, or a file that"
    with pytest.raises(ValueError, match=wanted), opened_recipe("digit"):
        pass
    missing = pytest.raises(FileNotFoundError, match="there is no file")
    with missing, opened_recipe(str(tmp_path / "none.py")):
        pass


def test_shipped_recipes_have_their_module_s_name() -> None:
    shipped = recipes()
    assert all(isinstance(s, Study) and s.name == name for name, s in shipped.items())
