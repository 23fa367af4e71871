"""The article's report: its claims, tables and figures beside ours, as one page and a folder of data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from polyak.study import _article_figures as figures
from polyak.study import _article_tables as tables
from polyak.study import _claims as claims
from polyak.study import _costs as costs
from polyak.study import _methods as methods
from polyak.study import _page as pages
from polyak.study._page import (
    Block,
    Bullets,
    Claimed,
    Claims,
    Figures,
    Grid,
    Page,
    Reason,
    Section,
    Text,
)
from polyak.study._record_format import Record
from polyak.study._settings import Settings, as_json
from polyak.study._text import FORMS, Table, between


@dataclass(frozen=True)
class Report:
    """The tables of a study, and the path of its page."""

    tables: dict[str, Table]
    page: Path


def write_report(
    records: Sequence[Record], settings: Settings, measured: costs.Costs, folder: Path, made: str
) -> Report:
    """Write verdicts.json, costs.json, tables/, charts/ and report.html into a folder."""
    judgements = claims.judge(records)
    pages.write_json(folder / "verdicts.json", claims.as_json(judgements))
    pages.write_json(folder / "costs.json", costs.as_json(measured))
    page = _page(records, settings, judgements, measured, made)
    return Report(page.tables(), pages.write(page, folder))


def _page(
    records: Sequence[Record], settings: Settings, judgements: list[claims.Judgement],
    measured: costs.Costs, made: str,
) -> Page:  # fmt: skip
    stops = [record["stop_epoch"] for record in records]
    seeds = {"seeds": f"0 to {len(records) - 1}; torch.manual_seed(seed) before the model is made"}
    about = (
        f"The article's experiment, repeated over {len(records)} seeds. Runs of {min(stops)} to {max(stops)} "
        f"epochs. Conditions {records[0]['fingerprint']}."
    )
    sections: dict[str, tuple[str, tuple[Block, ...]]] = {
        "verdicts": ("Verdicts", (Text(_RULE), Claims(tuple(map(_claimed, judgements))))),
        "curves": ("The article's figure", (Figures(figures.curves(records)), Figures(figures.one_seed(records[0])))),
        "epochs": ("Epoch by epoch", (Grid(tables.epochs(records)),)),
        "final": ("At the stop", (Grid(tables.final(records)), Figures(figures.final(records)))),
        "deviations": ("Smoothness", (Grid(tables.deviations(records)),)),
        "stop": ("The stop", (*_stop(settings), Figures((*figures.epochs(records), *figures.after_stop(records))))),
        "arms": ("All arms", (Text(_ARMS), Figures(figures.arms(records)), Grid(tables.arms(records, measured)), Grid(tables.metrics(records)))),
        "words": ("In words", (Grid(tables.in_words(records, measured)),)),
        "evidence": ("Evidence", (Text(methods.RULE), Text(_TOLERANCES), Grid(tables.verdicts(judgements)), Grid(tables.evidence(judgements)))),
        "caveats": ("Caveats", (Bullets(_caveats(settings)),)),
    }  # fmt: skip
    return Page(
        "Does the article's moving average of the weights help?",
        about,
        tuple(tables.summary(records)),
        (
            *(Section(name, title, blocks) for name, (title, blocks) in sections.items()),
            methods.made(made, {**seeds, **as_json(settings)}),
        ),
    )


def _claimed(judgement: claims.Judgement) -> Claimed:
    reasons = tuple(
        Reason(part.quantity, between(part.interval, FORMS[part.form]), part.wanted, part.verdict)
        for part in judgement.parts
        if part.verdict
    )
    return Claimed(f"{judgement.claim} {judgement.text}", judgement.verdict, reasons)


def _stop(settings: Settings) -> tuple[Block, ...]:
    return (
        Text(
            f"A run stops when the EMA's loss has not improved for {settings.stop_patience} epochs. This does "
            "not tell whether it would have improved later. So every run continued for "
            f"{settings.epochs_after_stop} epochs after its stop; only this section uses them."
        ),
    )


_RULE = (
    "The article draws eight claims from one run. The study turns each claim into quantities with one value "
    "per seed. A claim holds if the 95 % interval over seeds lies inside the claimed range, does not hold if "
    "it lies outside, and is undecided otherwise. A claim with several parts holds if all parts hold, and "
    "does not hold if one part does not."
)
_ARMS = (
    "All averages were tracked in the same runs, so differences are paired within a seed. Only the article's "
    "EMA sets the learning rate and the stop."
)
_TOLERANCES = (
    "The study sets the tolerances, since the article gives none: 25 % for a figure, 10 % for an epoch, at "
    "least 90 % of seeds for “to the end” and “always”, 2 % for “the optimum is reached”. Rows without a "
    "verdict are for information."
)


def _caveats(settings: Settings) -> tuple[str, ...]:
    return (
        "The validation set sets the learning rate and the stop, and also judges the models, as in the article. There is no test set.",
        "The article's EMA sets the learning rate and the stop in every run, so every comparison depends on it. The other arms are judged at a moment that the EMA's loss chose.",
        "The loss of the live model fluctuates from epoch to epoch. Its best epoch is chosen on the data that judge it, so it is partly luck.",
        "There is one data set, one split and one size of model. Seeds vary only the initial weights, the order of batches and the dropout masks. The intervals say nothing about other problems.",
        "X and y are standardised over all rows, including the validation rows, as in the article.",
        f"The article's decay of {settings.ema_beta} is a limit that its warm-up does not reach in these runs: 1 − (1 + n)^(−2/3) is .9965 after 4 800 steps. The arm ema_0.999 shows a constant decay of .999.",
        "Seeds that stop early are missing from late epochs: curves and the epoch table include only seeds that are still running.",
        "Each verdict has its own 95 % interval. With some twenty deciding parts, expect about one wrong decision.",
    )
