"""What a program of the stress command is made of: a table of operations on its world.

A new operation is one line of `OPERATIONS`. Each draws from its own random numbers, so that a program
without some of its operations still does the same in the others.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import NamedTuple

from stress_article import article
from stress_blocks import backward, enter, graphs_around, leave, record
from stress_reading import attach, average, copy_the_averager, copy_to, load, renew, save, summary
from stress_signals import interrupted
from stress_threads import race, tasks
from stress_training import change, forward, mend, mode, poison, resize, step, tie, train
from stress_updates import update
from stress_world import World


class Operation(NamedTuple):
    """An operation and how often it is drawn."""

    run: Callable[[World, Random], None]
    weight: float


OPERATIONS: dict[str, Operation] = {
    "train": Operation(train, 6),
    "step": Operation(step, 5),
    "forward": Operation(forward, 2),
    "mode": Operation(mode, 0.5),
    "update": Operation(update, 14),
    "enter": Operation(enter, 7),
    "leave": Operation(leave, 6),
    "average": Operation(average, 2),
    "summary": Operation(summary, 0.5),
    "copy_to": Operation(copy_to, 0.7),
    "save": Operation(save, 1.5),
    "load": Operation(load, 1.5),
    "renew": Operation(renew, 0.7),
    "attach": Operation(attach, 1),
    "change": Operation(change, 2.5),
    "tie": Operation(tie, 0.4),
    "resize": Operation(resize, 0.4),
    "mend": Operation(mend, 1),
    "poison": Operation(poison, 0.5),
    "record": Operation(record, 1.5),
    "backward": Operation(backward, 2),
    "graphs around": Operation(graphs_around, 1),
    "interrupted": Operation(interrupted, 5),
    "race": Operation(race, 0.4),
    "tasks": Operation(tasks, 0.3),
    "article": Operation(article, 4),
    "copy the averager": Operation(copy_the_averager, 0.5),
}
