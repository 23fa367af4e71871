"""Laws of what torch keeps private, as versions have it: `python torch_private_ranks.py FOLDER RANK WORLD`."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

if __name__ == "__main__":
    warnings.simplefilter("ignore")  # torch's own

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _composable_state as composable
from torch.distributed.checkpoint import state_dict as checkpoint
from torch.distributed.fsdp import fully_shard
from torch.torch_version import TorchVersion

import polyak
from polyak._ranks import torch_private as private
from sharding_ranks import raises, run_laws


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))


def sharded() -> nn.Sequential:
    """A model whose root FSDP2 leaves whole after a forward pass without a backward pass."""
    model = plain()
    fully_shard(model[0])
    fully_shard(model)
    return model


SEVERAL, ONE = "_fsdp_param_groups", "_fsdp_param_group"
NAME = SEVERAL if TorchVersion(torch.__version__) >= "2.12" else ONE


def states() -> list[Any]:
    found = [state() for state in composable._module_state_mapping.values()]
    return [state for state in found if hasattr(state, NAME)]


def forward(model: nn.Module) -> Tensor:
    out: Tensor = model(torch.ones(2, 5)).detach().clone()
    return out


def the_average_reaches_every_weight(layout: Callable[[], Any]) -> None:
    """Also the root's, which FSDP2 has gathered. A layout that were passed over would leave it as it is."""
    model = sharded()
    with layout():
        averager = polyak.Averager(model, "uniform()")
        averager.update()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert not forward(model).any()
    block = averager.applied()
    with layout():
        block.__enter__()
    torch.testing.assert_close(forward(model), forward(plain()))
    with layout():
        block.__exit__(None, None, None)
    assert not forward(model).any()


def names_are_there() -> None:
    model = sharded()
    weight: Any = model[0].weight
    assert private.local_part(weight) is private.local_parts([weight])[0]
    made = private.as_dtensor(torch.zeros_like(private.local_part(weight)), weight)
    assert made.shape == weight.shape and made.placements == weight.placements
    assert private.stored_chunks(weight) == [((0, 0), (4, 5))]
    short = dist.new_group(timeout=timedelta(seconds=77))
    assert short is not None and private.time_out(short) == timedelta(seconds=77)
    maker = checkpoint._init_optim_state
    assert private.state_makers() == {maker.__code__}
    forward(model)
    known = {id(module) for module in model.modules()}
    parameters = [p for group in private.fsdp_groups() for p in private.fsdp_parameters(group)]
    of_model = [p for p in parameters if known & set(map(id, private.holders_of(p)))]
    assert len(of_model) == 4
    assert sum(private.gathered_weight(p) is not None for p in of_model) == 4


@contextmanager
def one_group_a_state() -> Iterator[None]:
    """As before torch 2.12: a state has one group, or None."""
    if NAME == ONE:
        yield
        return
    found = [(state, state._fsdp_param_groups) for state in states()]
    for state, groups in found:
        del state._fsdp_param_groups
        state._only = groups[0] if groups else None
    kind = type(found[0][0])
    try:
        with patch.object(kind, "_fsdp_param_group", property(lambda state: state._only)):
            yield
    finally:
        for state, groups in found:
            state._fsdp_param_groups = groups


@contextmanager
def states_themselves() -> Iterator[None]:
    """As before torch 2.6: no weak references."""
    found = {module: state() for module, state in composable._module_state_mapping.items()}
    with patch.object(composable, "_module_state_mapping", found):
        yield


@contextmanager
def no_groups() -> Iterator[None]:
    """As a torch to come might have it: groups under another name."""
    found = [(state, getattr(state, NAME)) for state in states()]
    for state, groups in found:
        delattr(state, NAME)
        state._groups = groups
    try:
        yield
    finally:
        for state, groups in found:
            setattr(state, NAME, groups)


@contextmanager
def no_mapping() -> Iterator[None]:
    found = composable._module_state_mapping
    del composable._module_state_mapping
    try:
        yield
    finally:
        composable._module_state_mapping = found


@contextmanager
def states_elsewhere() -> Iterator[None]:
    """The mapping is there, and FSDP2 no longer uses it."""
    with patch.object(composable, "_module_state_mapping", {}):
        yield


@contextmanager
def no_way_back() -> Iterator[None]:
    """The groups are there, and cannot be asked to carry their shards."""
    kind = type(private.fsdp_groups()[0])
    with patch.object(kind, "_to_sharded"):
        del kind._to_sharded
        yield


KNOWN: list[Callable[[], Any]] = [nullcontext, one_group_a_state, states_themselves]
UNKNOWN = {
    no_groups: "FSDPState._fsdp_param_groups",
    no_mapping: "_module_state_mapping",
    states_elsewhere: "fully_shard",
    no_way_back: "FSDPParamGroup._to_sharded",
}


def older_layouts_are_known() -> None:
    for layout in KNOWN:
        the_average_reaches_every_weight(layout)


def unknown_layouts_are_refused() -> None:
    """By every call that reads or writes the weights; none passes over what it does not know."""
    for layout, name in UNKNOWN.items():
        model = sharded()
        averager = polyak.Averager(model, "uniform()")
        averager.update()
        forward(model)
        calls: list[Callable[[], object]] = [
            lambda a=averager: a.applied().__enter__(),  # type: ignore[misc]
            lambda a=averager, m=model: a.copy_to(m),  # type: ignore[misc]
            lambda m=model: polyak.Averager(m, "uniform()"),  # type: ignore[misc]
        ]
        for call in calls:
            with layout(), raises(RuntimeError, name, torch.__version__, "use a torch version"):
                call()


def versions_that_were_not_tested_are_refused() -> None:
    model = sharded()
    averager = polyak.Averager(model, "uniform()")
    averager.update()
    with patch.object(torch, "__version__", TorchVersion("2.6.0+cu124")):
        polyak.Averager(plain(), "uniform()").update()
        for call in (averager.applied().enter, lambda: polyak.Averager(model, "uniform()")):
            with raises(RuntimeError, "torch 2.6.0+cu124", "FSDP2", "torch 2.7"):
                call()


LAWS = [
    names_are_there,
    versions_that_were_not_tested_are_refused,
    older_layouts_are_known,
    unknown_layouts_are_refused,
]

if __name__ == "__main__":
    run_laws(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), LAWS)
