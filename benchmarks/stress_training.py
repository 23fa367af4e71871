"""What training does in the stress command: to the model, and to its twin alike."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from random import Random
from typing import Any

import torch
from torch import nn

from polyak._engine.watch import LEAST_LOOKS
from stress_averagers import Subject
from stress_models import Entry, Source, entries
from stress_mutations import (
    BY_DATA,
    CHANGES,
    COPYING,
    TRAINING,
    Change,
    floats,
    lazy_views,
    noise,
    swap_tensors,
)
from stress_optimizers import OPTIMIZERS, trainable
from stress_rules import Fault
from stress_updates import due_facts, note_update
from stress_world import World

KINDS = ("parameter", "tensor", "buffer")


def train(world: World, random: Random) -> None:
    """A change of content, in place."""
    if not world.trains:
        return
    change, seed = random.choice(TRAINING), random.random()
    world.tell(f"train: {change.__name__}", "inside" if world.blocks else "")
    for source in world.both():
        write = partial(change, source, Random(seed))
        world.writing(write, noticed=change.__name__ != "wander_unseen")


def forward(world: World, random: Random) -> None:
    """A forward pass, which moves running statistics in train mode; inside blocks too."""
    shaped = not world.undo and not world.misshapen
    fits = world.kind.inputs is not None and shaped and world.trains
    if not fits or not isinstance(world.model, nn.Module):
        return
    tensors = (*world.model.parameters(), *world.model.buffers())
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    if len(dtypes) != 1:
        return
    torch.manual_seed(random.randrange(2**31))
    assert world.kind.inputs is not None
    inputs = world.kind.inputs()
    inputs = inputs.to(dtypes.pop()) if inputs.is_floating_point() else inputs
    world.tell("forward, training" if world.model.training else "forward")
    for source in world.both():
        assert isinstance(source, nn.Module)
        world.writing(partial(source, inputs))


def mode(world: World, random: Random) -> None:
    """`train()` or `eval()`."""
    training = random.random() < 0.5
    for source in (world.model, world.twin):
        if isinstance(source, nn.Module):
            source.train(training)


def optimizer_of(world: World, name: str) -> tuple[Any, Any] | None:
    """The optimizers of the model and of its twin, made at their first use."""
    if name not in world.optimizers:
        pair = []
        for source in (world.model, world.twin):
            tensors = trainable([entry.tensor for entry in floats(source)], name)
            if not tensors:
                return None
            pair.append(OPTIMIZERS[name](tensors))
        world.optimizers[name] = (pair[0], pair[1])
    return world.optimizers[name]


def step(world: World, random: Random) -> None:
    """An optimizer's step; where an averager is attached to it, one update follows."""
    if not world.trains:
        return
    attached = [s.optimizer for s in world.subjects if s.optimizer is not None]
    name = random.choice(attached if attached and random.random() < 0.6 else list(OPTIMIZERS))
    pair = optimizer_of(world, name)
    if pair is None:
        return
    world.tell(f"step of {name}", "inside" if world.blocks else "")
    seed = random.randrange(2**31)
    for source, optimizer in zip(world.both(), pair, strict=False):
        drawn = torch.Generator().manual_seed(seed)
        for entry in floats(source):
            entry.tensor.grad = noise(entry.tensor, drawn)
        if source is world.twin:
            optimizer.step()
    subject = next((s for s in world.subjects if s.optimizer == name), None)
    if world.blocks:
        _step_inside(world, pair[0], subject)
    else:
        _step_outside(world, pair[0], subject)


def _step_inside(world: World, optimizer: Any, subject: Subject | None) -> None:
    """A step inside a block: it raises, or leaving does, or the average is marked.

    A step of weights that no block has is one as outside.
    """
    world.stepped_inside = True
    try:
        world.writing(optimizer.step)
    except RuntimeError:
        world.untold = ""
    except Exception as error:
        _refused_update(world, subject, error)
    else:
        if subject is not None:
            note_update(world, subject, 1.0)


def _refused_update(world: World, subject: Subject | None, error: Exception) -> None:
    # The weights that count are those after the step, which may have made them infinite.
    if subject is None or not due_facts(world, subject) & UPDATE_REFUSALS:
        raise Fault("refused step", f"{type(error).__name__}: {error}") from error
    if isinstance(error, FloatingPointError):
        subject.history = subject.history.left_out(1.0)


def _step_outside(world: World, optimizer: Any, subject: Subject | None) -> None:
    try:
        world.writing(optimizer.step)
    except Exception as error:
        _refused_update(world, subject, error)
        return
    if subject is not None:
        facts = due_facts(world, subject)
        if must := facts & {"changed", "wrong rule", "not finite"}:
            raise Fault("accepted step", f"with an averager attached although: {sorted(must)}")
        note_update(world, subject, 1.0)


UPDATE_REFUSALS = {
    "changed", "changed elsewhere", "aliased", "overlap", "expanded", "wrong rule", "not finite",
    "wrong rule later", "lazy view",
}  # fmt: skip


