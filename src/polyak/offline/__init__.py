"""Offline: averages of a run that is over, from its checkpoints or its recorded snapshots.

offline.average(files, "exponential(0.9)")        the average of checkpoint files
offline.synthesize(folder, rule)                  any average from recorded snapshots, its error known
offline.sweep(folder, rules, evaluate)            which of them is best
offline.greedy_soup(files, evaluate)              the files that are better together
"""

from __future__ import annotations

from polyak.offline.averaging import average
from polyak.offline.combining import Combination
from polyak.offline.comparing import Comparison, compare
from polyak.offline.describing import Description, describe
from polyak.offline.soups import Soup, greedy_soup
from polyak.offline.sweeping import Point, Sweep, sweep
from polyak.offline.synthesis import Synthesis, Term, synthesize

__all__ = [
    "Combination",
    "Comparison",
    "Description",
    "Point",
    "Soup",
    "Sweep",
    "Synthesis",
    "Term",
    "average",
    "compare",
    "describe",
    "greedy_soup",
    "sweep",
    "synthesize",
]
