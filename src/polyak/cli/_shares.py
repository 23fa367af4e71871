"""Options that choose the coefficients of files, and what they choose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, TypeAlias

import typer

from polyak.cli._options import numbers_of

if TYPE_CHECKING:
    from polyak.theory._profiles import Profile

Shape = Literal["sqrt", "linear", "cosine"]
Coefficients: TypeAlias = "str | Sequence[float] | Profile"
"""A rule as text, or a coefficient for each file."""


class Shares(NamedTuple):
    """Options that choose the coefficients of the files: one of them, and those that go with it."""

    rule: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="Rule of the average; each file counts as one update.",
            show_default="uniform()",
        ),
    ] = None
    coefficients: Annotated[
        str | None,
        typer.Option(metavar="C,C,...", help="A coefficient for each file; their sum is 1."),
    ] = None
    wsm: Annotated[
        Shape | None, typer.Option(help="Imitate this learning-rate decay (arXiv 2507.17634).")
    ] = None
    qam: Annotated[Shape | None, typer.Option(help="The same, exact on a quadratic loss.")] = None
    greedy: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Keep the files that improve your function (greedy soup).",
        ),
    ] = None
    elapsed: Annotated[
        str | None, typer.Option(metavar="T,T,...", help="Time between files, in the rule's unit.")
    ] = None

    @property
    def listed(self) -> bool:
        """Whether they are given for the files as they are listed."""
        return self.coefficients is not None or (self.elapsed is not None and "," in self.elapsed)

    def of(self, files: int) -> Coefficients:
        """The rule or the coefficients, from the one option that is given."""
        from polyak import theory

        given = self._replace(elapsed=None)._asdict().items()
        names = [f"--{name}" for name, value in given if value is not None]
        if len(names) > 1:
            raise ValueError(
                f"{' and '.join(names)} each choose the coefficients: give one of them"
            )
        if self.coefficients is not None:
            return numbers_of(self.coefficients, "--coefficients")
        if self.wsm is not None:
            return theory.wsm(theory.learning_rate_decay(self.wsm, files))
        if self.qam is not None:
            return theory.qam(theory.learning_rate_decay(self.qam, files))
        return "uniform()" if self.rule is None else self.rule

    def times(self, files: int) -> list[float] | None:
        """The time between a file and the one before it."""
        if self.elapsed is None:
            return None
        times = numbers_of(self.elapsed, "--elapsed")
        return times * files if len(times) == 1 else times
