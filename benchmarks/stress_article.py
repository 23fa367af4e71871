"""The article's class `EMA` in the stress command: it shares the model with the averagers of a program."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import polyak
from polyak.rules import ArticleEMA
from stress_averagers import rounded, vector
from stress_models import Source, bits, contents, entries, first_names
from stress_rules import Fault, Vector, coefficients
from stress_world import Refused, World, shared


@dataclass(frozen=True)
class Calls:
    """What an `EMA` was given: its calls, the times of its averagings, and the weights at each."""

    calls: int = 0
    times: tuple[float, ...] = ()
    path: tuple[Vector, ...] = ()
    kept: Mapping[str, Mapping[str, Tensor]] = field(
        default_factory=lambda: {"copy": {}, "ignore": {}}
    )
    averaged_once: bool = False


@dataclass(eq=False)
class Article:
    """An `EMA` under test."""

    ema: polyak.EMA
    rule: ArticleEMA
    every: int
    names: dict[str, list[str]]
    form: Any
    calls: Calls = Calls()
    saved: list[tuple[Any, Calls]] = field(default_factory=list)

    def fingerprint(self) -> object:
        """All that a refused call must leave as it was."""
        return contents(self.ema), self.ema.get_current_decay()

    def facts(self, world: World) -> set[str]:
        """The situations that say whether the next call is refused."""
        (firsts, shapes), facts = _form(world.model), set()
        due = self.calls.calls % self.every == 0
        if (firsts, shapes) != self.form:
            names = {*self.names["average"], *self.names["copy"]}  # ignored ones are left alone
            changed = {n for n, first in self.form[0].items() if first in names}
            lost = any(shapes.get(name) != self.form[1][name] for name in changed)
            facts = {"changed" if due and lost else "changed elsewhere"}
        facts |= set(shared(entries(world.model))) & {"lazy view"}
        return facts | ({"other block"} if world.blocks else set())

    def is_saved(self, world: World) -> bool:
        """Whether a state dict has all that is averaged: torch leaves some buffers out."""
        averaged = [e for e in entries(world.model) if e.name in self.names["average"]]
        return all(entry.persistent for entry in averaged)

    def check(self) -> None:
        """The law of the averages, and of what is copied and ignored."""
        held = {entry.name: entry.tensor for entry in entries(self.ema.ema_model)}
        for what in ("copy", "ignore"):
            for name, tensor in self.calls.kept[what].items():
                if bits(tensor.to(held[name].dtype)) != bits(held[name]):
                    raise Fault("EMA", f"{name} ({what}) is not as it was when it was copied last")
        if not self.calls.times or not self.names["average"]:
            return
        like = [held[name] for name in self.names["average"]]
        seen = np.concatenate([vector(t) for t in like])
        sampled, _ = coefficients(self.rule, self.calls.times)
        used = np.stack(self.calls.path)[sampled != 0]
        with np.errstate(invalid="ignore", over="ignore"):
            wanted = sampled[sampled != 0] @ used
            scale = np.abs(used).max(axis=0)
        constant = (used == used[:1]).all(axis=0)
        wanted[constant] = used[0][constant]
        epsilon = np.concatenate([np.full(len(vector(t)), torch.finfo(t.dtype).eps) for t in like])
        with np.errstate(invalid="ignore"):
            off = (3 * len(self.calls.times) + 8) * epsilon * scale + 1e-13
            right = (np.abs(seen - wanted) <= off) | ~np.isfinite(wanted)
        exact = constant & (rounded(wanted, like) == wanted)
        right[exact] = (seen == wanted)[exact]
        if not right.all():
            at = int(np.flatnonzero(~right)[0])
            raise Fault("EMA", f"element {at}: {seen[at]:.9g}, wanted {wanted[at]:.9g}")


def make_article(world: World, random: Random) -> Article | None:
    """An `EMA` of the model; None where the model cannot be copied."""
    if not isinstance(world.model, nn.Module) or not world.kind.copies or world.kind.refused:
        return None
    found = entries(world.model)
    firsts = first_names(found)
    names: dict[str, list[str]] = {"average": [], "copy": [], "ignore": []}
    chosen: dict[str, set[str]] = {"copy": set(), "ignore": set()}
    for entry in found:
        if firsts[entry.name] != entry.name:
            continue
        kind = random.choices(["", "copy", "ignore"], [8, 1, 1])[0]
        floating = entry.tensor.is_floating_point() or entry.tensor.is_complex()
        if kind:
            chosen[kind].add(entry.name)
        names[kind or ("average" if floating else "copy")].append(entry.name)
    if not names["average"]:
        return None
    rule = ArticleEMA(0.875, random.choice([0, 2, 5]))
    every = random.choice([1, 1, 2, 3])
    ema = polyak.EMA(
        world.model,
        beta=rule.beta,
        update_after_step=rule.update_after_step,
        update_every=every,
        param_or_buffer_names_no_ema=chosen["copy"],
        ignore_names=chosen["ignore"],
        include_online_model=False,
    )
    start = Calls(kept={"copy": {}, "ignore": _clones(world.model, names["ignore"])})
    return Article(ema, rule, every, names, _form(world.model), start)


def _clones(source: Source, names: list[str]) -> dict[str, Tensor]:
    return {e.name: e.tensor.detach().clone() for e in entries(source) if e.name in names}


def _form(source: Source) -> Any:
    found = entries(source)
    return first_names(found), {entry.name: tuple(entry.tensor.shape) for entry in found}


def article(world: World, random: Random) -> None:
    """A call of the `EMA`: an update, a save, or a load."""
    held: Article | None = world.article
    if held is None:
        return
    what = random.choice(["update", "update", "update", "save", "load"])
    facts = held.facts(world)
    world.tell(f"EMA: {what}")
    if what == "update":
        if not isinstance(world.ask("EMA", facts, held.ema.update), Refused):
            held.calls = called(world, held)
    elif what == "save" and not facts and held.is_saved(world):
        held.saved.append((copy.deepcopy(held.ema.state_dict()), held.calls))
    elif what == "load" and held.saved and not facts:
        state, calls = random.choice(held.saved)
        held.ema.load_state_dict(copy.deepcopy(state))
        held.calls = calls


def called(world: World, held: Article) -> Calls:
    """The history after a call of `update`."""
    before, calls = held.calls, held.calls.calls + 1
    if (calls - 1) % held.every:
        return Calls(calls, before.times, before.path, before.kept, before.averaged_once)
    now = {entry.name: entry.tensor for entry in entries(world.model)}
    copying = calls <= held.rule.update_after_step + 1
    kept = {**before.kept, "copy": _clones(world.model, held.names["copy"])}
    if copying or not before.averaged_once:
        kept["ignore"] = _clones(world.model, held.names["ignore"])
    return Calls(
        calls,
        (*before.times, calls - sum(before.times)),
        (*before.path, np.concatenate([vector(now[name]) for name in held.names["average"]])),
        kept,
        before.averaged_once or not copying,
    )
