"""Every measure of a rule at once."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

from polyak._checks import require_count
from polyak._shown import Charted, Table
from polyak.rules import Rule
from polyak.specs import as_rule
from polyak.theory._long import Horizon, copies, horizon, last_step, mean_age_at, profile_at
from polyak.theory._measures import cutoff, half_life, noise_gain, relative_std
from polyak.theory._profiles import checked_steps

_ROWS = (
    ("half_life", "half-life", "steps"),
    ("mean_age", "mean age", "steps"),
    ("effective_window", "effective window", "steps"),
    ("noise_gain", "noise gain", "of the variance of white noise"),
    ("relative_std", "relative std", "of the steps so far"),
    ("initial_weight", "weight of the first update", "of 1"),
    ("cutoff", "-3 dB cutoff", "rad/step"),
    ("ramp_lag", "lag on a ramp", "steps"),
)
_GROWING = 10_000


class Row(NamedTuple):
    """A measure, its value to six digits or "none", its unit, and its share of the run or nothing."""

    name: str
    value: str
    unit: str
    share: str


@dataclass(frozen=True)
class Explanation(Charted):
    """The measures of a rule's profile after `steps` steps, updated every `every`.

    `cutoff` is None where the gain never falls to -3 dB, `relative_std` where there is no spread.
    `unit` is the number of steps that one coefficient of the profile covers, more than 1 for a
    long average. `growing` says that no number of steps was found after which they stay the same,
    `of_run` that `steps` is the length of a run.

    >>> print(explain("window(100)", 1000))
    window(100) after 1000 steps, updated every step
    measure                     unit (% of the run)                     value
    half-life                   steps                                50 (5 %)
    mean age                    steps                           49.5 (4.95 %)
    effective window            steps                              100 (10 %)
    noise gain                  of the variance of white noise           0.01
    relative std                of the steps so far                 0.0288661
    weight of the first update  of 1                                        0
    -3 dB cutoff                rad/step                            0.0278323
    lag on a ramp               steps                           49.5 (4.95 %)
    """

    rule: Rule
    steps: int
    every: int
    half_life: float
    mean_age: float
    effective_window: float
    noise_gain: float
    relative_std: float | None
    initial_weight: float
    cutoff: float | None
    ramp_lag: float
    unit: int
    growing: bool
    of_run: bool

    def rows(self) -> list[Row]:
        """All measures, for a table."""
        values = [(getattr(self, field), name, unit) for field, name, unit in _ROWS]
        return [
            Row(name, "none" if value is None else f"{value:.6g}", unit, self._share(unit, value))
            for value, name, unit in values
        ]

    def _share(self, unit: str, value: float | None) -> str:
        in_steps = unit == "steps" and self.of_run and value is not None
        return f"{100 * value / self.steps:.3g} %" if in_steps else ""  # type: ignore[operator]

    def as_dict(self) -> dict[str, str | int | float | None]:
        """Everything by name, the rule as its spec: ready for JSON."""
        return {
            field.name: str(self.rule) if field.name == "rule" else getattr(self, field.name)
            for field in fields(self)
        }

    def title(self) -> str:
        """The rule, the steps and the cadence in one line."""
        cadence = "step" if self.every == 1 else f"{self.every} steps"
        grows = "; more steps change it" if self.growing else ""
        return f"{self.rule} after {self.steps} steps, updated every {cadence}{grows}"

    def heading(self) -> list[str]:
        """The title, as the line above the table."""
        return [self.title()]

    def tables(self) -> list[Table]:
        """All measures: with their unit and, for the length of a run, their share of it."""
        unit = "unit (% of the run)" if self.of_run else "unit"
        cells = [
            (r.name, r.unit, f"{r.value} {r.share and f'({r.share})'}".strip()) for r in self.rows()
        ]
        return [Table(("measure", unit, "value"), cells, left=2)]


def explain(rule: Rule | str, steps: int | None = None, *, every: int = 1) -> Explanation:
    """Compute every measure of a rule's profile after `steps` steps, updated every `every` steps.

    Without `steps`: enough of them for the start to be forgotten (20 mean ages or more), or 10 000 for
    a rule whose window grows with the run (then `growing` is True). A long average is measured
    on a profile in stretches of steps, to a relative error of 1e-7. Where the start is not forgotten in
    2^18 steps, this takes some seconds.

    >>> round(explain("exponential(0.99)").half_life, 2)
    68.97
    >>> round(explain("exponential(half_life=1e12)").half_life)
    1000000000000

    Raises `ValueError` unless `every` and `steps` are integers from 1 to 10^8, and for a spec that does
    not parse.
    """
    rule = as_rule(rule)
    if steps is None:
        every = checked_steps(require_count("every", every), every)[1]
        found = horizon(rule, every=every)
        where = found or Horizon(last_step(-(-_GROWING // every), every))
    else:
        found = where = Horizon(checked_steps(steps, every)[0])
        every = require_count("every", every)
    c, first = profile_at(rule, where, every)
    age = mean_age_at(c, where.unit, every)
    # The updates of a stretch share its coefficient, so that noise averages out further.
    gain = noise_gain(c) * (every / where.unit if where.unit > 1 else 1)
    cut, spread = cutoff(c), relative_std(c)
    return Explanation(
        rule=rule,
        steps=where.steps,
        every=every,
        half_life=half_life(c) * where.unit,
        mean_age=age,
        effective_window=1 / gain,
        noise_gain=gain,
        relative_std=None if spread is None else spread * (len(c) * where.unit / where.steps),
        initial_weight=first,
        cutoff=None if cut is None else cut / where.unit,
        ramp_lag=age,
        unit=where.unit,
        growing=found is None and not (age == 0 and copies(rule, every=every)),
        of_run=steps is not None,
    )
