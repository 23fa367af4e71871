"""Averages that are read, saved and loaded in the stress command."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch

import polyak
from stress_averagers import History, Subject, frozen_names, joined, policies
from stress_models import Source, bits, contents, entries, faithful_copy, first_names
from stress_optimizers import OPTIMIZERS
from stress_rules import Fault
from stress_training import optimizer_of
from stress_updates import given, pick
from stress_world import Refused, World, shared


def average(world: World, random: Random) -> None:
    """Reads an average; it has every name, and is profile @ trajectory."""
    subject, name = pick(world, random)
    read_average(world, subject, name, lazily=random.random() < 0.3)


def _one_by_one(subject: Subject, name: str) -> dict[str, torch.Tensor]:
    """The average as it is read where two copies would be too much."""
    held = subject.averager.weights(*given(subject, name))
    return {each: held[each] for each in held}


def read_average(world: World, subject: Subject, name: str, *, lazily: bool = False) -> None:
    world.tell(f"averager {subject.number}: average {name}")
    call: Any = partial(subject.averager.average, *given(subject, name))
    if lazily:
        call = partial(_one_by_one, subject, name)
    held = world.ask("average", world.facts(subject, name), call)
    if isinstance(held, Refused) or name in subject.tainted:
        return
    if held.keys() != subject.readable():
        raise Fault("names", f"average() has {sorted(held)}, wanted {sorted(subject.readable())}")
    for alias, first in subject.firsts.items():
        if alias in subject.carried() and bits(held[alias]) != bits(held[first]):
            raise Fault("names", f"{alias} and {first} are tied and differ")
    if subject.cases[name].wrong:
        return
    live = subject.weights(world.model)
    subject.check(name, live, joined([held[n] for n in subject.averaged]))
    subject.check_copies(held)


def summary(world: World, random: Random) -> None:
    """Asks for the summary: every tensor's policy, and the count."""
    subject = random.choice(world.subjects)
    held = world.ask("summary", world.facts(subject), subject.averager.summary)
    if isinstance(held, Refused):
        return
    str(held)
    wanted = policies(entries(world.model), subject.options, subject.frozen)
    if {row.name: row.policy for row in held.rows} != wanted:
        raise Fault("summary", f"{ {row.name: row.policy for row in held.rows} }, wanted {wanted}")
    if held.count != len(subject.history.times):
        raise Fault("summary", f"{held.count} updates, wanted {len(subject.history.times)}")


def copy_to(world: World, random: Random) -> None:
    """Writes the average for good, into the live model or into another one."""
    subject, name = pick(world, random)
    facts = world.facts(subject, name)

    def refuses(target: Source) -> bool:
        call = partial(subject.averager.copy_to, target, *given(subject, name))
        return isinstance(world.ask("copy_to", facts, call), Refused)

    if world.blocks or random.random() < 0.5:
        if not world.kind.copies:
            return
        other, before = faithful_copy(world.model), contents(world.model)
        if not refuses(other) and not subject.cases[name].wrong:
            _check_copied(world, subject, name, other, before)
        return
    before = contents(world.model)
    if refuses(world.model):
        return
    world.epoch += 1
    if not subject.cases[name].wrong:
        _check_copied(world, subject, name, world.model, before)
    _take_over(world)


def _check_copied(world: World, subject: Subject, name: str, target: Any, before: Any) -> None:
    """What was written is the average, rounded; what is not averaged stays."""
    if name in subject.tainted or "live" in subject.cases[name].rule.readout(subject.tick(name)):
        return
    written = {entry.name: entry.tensor for entry in entries(target)}
    wanted, scale, _ = subject.expected(name, subject.weights(world.twin))
    seen = joined([written[n] for n in subject.averaged])
    both = [*(written[n] for n in subject.averaged), *next(iter(subject.slots(name).values()))]
    now = max(torch.finfo(tensor.dtype).eps for tensor in both)
    epsilon = np.maximum(subject.history.epsilon, now)
    off = (3 * len(subject.history.times) + 8) * epsilon * scale + 1e-6
    with np.errstate(invalid="ignore"):
        right = (np.abs(seen - wanted) <= off) | ~np.isfinite(wanted)
    if not right.all():
        raise Fault("copy_to", "the model has not got the average")
    left = written.keys() - subject.carried()
    if wrong := [n for n in left if bits(written[n]) != before[n]]:
        raise Fault("copy_to", f"{wrong} is not averaged and has changed")


@torch.no_grad()
def _take_over(world: World) -> None:
    """The twin gets what the model has by now."""
    live = {entry.name: entry.tensor for entry in entries(world.model)}
    for entry in entries(world.twin):
        entry.tensor.data.copy_(live[entry.name])


class Save(NamedTuple):
    """A state somewhere, and the history that belongs to it."""

    subject: Subject
    load: Callable[[], Any]
    history: History
    forms: Any
    file: bool


