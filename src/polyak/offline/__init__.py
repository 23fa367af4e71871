"""Offline: averages of a finished run, from its checkpoints or its snapshots.

offline.choose(run, last=10)                   choose checkpoints of a run, in the order of their steps
offline.average(files, "exponential(0.9)")     average checkpoint files
offline.concatenate(adapters)                  average LoRA adapters as one adapter
offline.verify(made, written)                  compare what was written with direct sums
offline.synthesize(folder, rule)               make any average from snapshots, with a known error
offline.sweep(folder, rules, evaluate)         make many averages, and find the best
offline.greedy_soup(files, evaluate)           choose the files whose mean is best
offline.describe(path)                         list what a checkpoint holds
offline.compare(a, b)                          compare two sets of weights
"""

from __future__ import annotations

from polyak._runs.choosing import Choice, RunFile, choose
from polyak.offline._adapters import Concatenation, concatenate
from polyak.offline._average import average
from polyak.offline._combination import Combination
from polyak.offline._comparison import Comparison, compare
from polyak.offline._description import Description, describe
from polyak.offline._soup import Soup, greedy_soup
from polyak.offline._sweep import Baseline, Point, Sweep, sweep
from polyak.offline._synthesis import Synthesis, Term, synthesize
from polyak.offline._verification import Forecast, forecast, verify

__all__ = [
    "Baseline", "Choice", "Combination", "Comparison", "Concatenation", "Description",
    "Forecast", "Point", "RunFile", "Soup", "Sweep", "Synthesis", "Term", "average", "choose",
    "compare", "concatenate", "describe", "forecast", "greedy_soup", "sweep", "synthesize",
    "verify",
]  # fmt: skip
