"""Tables: the results of the study, beside those of the article."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from polyak.rules import LIVE
from polyak.study import _article as article
from polyak.study import _quantities as q
from polyak.study._arms import ARTICLE
from polyak.study._claims import Judgement, Part
from polyak.study._costs import Costs
from polyak.study._record_format import Record
from polyak.study._statistics import bootstrap, share
from polyak.study._text import FORMS, Table, between, number, percent

Records = Sequence[Record]
THOUSANDTHS = 1000


def verdicts(judgements: Sequence[Judgement]) -> Table:
    """The claims with their verdicts, and the parts that decide them."""
    return Table(
        "verdicts",
        "Verdicts on the article's claims",
        ("claim", "the article says", "verdict", "because"),
        tuple(
            (
                j.claim,
                j.text,
                j.verdict,
                "; ".join(_reason(part) for part in j.parts if part.verdict),
            )
            for j in judgements
        ),
    )


def _reason(part: Part) -> str:
    return f"{part.quantity}: {_figure(part)} ({part.verdict})"


def _figure(part: Part) -> str:
    return between(part.interval, FORMS[part.form])


def evidence(judgements: Sequence[Judgement]) -> Table:
    """Every quantity of every claim, with its interval and the range that decides."""
    return Table(
        "evidence",
        "The quantities of each claim, and their results",
        ("claim", "quantity, one value per seed", "estimate [95 % interval]", "seeds", "holds if", "verdict"),
        tuple(
            (j.claim, p.quantity, _figure(p), str(p.interval.seeds), p.wanted or "—", p.verdict or "—")
            for j in judgements
            for p in j.parts
        ),
    )  # fmt: skip


def summary(records: Records) -> list[str]:
    """Three sentences: the result at the stop, late on average, and the fluctuation."""
    gains = [q.gain(r, "mse") for r in records]
    late = bootstrap([q.late_log_ratio(r) for r in records if q.has_late(r)]).map(math.exp)
    ratios = q.finite(q.log_ratio(r, q.deviation, q.last_epochs) for r in records)
    wins = between(share([g > 0 for g in gains]), lambda v: percent(v, 0))
    return [
        f"At the stop, the EMA has the lower MSE in {wins} of the seeds; on average, live − EMA is "
        f"{between(bootstrap(gains), lambda v: number(v, 5))}.",
        f"Averaged over the epochs from {q.LATE} to the stop, its loss is "
        f"{between(late, lambda v: number(v, 3))} times the live model's.",
        f"Over the last {q.LAST} epochs, its standard deviation is "
        f"{between(bootstrap(ratios).map(math.exp), lambda v: number(v, 3))} times the live model's.",
    ]


def epochs(records: Records) -> Table:
    """The article's table 4.1, beside the means over the seeds still running at each epoch."""
    names = ("train_loss", "val_loss_original", "r2_original", "val_loss_ema", "r2_ema")
    rows: list[tuple[str, ...]] = []
    for epoch, *figures in article.TABLE_EPOCHS:
        running = [r["history"] for r in records if r["stop_epoch"] >= epoch]
        ours = [bootstrap([h[name][epoch - 1] for h in running]) for name in names]
        rows.append((str(epoch), "the article", *(number(value) for value in figures)))
        cells = (between(mean, number) if running else "—" for mean in ours)
        rows.append((str(epoch), f"{len(running)} seeds", *cells))
        below = [
            percent(float(np.mean([h[name][epoch - 1] < value for h in running])), 0)
            for name, value in zip(names, figures, strict=True)
            if running
        ]
        rows.append((str(epoch), "seeds below the article", *(below or ["—"] * len(names))))
    return Table(
        "epochs",
        "The article's table 4.1, beside ours",
        ("epoch", "runs", "train loss", "live loss", "live R²", "EMA loss", "EMA R²"),
        tuple(rows),
        "The article's single run; our mean [95 % interval] over the seeds that are still running at that "
        "epoch; and the share of these seeds whose figure is below the article's, which places its run "
        "among ours.",
    )