def forms_now(world: World, subject: Subject) -> Any:
    """What a state's tensors must agree with."""
    found = {entry.name: entry.tensor for entry in entries(world.model)}
    slots = {name: subject.slot_dtypes(name, world.model) for name in subject.cases}
    copied = [found[name].dtype for name in subject.copied]
    return slots, copied, subject.form, subject.storage_form


def save(world: World, random: Random) -> None:
    """Saves a state: in memory, by `torch.save`, or by `polyak.save`."""
    subject = random.choice(world.subjects)
    how = random.choice(["memory", "torch", "polyak"])
    path = world.folder / f"{len(world.saves)}.{how}"
    world.tell(f"averager {subject.number}: save, {how}")
    facts, averager = world.facts(subject), subject.averager
    own = any(case.own for case in subject.cases.values())
    if how == "polyak":
        facts |= {"own rule in a file"} if own else set()
        load: Callable[[], Any] = partial(_load_file, subject, path)
        if isinstance(world.ask("state", facts, lambda: polyak.save(path, averager)), Refused):
            return
    else:
        state = world.ask("state", facts, averager.state_dict)
        if isinstance(state, Refused):
            return
        load = partial(_load_state, subject, copy.deepcopy(state), path if how == "torch" else None)
        if how == "torch":
            torch.save(state, path)
    file = how == "polyak" and own
    world.saves.append(Save(subject, load, subject.history, forms_now(world, subject), file))


def _load_file(subject: Subject, path: Path) -> None:
    """Goes on from a file; `renew` may have made another averager."""
    polyak.load(path, subject.averager)


def _load_state(subject: Subject, state: dict[str, Any], path: Path | None) -> None:
    """Takes over a state, read from its file if it is in one."""
    read = copy.deepcopy(state) if path is None else torch.load(path, weights_only=True)
    subject.averager.load_state_dict(read)


def load(world: World, random: Random) -> None:
    """Goes on from a state that was saved."""
    if not world.saves:
        return
    saved: Save = random.choice(world.saves)
    world.tell(
        f"averager {saved.subject.number}: load what was saved after {len(saved.history.times)} updates"
    )
    facts = world.facts(saved.subject)
    facts |= {"own rule in a file"} if saved.file else set()
    if saved.forms != forms_now(world, saved.subject):
        facts.add("other forms")
    if not isinstance(world.ask("load", facts, saved.load), Refused):
        saved.subject.history = saved.history
        saved.subject.causes, saved.subject.tainted = set(), set()


def renew(world: World, random: Random) -> None:
    """Makes an averager anew, as a resumed script does, and loads a state or begins again."""
    subject = random.choice(world.subjects)
    found = entries(world.model)
    if world.blocks or world.undo or list(shared(found)):
        return
    if (
        "average"
        not in policies(found, subject.options, frozen_names(found, subject.options)).values()
    ):
        return  # a selected parameter is a buffer by now
    world.tell(f"averager {subject.number}: made anew")
    subject.renew(world.model)
    load(world, random)


def attach(world: World, random: Random) -> None:
    """Attaches an averager to an optimizer, or takes it off again."""
    subject = random.choice(world.subjects)
    name = random.choice(list(OPTIMIZERS))
    if subject.attachment is not None and random.random() < 0.5:
        subject.attachment.remove()
        subject.attachment = subject.optimizer = None
        return
    taken = any(s.optimizer == name for s in world.subjects)
    pair = None if taken else optimizer_of(world, name)
    if pair is None:
        return
    facts = world.facts(subject)
    if subject.attachment is not None:
        facts.add("attached")
    own = {id(e.tensor) for e in entries(world.model) if e.name in subject.averaged}
    if own.isdisjoint(id(p) for group in pair[0].param_groups for p in group["params"]):
        facts.add("none of its weights")  # torch's fused optimizers take few dtypes
    world.tell(f"averager {subject.number}: attach to {name}")
    done = world.ask("attach", facts, lambda: subject.averager.attach(pair[0]))
    if not isinstance(done, Refused):
        subject.attachment, subject.optimizer = done, name


def copy_the_averager(world: World, random: Random) -> None:
    """A deep copy averages a copy of the model, and goes on where the averager is."""
    del random
    subject = world.subjects[-1]
    if not world.kind.copies:
        return
    facts, found = world.facts(subject), entries(world.model)
    if first_names(found) != first_names(found, by_storage=False):
        facts.add("aliased")  # torch's deepcopy makes two memories of one that two parameters share
    if any(block.subject is not subject for block in world.blocks):
        facts.add(
            "other block"
        )  # the model is copied too, with tensors that the averager leaves out
    copied = world.ask("copy the averager", facts, partial(copy.deepcopy, subject.averager))
    if isinstance(copied, Refused):
        return
    other = replace(subject, averager=copied, attachment=None)
    for each in ("averaged", "copied", "statistics"):
        setattr(other, each, getattr(subject, each))
    if other.fingerprint() != subject.fingerprint():
        raise Fault("copy", f"the copy of averager {subject.number} has another state")
