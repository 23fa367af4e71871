"""Threads and tasks for the stress command: their calls come between each other's."""

from __future__ import annotations

import asyncio
import sys
import threading
from contextlib import suppress
from random import Random

import numpy as np

from stress_averagers import Subject
from stress_models import contents
from stress_rules import Fault
from stress_updates import due_facts, given, note_update, pick
from stress_world import PATIENCE, World


def race(world: World, random: Random) -> None:
    """Two threads at once: one updates, the other enters and leaves blocks or reads."""
    subject, name = pick(world, random)
    if world.blocks or due_facts(world, subject) | world.facts(subject, name):
        return
    finite = bool(np.isfinite(subject.weights(world.model)).all())
    if subject.options["nonfinite"] == "error" and not finite:
        return  # of several calls a later one may be due
    world.tell(f"averager {subject.number}: race of updates with blocks of {name}")
    blocks, updates = random.randint(1, 4), random.randint(1, 6)
    done, failures = [0], []

    def beside() -> None:
        for _ in range(blocks):
            try:
                with subject.averager.applied(*given(subject, name)):
                    contents(world.model)
            except RuntimeError:
                continue
            except BaseException as error:
                failures.append(error)

    def updating() -> None:
        for _ in range(updates):
            with suppress(RuntimeError):
                subject.averager.update()
                done[0] += 1

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=beside, daemon=True)
    try:
        sys.setswitchinterval(1e-6)
        thread.start()
        updating()
        thread.join(PATIENCE)
    finally:
        sys.setswitchinterval(interval)
    if thread.is_alive():
        raise Fault("hang", "a thread beside updates did not come back")
    if failures:
        raise Fault("race", repr(failures[0]))
    if contents(world.model) != contents(world.twin):
        raise Fault("race", "live weights lost by a block beside updates")
    for _ in range(done[0]):
        note_update(world, subject, 1.0)


def tasks(world: World, random: Random) -> None:
    """Two coroutines enter and leave blocks, and take turns in the midst of them."""
    subjects = [pick(world, random), pick(world, random)]
    if world.blocks or any(world.facts(subject, name) for subject, name in subjects):
        return
    world.tell(f"tasks with blocks of averagers {[(s.number, name) for s, name in subjects]}")
    before = world.fingerprint()
    drawn = [Random(random.random()) for _ in subjects]

    async def together() -> None:
        await asyncio.gather(*map(_enter_and_leave, subjects, drawn))

    asyncio.run(together())
    if world.fingerprint() != before:
        lost = "live weights" if contents(world.model) != before[0] else "averages"
        raise Fault("tasks", f"{lost} lost by blocks of two coroutines")


async def _enter_and_leave(each: tuple[Subject, str], random: Random) -> None:
    subject, name = each
    for _ in range(random.randint(1, 3)):
        await _wait(random)
        with suppress(RuntimeError), subject.averager.applied(*given(subject, name)):
            await _wait(random)


async def _wait(random: Random) -> None:
    """Lets other tasks go on."""
    for _ in range(random.randint(0, 3)):
        await asyncio.sleep(0)