def final(records: Records) -> Table:
    """The article's table 4.3, beside ours at the stop and at the best epoch of each model."""
    rows: list[tuple[str, ...]] = []
    for metric, (live, average, improvement) in article.TABLE_FINAL.items():
        name = "R²" if metric == "r2" else metric.upper()
        rows.append(
            (
                f"{name}, the article",
                number(live),
                number(average),
                percent(improvement, 2),
                "—",
                "—",
            )
        )
        rows.append((f"{name} at the stop", *_pair(records, metric)))
        rows.append(
            (f"{name} at each model's best epoch", *_pair([r["best"] for r in records], metric))
        )
    return Table(
        "final",
        "The article's table 4.3, beside ours",
        ("metric", "live", "EMA", "improvement, relative", "improvement, paired difference", "seeds in which the EMA is better"),
        tuple(rows),
        "Means over seeds [95 % interval]; the relative improvement is a geometric mean. The best epoch "
        "is the one with the lowest validation MSE. It is chosen on the data that then judge it, which "
        "favours the model whose loss fluctuates more.",
    )  # fmt: skip


def _pair(pairs: Sequence[Record], metric: str) -> tuple[str, ...]:
    """Live, average, relative and absolute improvement, and the share of wins."""
    gains = [q.gain(pair, metric) for pair in pairs]
    relative = bootstrap([q.log_improvement(pair, metric) for pair in pairs])
    shares = relative.map(math.expm1 if metric == "r2" else lambda x: -math.expm1(-x))
    return (
        between(bootstrap([pair["live"][metric] for pair in pairs]), number),
        between(bootstrap([pair["average"][metric] for pair in pairs]), number),
        between(shares, lambda v: percent(v, 2)),
        between(bootstrap(gains), lambda v: number(v, 5)),
        between(share([gain > 0 for gain in gains]), lambda v: percent(v, 0)),
    )


def deviations(records: Records) -> Table:
    """Standard deviations of the validation loss in named windows of epochs."""
    windows: dict[str, Callable[[q.Curve], q.Curve]] = {
        "last 20: the last 20 epochs before the stop": q.last_epochs,
        "from 50: epoch 50 to the stop": q.from_50,
        "from 25: epoch 25 to the stop": q.from_25,
        "all: epoch 1 to the stop": lambda curve: curve,
    }
    live, average = article.STANDARD_DEVIATIONS
    theirs = (
        "the article, window not stated",
        number(live),
        number(average),
        f"{average / live:.2f}",
    )
    rows = [(name, *_deviation(records, window)) for name, window in windows.items()]
    return Table(
        "deviations",
        "Standard deviation of the validation loss over epochs",
        ("window", "live", "EMA", "EMA / live (geometric mean)"),
        (theirs, *rows),
        "Mean over seeds of each seed's sample standard deviation [95 % interval]. In a wide window it "
        "measures mostly the descent, which both models share, and less the fluctuation.",
    )


def _deviation(records: Records, window: Callable[[q.Curve], q.Curve]) -> tuple[str, ...]:
    pairs = [[q.deviation(window(curve)) for curve in q.curves(r)] for r in records]
    live, average = (q.finite(pair[i] for pair in pairs) for i in (0, 1))
    ratios = q.finite(q.log_ratio(r, q.deviation, window) for r in records)
    return (
        between(bootstrap(live), lambda v: number(v, 5)),
        between(bootstrap(average), lambda v: number(v, 5)),
        between(bootstrap(ratios).map(math.exp), lambda v: number(v, 3)),
    )


