"""What training scripts do to a model: every change is made to the model and to its twin alike.

A new change is one line of `CHANGES`. Each takes a model and its own random numbers, so that it does the
same to both.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from stress_models import Entry, Source, entries


def noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Small random numbers in a tensor's shape and dtype."""
    real = torch.view_as_real(like.detach().resolve_conj()) if like.is_complex() else like.detach()
    drawn = (0.125 * torch.randn(real.shape, generator=generator)).to(real.dtype)
    return torch.view_as_complex(drawn) if like.is_complex() else drawn


def floats(source: Source, kinds: tuple[str, ...] = ("parameter", "tensor")) -> list[Entry]:
    """The tensors that training moves."""
    found = [entry for entry in entries(source) if entry.kind in kinds]
    return [e for e in found if e.tensor.is_floating_point() or e.tensor.is_complex()]


def generator(random: Random) -> torch.Generator:
    return torch.Generator().manual_seed(random.randrange(2**31))


@torch.no_grad()
def wander(source: Source, random: Random) -> None:
    """A step of a random walk, in place."""
    drawn = generator(random)
    for entry in floats(source):
        entry.tensor.add_(noise(entry.tensor, drawn))


@torch.no_grad()
def wander_unseen(source: Source, random: Random) -> None:
    """A step through `.data`, which no version counter sees."""
    drawn = generator(random)
    for entry in floats(source):
        entry.tensor.data.add_(noise(entry.tensor, drawn))


@torch.no_grad()
def change_buffers(source: Source, random: Random) -> None:
    """Counters count, masks flip, the rest moves; running variances stay above 0."""
    drawn = generator(random)
    for entry in entries(source):
        tensor = entry.tensor
        if entry.kind != "buffer":
            continue
        if tensor.dtype == torch.bool:
            tensor.logical_not_()
        elif not tensor.is_floating_point() and not tensor.is_complex():
            tensor.add_(1)
        elif entry.leaf == "running_var":
            tensor.mul_(random.choice([0.25, 0.5, 2.0]))
        else:
            tensor.add_(noise(tensor, drawn))


def fresh(entry: Entry, drawn: torch.Generator) -> Tensor:
    """A tensor with a new address, and nearly the old content."""
    tensor = entry.tensor.detach()
    floating = tensor.is_floating_point() or tensor.is_complex()
    with torch.no_grad():
        return tensor.clone() + noise(tensor, drawn) if floating else tensor.clone()


def put(entry: Entry, tensor: Tensor) -> None:
    """Replaces a tensor as a script would."""
    if entry.owner is None:
        entry.holder[entry.leaf] = tensor
    elif entry.kind == "buffer":
        setattr(entry.owner, entry.leaf, tensor)
    else:
        grad = entry.tensor.requires_grad
        setattr(entry.owner, entry.leaf, nn.Parameter(tensor, requires_grad=grad))


def replace_one(source: Source, random: Random) -> None:
    """`module.weight = nn.Parameter(...)`."""
    entry = random.choice(entries(source))
    put(entry, fresh(entry, generator(random)))


def replace_all(source: Source, random: Random) -> None:
    drawn = generator(random)
    for entry in entries(source):
        put(entry, fresh(entry, drawn))


def assign(source: Source, random: Random) -> None:
    """`load_state_dict(..., assign=True)`."""
    state = _state(source, random)
    if isinstance(source, nn.Module):
        source.load_state_dict(state, assign=True)
    else:
        source.update(state)


@torch.no_grad()
def load_in_place(source: Source, random: Random) -> None:
    """`load_state_dict(...)`."""
    state = _state(source, random)
    if isinstance(source, nn.Module):
        source.load_state_dict(state)
    else:
        for name, tensor in source.items():
            tensor.copy_(state[name])


def _state(source: Source, random: Random) -> dict[str, Tensor]:
    drawn = generator(random)
    held = source.state_dict() if isinstance(source, nn.Module) else source
    moved: dict[int, Tensor] = {}
    for tensor in held.values():
        floating = tensor.is_floating_point() or tensor.is_complex()
        new = tensor.detach() + noise(tensor, drawn) if floating else tensor.detach().clone()
        moved.setdefault(tensor.data_ptr() if tensor.numel() else id(tensor), new)
    return {n: moved[t.data_ptr() if t.numel() else id(t)] for n, t in held.items()}


def _owner(source: Source, random: Random) -> nn.Module | None:
    owners = [entry.owner for entry in entries(source) if entry.owner is not None]
    return random.choice(owners) if owners else None


def new_dictionary(source: Source, random: Random) -> None:
    """A module gets another `_parameters` (or `_buffers`) dictionary, with other tensors in it."""
    owner = _owner(source, random)
    name = random.choice(["_parameters", "_parameters", "_buffers"])
    if owner is not None:
        owner.__dict__[name] = _moved(owner.__dict__[name], random)


def _moved(held: dict[str, Any], random: Random) -> dict[str, Any]:
    """A deep copy with other content."""
    new = copy.deepcopy(held)
    drawn = generator(random)
    for tensor in new.values():
        if tensor is not None and (tensor.is_floating_point() or tensor.is_complex()):
            tensor.data.add_(noise(tensor, drawn))
    return new


