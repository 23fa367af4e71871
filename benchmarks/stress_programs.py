"""Programs of the stress command: drawn by a seed, run in a world of their own, and made smaller."""

from __future__ import annotations

import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import torch

import stress_rules
from stress_article import make_article
from stress_averagers import SKIP, TRAINABLE, Subject, frozen_names, make, policies
from stress_blocks import close_block
from stress_models import KINDS, Kind, Source, build, entries
from stress_operations import OPERATIONS
from stress_reading import read_average
from stress_rules import Fault, RuleCase, count, draw
from stress_world import Refused, World, shared

LIMITS = ("CHUNK_BYTES", "SHARED_BYTES", "FEW")
"""Sizes in polyak's modules that are made small, so that small models come in several chunks."""

ROUNDINGS = ("nearest", "nearest", "nearest", "stochastic", "compensated")
DTYPES = (None, None, None, torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Program:
    """A program: all that it does follows from the seed; `only` are the numbers of the operations done."""

    seed: int
    only: tuple[int, ...] | None = None
    kinds: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    def operations(self) -> list[tuple[int, str, int]]:
        """(number, name, seed) of the operations, those of a random part of the table."""
        random = Random(f"operations {self.seed}")
        names = [n for n in OPERATIONS if n in ("update", "train") or random.random() < 0.6]
        weights = [OPERATIONS[name].weight for name in names]
        drawn = random.choices(names, weights, k=random.randint(5, 30))
        listed = [(i, name, random.randrange(2**31)) for i, name in enumerate(drawn)]
        kept = [each for each in listed if each[1] not in self.without]
        return [each for each in kept if self.only is None or each[0] in self.only]

    def kind(self, random: Random) -> Kind:
        kinds = [kind for kind in KINDS if not self.kinds or kind.name in self.kinds]
        return random.choices(kinds, [kind.weight for kind in kinds])[0]

    def __str__(self) -> str:
        done = ",".join(str(number) for number, _, _ in self.operations())
        kinds = "".join(f" --kind {kind!r}" for kind in self.kinds)
        plain = " --plain-numbers" if stress_rules.PLAIN else ""
        return (
            f"python benchmarks/stress.py --seed {self.seed} --ops {done or 'none'}{kinds}{plain}"
        )


@dataclass
class Outcome:
    """What a program came to: the operations done, and the fault, if there was one."""

    done: int
    fault: Fault | None = None
    after: str = ""
    model: str = ""
    story: tuple[str, ...] = ()

    @property
    def signature(self) -> tuple[str, str]:
        """What makes two faults one."""
        return (self.fault.law if self.fault else "", self.after)


def run(program: Program) -> Outcome:
    """Runs a program; every law is looked at after every operation."""
    random = Random(f"world {program.seed}")
    kind = program.kind(random)
    folder = Path(tempfile.mkdtemp(prefix="stress-"))
    world = World(kind, build(kind, program.seed), build(kind, program.seed), folder)
    outcome = Outcome(0, model=kind.name)
    before = limits()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _run(program, world, random, outcome)
    except Fault as fault:
        outcome.fault = fault
    except Exception as error:
        outcome.fault = Fault(f"a crash: {type(error).__name__}", str(error))
        outcome.fault.__cause__ = error
    finally:
        outcome.story = tuple(world.story)
        for module, name, value in before:
            setattr(module, name, value)
        world.close()
        shutil.rmtree(folder, ignore_errors=True)
    return outcome


def limits() -> list[tuple[ModuleType, str, int]]:
    """Every module of polyak that has one of the sizes, by name, and the size."""
    modules = [module for name, module in sys.modules.items() if name.startswith("polyak.")]
    return [(m, name, getattr(m, name)) for m in modules for name in LIMITS if hasattr(m, name)]


@dataclass
class Totals:
    """What many programs came to."""

    programs: int = 0
    refused: int = 0
    done: Counter[str] = field(default_factory=Counter)
    models: Counter[str] = field(default_factory=Counter)

    def add(self, program: Program, outcome: Outcome) -> None:
        self.programs += 1
        self.models[outcome.model] += 1
        self.refused += sum(line.startswith("  refused") for line in outcome.story)
        for _, name, _ in program.operations()[: outcome.done]:
            self.done[name] += 1

    def join(self, other: Totals) -> None:
        self.programs += other.programs
        self.refused += other.refused
        self.done += other.done
        self.models += other.models


def _run(program: Program, world: World, random: Random, outcome: Outcome) -> None:
    outcome.after = "make"
    size = random.choice([128, 256, 1024, 1 << 20])
    for module, name, _ in limits():
        setattr(module, name, 2 if name == "FEW" else size)
    if not make_averagers(world, random):
        return
    world.check()
    for number, name, seed in program.operations():
        del number
        outcome.after = name
        OPERATIONS[name].run(world, Random(seed))
        world.check()
        outcome.done += 1
    finish(world, random, outcome)


def finish(world: World, random: Random, outcome: Outcome) -> None:
    """Leaves all blocks, in any order, and reads all averages as a user does."""
    outcome.after = "the end"
    while world.blocks:
        close_block(world, random.choice(world.blocks))
        world.check()
    for subject in world.subjects:
        for name in subject.cases:
            read_average(world, subject, name)
    world.check()


def make_averagers(world: World, random: Random) -> bool:
    """One to three averagers of the model; False where none may be made of it."""
    for number in range(random.choice([1, 1, 2, 2, 3])):
        cases = draw_cases(random)
        options = draw_options(random, world.model, whole=number == 0)
        made = world.ask(
            "make", make_facts(world, options), partial(make, world.model, cases, options)
        )
        if isinstance(made, Refused) or world.kind.refused:
            return False
        described = ", ".join(f"{name}={case.rule}" for name, case in cases.items())
        world.tell(f"averager {number}: {described}, {options}")
        world.subjects.append(Subject(number, made, cases, options).bind(world.model))
    if random.random() < 0.3:
        world.article = make_article(world, random)
    return True


def draw_cases(random: Random) -> dict[str, RuleCase]:
    """One rule, or several by name."""
    while True:
        try:
            if random.random() < 0.7:
                return {"average": draw(random)}
            return {
                name: draw(random)
                for name in random.choice([("a", "b"), ("fast", "slow", "third")])
            }
        except ValueError as error:
            raise Fault("refused rule", str(error)) from error


def draw_options(random: Random, source: Source, *, whole: bool) -> dict[str, Any]:
    """The options of an averager."""
    names = [entry.name for entry in entries(source)]
    buffers: Any = random.choice(["auto", "auto", "average", "copy"])
    floats = [e.name for e in entries(source) if e.tensor.is_floating_point()]
    if random.random() < 0.15 and floats:
        buffers = {random.choice(floats): random.choice(["average", "copy", SKIP])}
    select: Any = random.choice([TRAINABLE, TRAINABLE, "*"])
    if not whole and random.random() < 0.5:
        some = random.sample(names, random.randint(1, len(names)))
        select = random.choice([some, some, lambda name: name in some])
    rounding = random.choice(ROUNDINGS)
    dtype = random.choice(DTYPES)
    if rounding == "stochastic" and random.random() < 0.8:
        dtype = random.choice([torch.bfloat16, torch.float16])
    return {
        "every": count(random, random.choice([1, 1, 1, 2, 3])),
        "dtype": dtype,
        "rounding": rounding,
        "buffers": buffers,
        "select": select,
        "nonfinite": random.choice(["allow", "allow", "skip", "error"]),
    }


def make_facts(world: World, options: dict[str, Any]) -> set[str]:
    """The reasons why an averager with these options must or may be refused."""
    found = entries(world.model)
    facts = set(shared(found))
    if world.kind.refused:
        whole = options["select"] in (TRAINABLE, "*") and isinstance(options["buffers"], str)
        facts.add("refused kind" if whole else "part of a refused kind")
        return {"part of a refused kind"} if not whole else facts
    decided = policies(found, options, frozen_names(found, options))
    averaged = [entry for entry in found if decided.get(entry.name) == "average"]
    if not averaged:
        facts.add("nothing")
    if options["rounding"] == "stochastic":
        narrow = (torch.bfloat16, torch.float16)
        if options["dtype"] not in narrow or any(e.tensor.is_complex() for e in averaged):
            facts.add("wide stochastic")
    return facts


def shrink(
    program: Program, outcome: Outcome, runs: Callable[[Program], Outcome] = run, tries: int = 2
) -> tuple[Program, Outcome]:
    """A program with as few operations as still show the same fault, each tried some times."""
    best, seen = program, outcome

    def fails(numbers: Sequence[int]) -> bool:
        nonlocal best, seen
        candidate = Program(program.seed, tuple(numbers), program.kinds, program.without)
        for _ in range(tries):
            result = runs(candidate)
            if result.fault is not None and result.fault.law == outcome.fault.law:  # type: ignore[union-attr]
                best, seen = candidate, result
                return True
        return False

    numbers = [number for number, _, _ in program.operations()]
    size = max(1, len(numbers) // 2)
    while numbers:
        for start in range(0, len(numbers), size):
            rest = numbers[:start] + numbers[start + size :]
            if fails(rest):
                numbers = rest
                break
        else:
            if size == 1:
                break
            size = max(1, size // 2)
    return best, seen
