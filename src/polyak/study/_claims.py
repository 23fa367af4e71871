"""Claims of a study about its seeds, and published figures that it compares with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from polyak._checks import require
from polyak.study._fields import require_function
from polyak.study._region import Region
from polyak.study._text import FORMS

if TYPE_CHECKING:
    from polyak.study._result import Seed


@dataclass(frozen=True)
class Claim:
    """A sentence, a quantity with one number per seed, and the region in which the sentence is true.

    Claims with one sentence are its parts: it holds if all of them hold. `what` names the quantity. `form`
    says how the report prints it: "share", "number", "ratio" or "steps"; of a log ratio "factor" prints
    the ratio, and "percent" the ratio less 1. By default a `difference` is a number, a `log_ratio` is in percent,
    and all else is a share. `statistic` is "mean" or "median" over the seeds; the mean of
    log ratios is the log of a geometric mean.
    """

    sentence: str
    quantity: Callable[[Seed], float]
    region: Region
    source: str = ""
    form: str = ""
    what: str = ""
    statistic: Literal["mean", "median"] = "mean"

    def __post_init__(self) -> None:
        require_function("the quantity of a claim", self.quantity)
        require(isinstance(self.region, Region), "region", self.region, "a Region")
        form = self.form or getattr(self.quantity, "form", "share")
        object.__setattr__(self, "form", form)
        require(self.form in FORMS, "form", self.form, ", ".join(FORMS))


@dataclass(frozen=True)
class Published:
    """A figure that somebody published about one run, to be compared with the quantity over seeds.

    The report has a table for each `source`; `form` is as in `Claim`.
    """

    what: str
    quantity: Callable[[Seed], float]
    figure: float
    source: str = ""
    form: str = "number"

    def __post_init__(self) -> None:
        require_function("the quantity of a published figure", self.quantity)
        require(self.form in FORMS, "form", self.form, ", ".join(FORMS))
