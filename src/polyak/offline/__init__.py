"""Offline: averages of a run that is over, from its checkpoints or its recorded snapshots.

offline.average(files, "exponential(0.9)")        the average of checkpoint files
offline.synthesize(folder, rule)                  any average from recorded snapshots, its error known
offline.sweep(folder, rules, evaluate)            which of them is best
offline.greedy_soup(files, evaluate)              the files that are better together
"""

from __future__ import annotations

from polyak.offline._average import average
from polyak.offline._combination import Combination
from polyak.offline._comparison import Comparison, compare
from polyak.offline._description import Description, describe
from polyak.offline._selection import Point, Soup, Sweep, greedy_soup, sweep
from polyak.offline._synthesis import Synthesis, Term, synthesize

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
