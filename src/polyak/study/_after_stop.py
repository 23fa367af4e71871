"""The figure of runs that continued after an early stop, to see what the stop avoided."""

from __future__ import annotations

import numpy as np

from polyak.study import _figures as charts
from polyak.study._curves import lines, spreads
from polyak.study._effects import Effects
from polyak.study._page import Figure

MOST_BEFORE = 20  # evaluations before the stop that the chart shows


def after_stop(effects: Effects) -> tuple[Figure, ...]:
    """The validation values around an early stop, of the runs that went on after it."""
    rows = [row for arm in effects.study.arm_names for row in _around_stop(effects, arm)]
    if not rows:
        return ()
    caption = (
        "Validation around the early stop, divided by the same arm's value at the stop. Line: median over the runs that went "
        "on after their stop; band: the middle 80 %. No other section uses what came after."
    )
    title = f"{effects.metric}, validation / at the stop"
    return (lines("after_stop", rows, title, caption, "evaluations from the stop"),)


def _around_stop(effects: Effects, arm: str) -> charts.Rows:
    """Quantiles over the runs of an arm's curve before and after the stop, as far as all have it."""
    runs = [
        (r["curves"][arm][effects.metric], after["curves"][arm][effects.metric])
        for r in effects.result.records
        if arm in (after := r["after_stop"]).get("curves", {})
    ]
    known = [(b, a) for b, a in runs if all(v is not None for v in (*b, *a)) and b[-1]]
    if not known:
        return []
    before = min(MOST_BEFORE, min(len(b) for b, _ in known))
    after = min(len(a) for _, a in known)
    matrix = np.array([[v / b[-1] for v in (*b[-before:], *a[:after])] for b, a in known])
    return spreads(1 - before, arm, matrix.T)