def update_dictionary(source: Source, random: Random) -> None:
    """Restores the best weights by `module.__dict__.update(copy of the dictionary)`."""
    owner = _owner(source, random)
    if owner is not None:
        held = copy.deepcopy(owner.__dict__)
        held["_parameters"] = _moved(held["_parameters"], random)
        owner.__dict__.update(held)


def set_state(source: Source, random: Random) -> None:
    """What unpickling into an existing module does."""
    if isinstance(source, nn.Module):
        held = copy.deepcopy(source.__dict__)
        held["_parameters"] = _moved(held["_parameters"], random)
        source.__setstate__(held)


def new_modules(source: Source, random: Random) -> None:
    """A module is replaced by a copy of itself, in the old or in another `_modules` dictionary."""
    if not isinstance(source, nn.Module):
        return
    parents = [module for module in source.modules() if module._modules]
    if not parents:
        return
    parent = random.choice(parents)
    name = random.choice(list(parent._modules))
    new = copy.deepcopy(parent._modules[name])
    if random.random() < 0.5:
        parent._modules[name] = new
    else:
        parent.__dict__["_modules"] = {**parent._modules, name: new}
    if new is not None:
        wander(new, random)


@torch.no_grad()
def new_storage(source: Source, random: Random) -> None:
    """`parameter.data = another tensor`, of one or of all."""
    drawn = generator(random)
    found = floats(source)
    for entry in found if random.random() < 0.5 else [random.choice(found)]:
        entry.tensor.data = fresh(entry, drawn)


@torch.no_grad()
def flatten(source: Source, random: Random) -> None:
    """Parameters become views of one flat tensor, as trainers of many small tensors do."""
    del random
    seen: dict[int, list[Entry]] = {}
    for entry in floats(source):
        seen.setdefault(id(entry.tensor), []).append(entry)
    for dtype in dict.fromkeys(same[0].tensor.dtype for same in seen.values()):
        tensors = [same[0].tensor for same in seen.values() if same[0].tensor.dtype == dtype]
        flat, start = torch.cat([t.detach().reshape(-1) for t in tensors]), 0
        for tensor in tensors:
            tensor.data = flat[start : start + tensor.numel()].view(tensor.shape)
            start += tensor.numel()


def swap_tensors(source: Source, random: Random) -> None:
    """`torch.utils.swap_tensors`: the object stays, all in it is another tensor's."""
    found = [e for e in floats(source) if e.owner is not None and e.kind == "parameter"]
    if found:
        entry = random.choice(found)
        new = nn.Parameter(fresh(entry, generator(random)), entry.tensor.requires_grad)
        torch.utils.swap_tensors(entry.tensor, new)


def to_dtype(source: Source, random: Random) -> None:
    """`.to(dtype)`, `.double()`, of the whole model or of a part; complex tensors stay."""
    dtype = random.choice([torch.float64, torch.float32, torch.bfloat16, torch.float16])
    overwrite = random.random() < 0.3
    if not isinstance(source, nn.Module):
        for name, tensor in source.items():
            if tensor.is_floating_point():
                source[name] = tensor.to(dtype)
        return
    module = source if random.random() < 0.7 else random.choice(list(source.modules()))
    with _conversion(overwrite):
        module._apply(lambda t: t.to(dtype) if t.is_floating_point() else t)


@contextmanager
def _conversion(overwrite: bool) -> Iterator[None]:
    """How torch moves a module: by `.data`, or by new parameters."""
    torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
    try:
        yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


@torch.no_grad()
def lazy_views(source: Source, random: Random) -> None:
    """Parameters become views that torch reads with the opposite sign of what is stored."""
    del random
    for entry in floats(source):
        data = entry.tensor.data
        entry.tensor.data = data.conj() if data.is_complex() else torch._neg_view(data)


def untie(source: Source, random: Random) -> None:
    """A tied tensor gets a tensor of its own."""
    objects: dict[int, int] = {}
    for entry in entries(source):
        objects[id(entry.tensor)] = objects.get(id(entry.tensor), 0) + 1
    tied = [entry for entry in entries(source) if objects[id(entry.tensor)] > 1]
    if tied:
        entry = random.choice(tied)
        put(entry, fresh(entry, generator(random)))


Change = Callable[[Source, Random], None]

TRAINING: tuple[Change, ...] = (wander, wander, wander_unseen, change_buffers, load_in_place)
"""Changes of content alone."""

CHANGES: tuple[Change, ...] = (
    replace_one, replace_all, assign, new_dictionary, update_dictionary, set_state, new_modules,
    new_storage, flatten, swap_tensors, to_dtype, to_dtype, untie, lazy_views,
)  # fmt: skip
"""Changes of where the content is, or of its dtype."""

COPYING: tuple[Change, ...] = (
    new_dictionary,
    update_dictionary,
    set_state,
    new_modules,
    swap_tensors,
)
"""Changes that only models take which `deepcopy` takes."""

BY_DATA: tuple[Change, ...] = (new_storage, flatten, to_dtype, swap_tensors, lazy_views)
"""Changes that leave the object what it was, so that a write through them may go unseen."""
