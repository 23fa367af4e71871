"""Blocks of `applied()` in the stress command, entered and left in any order, and graphs around them."""

from __future__ import annotations

from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch

from stress_averagers import Subject
from stress_models import bits
from stress_mutations import floats
from stress_rules import Fault
from stress_updates import given, pick
from stress_world import Block, Refused, World


def enter(world: World, random: Random) -> None:
    """Enters a block, of any averager, in one of two threads."""
    if len(world.blocks) < 4:
        subject, name = pick(world, random)
        world.thread = int(random.random() < 0.15)
        try:
            open_block(world, subject, name)
        finally:
            world.thread = 0


def open_block(world: World, subject: Subject, name: str) -> None:
    facts = world.facts(subject, name)
    repeated = any(block.name == name for block in world.open_blocks(subject))
    carries = np.zeros(0)
    if subject.history.times and not repeated and not facts & {"applied", "spoilt", "changed"}:
        carries = subject.read(name, subject.weights(world.model))
    elif repeated:
        carries = next(b.carries for b in world.open_blocks(subject) if b.name == name)
    manager = subject.averager.applied(*given(subject, name))
    world.tell(f"averager {subject.number}: enter {name} in thread {world.thread}")
    if not isinstance(
        world.ask("enter", facts - {"applied", "left out of order"}, manager.__enter__), Refused
    ):
        world.blocks.append(Block(subject, name, manager, world.thread, carries, repeated))


class MineError(Exception):
    """What a block's own code raises."""


def leave(world: World, random: Random) -> None:
    """Leaves a block, the innermost or another one, at its end or by an exception."""
    if not world.blocks:
        return
    last = random.random() < 0.6
    block = world.blocks[-1] if last else random.choice(world.blocks)
    error = random.choice([None, None, MineError("mine"), KeyboardInterrupt(), SystemExit(3)])
    close_block(world, block, error)


def close_block(world: World, block: Block, error: BaseException | None = None) -> None:
    if block is not world.blocks[-1]:
        world.ordered = False
    world.tell(
        f"averager {block.subject.number}: leave {block.name} in thread {block.thread}, {error!r}"
    )
    facts = {"written"} if block.subject.number in world.suspects else set()
    facts |= {"restructured"} if world.restructured else set()
    world.blocks.remove(block)
    world.thread = block.thread
    try:
        world.perform(lambda: _exit(block, error))
    except BaseException as raised:
        if raised.args == ("sent",):  # a signal that came when entering had ended, and waited
            return
        if not facts or not isinstance(raised, RuntimeError):
            raise Fault("refused leave", f"leaving a block raised {raised!r}") from raised
        world.untold = ""
        if error is not None:
            raise Fault(
                "leave", f"{raised!r} took the place of the block's own {error!r}"
            ) from raised
    finally:
        world.thread = 0
    if block.subject.spoilt(block.name) or getattr(error, "__notes__", None):
        world.untold = ""


def _exit(block: Block, error: BaseException | None) -> None:
    if error is None:
        block.manager.__exit__(None, None, None)
        return
    try:
        raise error
    except BaseException as raised:
        try:
            swallowed = block.manager.__exit__(type(raised), raised, raised.__traceback__)
        except BaseException as other:
            if other is not raised:
                raise
            swallowed = None
        if swallowed:
            raise Fault("leave", f"{error!r} was swallowed") from None
    finally:
        error.__traceback__ = None


class Graph(NamedTuple):
    """A loss that was recorded, the inputs of its backward pass, and the right gradients."""

    loss: torch.Tensor
    inputs: list[torch.Tensor]
    gradients: list[Any]
    epoch: int
    blocks: tuple[Block, ...]


def record(world: World, random: Random) -> None:
    """Records a graph that keeps the weights for its backward pass."""
    del random
    if world.undo:
        return  # torch keeps the shapes that leaves had in graphs that modules hold
    inputs, terms = [], []
    for entry in floats(world.model, ("parameter", "tensor", "buffer")):
        tensor = entry.tensor
        factor = torch.ones_like(tensor, requires_grad=True)
        product = factor * tensor
        if tensor.requires_grad:
            product = product + tensor * tensor
            inputs.append(tensor)
        inputs.append(factor)
        real = torch.view_as_real(product) if product.is_complex() else product
        terms.append(real.double().sum())
    loss = torch.stack(terms).sum()
    world.tell("record a graph")
    gradients = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
    now = tuple(world.blocks)
    world.graphs.append(Graph(loss, inputs, list(map(_bits, gradients)), world.epoch, now))


def _bits(gradient: torch.Tensor | None) -> object:
    return None if gradient is None else bits(gradient)


def backward(world: World, random: Random) -> None:
    """Walks a graph: the right gradients, or torch's error where the weights are others by now."""
    graphs = [graph for graph in world.graphs if graph.epoch == world.epoch]
    world.graphs = graphs
    if not graphs:
        return
    graph: Graph = random.choice(graphs)
    world.tell("walk a graph")
    now = tuple(world.blocks)
    try:
        gradients = torch.autograd.grad(
            graph.loss, graph.inputs, retain_graph=True, allow_unused=True
        )
    except RuntimeError as error:
        if graph.blocks == now == ():
            raise Fault(
                "graph", f"the weights are those that it was recorded with: {error}"
            ) from error
        return
    if list(map(_bits, gradients)) != graph.gradients:
        where = f"recorded in {len(graph.blocks)} blocks, walked in {len(now)}"
        raise Fault("graph", f"wrong gradients without an error, {where}")


def graphs_around(world: World, random: Random) -> None:
    """Graphs recorded before, inside and after a block, and walked at each later place."""
    subject, name = pick(world, random)
    facts = world.facts(subject, name)
    if facts or world.blocks:
        return
    record(world, random)
    open_block(world, subject, name)
    if not world.blocks:
        return
    if random.random() < 0.7:
        record(world, random)
        backward(world, random)
    close_block(world, world.blocks[-1])
    for _ in range(3):
        backward(world, random)
