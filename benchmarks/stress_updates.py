"""Updates in the stress command, and the history that they write."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np

from stress_averagers import Subject
from stress_rules import number
from stress_world import Refused, World


def pick(world: World, random: Random) -> tuple[Subject, str]:
    """One of the averagers and one of its averages."""
    subject = random.choice(world.subjects)
    return subject, random.choice(list(subject.cases))


def given(subject: Subject, name: str) -> tuple[str, ...]:
    """The name as an argument; a lone average has none."""
    return () if list(subject.cases) == ["average"] else (name,)


def due_facts(world: World, subject: Subject) -> set[str]:
    """The situations that say whether the next call of `update` is refused."""
    facts = world.facts(subject)
    if not subject.due:  # it only counts
        return {"changed elsewhere" if fact == "changed" else fact for fact in facts}
    n = len(subject.history.times) + 1
    option = subject.options["nonfinite"]
    guarded = option != "allow" and "changed" not in facts
    finite = not guarded or bool(np.isfinite(subject.weights(world.model)).all())
    if not finite and option == "skip":
        return facts  # the rule is not asked
    if any(case.wrong and n >= case.wrong for case in subject.cases.values()):
        facts.add("wrong rule")
    if not finite:
        facts.add("not finite")
    return facts


def note_update(world: World, subject: Subject, elapsed: float) -> None:
    """Writes into the history what an update that was not refused did."""
    history = subject.history
    if "changed" in world.structure(subject):
        subject.history = replace(
            history, calls=history.calls + 1, elapsed=history.elapsed + elapsed
        )
        return
    weights = subject.weights(world.model)
    if subject.due and subject.options["nonfinite"] != "allow" and not np.isfinite(weights).all():
        subject.history = history.left_out(elapsed)
        return
    copies, epsilon = subject.copies(world.model), subject.epsilon(world.model)
    subject.history = history.called(elapsed, subject.every, weights, copies, epsilon)


def update(world: World, random: Random) -> None:
    """One call of `update`."""
    subject = random.choice(world.subjects)
    if subject.attachment is not None and random.random() < 0.5:
        return
    elapsed = random.choice([None, None, 1.0, 2.0, 0.5, 4.0])
    time = 1.0 if elapsed is None else elapsed
    argument = () if elapsed is None else (number(random, elapsed),)
    world.tell(f"averager {subject.number}: update{argument}")
    done = world.ask(
        "update", due_facts(world, subject), lambda: subject.averager.update(*argument)
    )
    if not isinstance(done, Refused):
        note_update(world, subject, time)
    elif isinstance(done.error, FloatingPointError):
        subject.history = subject.history.left_out(time)