def change(world: World, random: Random) -> None:
    """Tensors are replaced, moved, flattened, or get another dtype."""
    what, seed = random.choice(CHANGES), random.random()
    if not world.trains or (not world.kind.copies and (what in COPYING or world.blocks)):
        return
    if world.blocks and what is lazy_views:
        return  # the memory stays where it was, so a block cannot see it
    world.graphs.clear()
    world.tell(f"change: {what.__name__}", "inside" if world.blocks else "")
    if not world.blocks:
        world.drop_optimizers()
        with _unless_torch_refuses(what):
            for source in (world.model, world.twin):
                what(source, Random(seed))
        return
    world.restructured = True
    with _unless_torch_refuses(what):
        told = what not in BY_DATA
        world.writing(lambda: what(world.model, Random(seed)), told=told)
    world.clean = False
    for block in world.blocks:
        world.suspects.add(block.subject.number)
        block.subject.causes.add(block.name)


def _unless_torch_refuses(what: Change) -> AbstractContextManager[None]:
    """A graph keeps torch from swapping tensors; it says so before it has changed anything."""
    return suppress(RuntimeError) if what is swap_tensors else nullcontext()


def tie(world: World, random: Random) -> None:
    """Two tensors of one shape become one, as one object or by storage, until `mend`."""
    pairs = _alike(world)
    if not pairs or world.blocks:
        return
    first, second = random.choice(pairs)
    how = random.choice(["object", "parameter", "data"])
    world.graphs.clear()
    world.tell(f"tie {first} and {second} by {how}")
    world.drop_optimizers()
    for source in (world.model, world.twin):
        one, other = _entry(source, first), _entry(source, second)
        before = other.tensor.data
        if how == "data":
            other.tensor.data = one.tensor.data
            world.undo.append(partial(_set_data, source, second, before))
        else:
            held = other.tensor
            new = (
                one.tensor
                if how == "object"
                else nn.Parameter(one.tensor, one.tensor.requires_grad)
            )
            _set(source, second, new)
            world.undo.append(partial(_set, source, second, held))


def _entry(source: Source, name: str) -> Entry:
    """Where a name is now: modules and tensors may have been replaced since."""
    return next(entry for entry in entries(source) if entry.name == name)


def _set(source: Source, name: str, tensor: torch.Tensor) -> None:
    entry = _entry(source, name)
    if entry.owner is None:
        entry.holder[entry.leaf] = tensor
    else:
        setattr(entry.owner, entry.leaf, tensor)


def _set_data(source: Source, name: str, data: torch.Tensor) -> None:
    _entry(source, name).tensor.data = data


def _alike(world: World) -> list[tuple[str, str]]:
    """Pairs of different parameters that could be tied."""
    found = [e for e in floats(world.model) if e.tensor.numel() and e.tensor.is_leaf]
    return [
        (a.name, b.name)
        for i, a in enumerate(found)
        for b in found[i + 1 :]
        if a.tensor.shape == b.tensor.shape
        and a.tensor.dtype == b.tensor.dtype
        and a.tensor is not b.tensor
    ]


def resize(world: World, random: Random) -> None:
    """`.data` of another shape, which may broadcast, until `mend`."""
    if world.blocks or len(floats(world.model, KINDS)) > LEAST_LOOKS:
        return  # an update looks at tiny tensors in turn, and marks the average once it has seen it
    name = random.choice([entry.name for entry in entries(world.model)])
    how, drawn = random.choice(["one", "row", "more", "fewer", "flat"]), random.randrange(2**31)
    world.tell(f"resize {name}: {how}")
    world.graphs.clear()  # torch keeps what leaves were like in the graphs that are alive
    world.drop_optimizers()
    for source in (world.model, world.twin):
        tensor = _entry(source, name).tensor
        before, shape = tensor.data, list(tensor.shape)
        shapes = {
            "one": [1] * len(shape),
            "row": [1, *shape[1:]],
            "more": [*shape, 2],
            "fewer": shape[1:],
            "flat": [tensor.numel()],
        }
        new = torch.zeros(shapes[how], dtype=tensor.dtype)
        if new.is_floating_point():
            new += noise(new, torch.Generator().manual_seed(drawn))
        tensor.data = new
        world.misshapen = True
        world.undo.append(partial(_set_data, source, name, before))


def mend(world: World, random: Random) -> None:
    """What `tie` and `resize` have done is undone, the newest first."""
    del random
    if world.undo and not world.blocks:
        world.tell("mend")
        world.graphs.clear()
        world.drop_optimizers()
        for undo in reversed(world.undo):
            undo()
        world.undo.clear()
        world.misshapen = False


def poison(world: World, random: Random) -> None:
    """A weight becomes NaN or infinite; the next time, all that is NaN gets well."""
    if world.blocks:
        return
    for source in (world.model, world.twin):
        for entry in floats(source):
            entry.tensor.data.nan_to_num_(0.5, float("inf"), -float("inf"))
    if random.random() < 0.5:
        name = random.choice([entry.name for entry in floats(world.model)])
        for source in (world.model, world.twin):
            tensor = next(entry.tensor for entry in floats(source) if entry.name == name)
            if tensor.numel():
                first = tensor.data[(0,) * tensor.dim()]
                first.fill_(complex("nan+nanj") if tensor.is_complex() else float("nan"))
    world.epoch += 1