def arms(records: Records, costs: Costs) -> Table:
    """Every arm: accuracy, paired differences, memory, time and cost of a prediction."""
    return Table(
        "arms",
        "All arms at the stop",
        (
            "arm", "MSE ×10³", "MSE − live's ×10³", "seeds better than live",
            "MSE − article_ema's ×10³", "copies of the weights", "KiB", "µs per step",
            "forward passes", "time to predict",
        ),
        tuple(_arm(records, costs, name) for name in costs.arms),
        "Means over seeds [95 % interval]; a negative difference is an improvement. µs per step is the "
        "update of the arm, divided by the steps of an epoch for arms that update once an epoch; a "
        f"training step without averages takes {costs.step_microseconds:.0f} µs on this machine. Time to "
        "predict is measured relative to one network. SWA needs one copy if its budget is fixed in "
        "advance; with early stopping the last quarter is known only at the stop, so all epoch ends "
        "were kept here. SWA's own learning rate is not used.",
    )  # fmt: skip


def _arm(records: Records, costs: Costs, name: str) -> tuple[str, ...]:
    cost = costs.arms[name]
    mse = np.array(q.per_seed(records, name, "mse")) * THOUSANDTHS
    live, ema = (np.array(q.per_seed(records, n, "mse")) * THOUSANDTHS for n in (LIVE, ARTICLE))
    short = lambda v: number(v, 2)  # noqa: E731
    return (
        name,
        between(bootstrap(mse), short),
        "—" if name == LIVE else between(bootstrap(mse - live), short),
        "—"
        if name == LIVE
        else between(share([bool(w) for w in mse < live]), lambda v: percent(v, 0)),
        "—" if name == ARTICLE else between(bootstrap(mse - ema), short),
        str(cost.copies),
        f"{cost.bytes / 1024:.0f}",
        number(cost.microseconds, 2),
        str(cost.passes),
        f"{cost.prediction:.1f} ×",
    )


def metrics(records: Records) -> Table:
    """MSE, MAE and R² of every arm at the stop."""
    rows = [
        (name, *(between(bootstrap(q.per_seed(records, name, metric)), lambda v: number(v, 5))
                 for metric in ("mse", "mae", "r2")))
        for name in records[0]["arms"]
    ]  # fmt: skip
    return Table("metrics", "MSE, MAE and R² of all arms at the stop", ("arm", "MSE", "MAE", "R²"),
                 tuple(rows), "Means over seeds [95 % interval].")  # fmt: skip


def in_words(records: Records, costs: Costs) -> Table:
    """The article's comparisons in words of the EMA with other averages, as numbers."""
    ema = costs.arms[ARTICLE]
    rows = [(
        "T6", "one copy of the weights, constant in the length of the history, cheap",
        f"{ema.copies} copy; {ema.microseconds:.1f} µs a step, "
        f"{percent(ema.microseconds / costs.step_microseconds)} of a training step of "
        f"{costs.step_microseconds:.0f} µs on a network of {ema.bytes // 4} weights; {ema.passes} forward pass",
    )]  # fmt: skip
    compared = (
        ("T7", "against the simple moving average (SMA)", "sma_"),
        ("T8", "against SWA", "swa_"),
        ("T9", "against ensembling", "ensemble_"),
    )
    for label, text, prefix in compared:
        for name in (n for n in costs.arms if n.startswith(prefix)):
            rows.append((label, text, _against(records, costs, name)))
    return Table("in_words", "The article's comparisons in words, as numbers",
                 ("statement", "in words", "measured here"), tuple(rows))  # fmt: skip


def _against(records: Records, costs: Costs, other: str) -> str:
    ratios = [q.arm_log_ratio(record, ARTICLE, other) for record in records]
    ratio = between(bootstrap(ratios).map(math.exp), lambda v: number(v, 3))
    wins = sum(value < 0 for value in ratios)
    cost = costs.arms[other]
    return (
        f"MSE of the EMA / of {other}: {ratio} (geometric mean), lower in {wins} of {len(ratios)} "
        f"seeds; {other} keeps {_counted(cost.copies, 'copy', 'copies')} and takes "
        f"{_counted(cost.passes, 'forward pass', 'forward passes')}"
    )


def _counted(count: int, one: str, more: str) -> str:
    return f"{count} {one if count == 1 else more}"
