"""Whoever averages under FSDP2 or DDP: the floor, this library, loops by hand, the peers' packages.

Each has a decay that stays and one that changes at every update, as in a warm-up: for the peers
their own warm-up, and a function given to those that have none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from diffusers.training_utils import EMAModel
from ema_pytorch import EMA
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn
from torch_ema import ExponentialMovingAverage

from distributed_models import DDP, FSDP2, Run, Transformer, shard
from engine_measure import Call
from polyak import Averager, Exponential
from polyak.decays import Ratio

DECAY = 0.999
LIMIT = 0.99999
"""What decays that change rise to, beyond the updates that are made."""
FLOOR = "floor: foreach on cached plain tensors"
FLOOR_OF_ROWS = f"{FLOOR}, this rank's rows"
POLYAK, POLYAK_SHARDED = "polyak", "polyak, shard=WORLD"
HAND = "by hand: "


@dataclass(frozen=True)
class Averaging:
    """An average's update, and the tensors that hold the average, in the parameters' order."""

    update: Call
    held: Callable[[], Iterable[Tensor]]


Build = Callable[[Run, bool], Averaging]
"""A model on its ranks, and whether the decay changes -> its average."""


def contenders(setting: str) -> dict[str, Build]:
    """Name -> how to build it, those that are refused under FSDP2 at the end."""
    return {FSDP2: _SHARDED, DDP: _REPLICATED}[setting]


def decay_at(update: int, changing: bool) -> float:
    """The decay of an update, counted from 1: one that stays, or TensorFlow's warm-up."""
    return min(LIMIT, update / (9 + update)) if changing else DECAY


def foreach(live: list[Tensor], changing: bool) -> Averaging:
    """One `torch._foreach_lerp_` over lists that were made once: plain tensors, or DTensors."""
    average, counts = [tensor.clone() for tensor in live], count(1)

    def update() -> None:
        torch._foreach_lerp_(average, live, 1 - decay_at(next(counts), changing))

    return Averaging(update, lambda: average)


def one_by_one(live: list[Tensor], changing: bool) -> Averaging:
    """A `lerp_` for each tensor."""
    average, counts = [tensor.clone() for tensor in live], count(1)

    def update() -> None:
        fraction = 1 - decay_at(next(counts), changing)
        for mean, tensor in zip(average, live, strict=True):
            mean.lerp_(tensor, fraction)

    return Averaging(update, lambda: average)


def rows_of_this_rank(whole: Iterable[Tensor]) -> list[Tensor]:
    """Each tensor's rows on this rank, as views: those of DTensor's Shard(0)."""
    rank, world = dist.get_rank(), dist.get_world_size()
    chunks = (tensor.chunk(world) for tensor in whole)
    return [each[rank] if rank < len(each) else each[0][:0] for each in chunks]


def _floor(run: Run, changing: bool) -> Averaging:
    return foreach(run.parts, changing)


def _floor_of_rows(run: Run, changing: bool) -> Averaging:
    return foreach(rows_of_this_rank(run.parts), changing)


def _polyak(run: Run, changing: bool, **options: object) -> Averaging:
    rule = Exponential(Ratio(LIMIT) if changing else DECAY)
    averager = Averager(run.model, rule, **options)  # type: ignore[arg-type]

    def held() -> Iterable[Tensor]:
        slots: dict[str, Tensor] = averager.state_dict()["averages"]["average"]["slots"]["average"]
        return slots.values()

    return Averaging(averager.update, held)


def _polyak_sharded(run: Run, changing: bool) -> Averaging:
    return _polyak(run, changing, shard=dist.group.WORLD)


def _foreach_by_hand(run: Run, changing: bool) -> Averaging:
    return foreach([parameter.detach() for parameter in run.model.parameters()], changing)


def _loop_by_hand(run: Run, changing: bool) -> Averaging:
    return one_by_one([parameter.detach() for parameter in run.model.parameters()], changing)


def _deepcopy(run: Run, changing: bool) -> Averaging:
    copied = deepcopy(run.model)
    return foreach([parameter.detach() for parameter in copied.parameters()], changing)


def _ema_pytorch(
    run: Run, changing: bool, prebuilt: bool = False, lists: bool = False, buffer: bool = False
) -> Averaging:
    twin = shard(Transformer(run.size.width)) if prebuilt else None
    for model in (run.model, twin) if buffer else ():
        model.register_buffer("statistic", torch.zeros(2))  # type: ignore[union-attr]
    ema = EMA(
        run.model,
        ema_model=twin,
        beta=LIMIT if changing else DECAY,
        min_value=0.0 if changing else DECAY,
        update_after_step=0,
        update_every=1,
        use_foreach=lists,
    )
    return Averaging(ema.update, lambda: ema.ema_model.parameters())


def _torch_ema(run: Run, changing: bool) -> Averaging:
    ema = ExponentialMovingAverage(
        run.model.parameters(), LIMIT if changing else DECAY, use_num_updates=changing
    )
    return Averaging(ema.update, lambda: ema.shadow_params)


def _diffusers(run: Run, changing: bool, lists: bool = False) -> Averaging:
    ema = EMAModel(
        run.model.parameters(),
        decay=LIMIT if changing else DECAY,
        min_decay=0.0 if changing else DECAY,
        foreach=lists,
    )
    return Averaging(lambda: ema.step(run.model.parameters()), lambda: ema.shadow_params)


def _averaged_model(run: Run, changing: bool, multi: bool, built: str = "from it") -> Averaging:
    """torch's class, made from the model, or from a plain one that is sharded afterwards or never."""
    of_decay = get_ema_multi_avg_fn if multi else get_ema_avg_fn

    def move(average: Any, live: Any, averaged: Tensor | int) -> Any:
        return of_decay(decay_at(int(averaged), changing=True))(average, live, averaged)

    function = move if changing else of_decay(DECAY)
    model = run.model if built == "from it" else Transformer(run.size.width)
    single, several = (None, function) if multi else (function, None)
    averaged = AveragedModel(model, avg_fn=single, multi_avg_fn=several)
    if built == "sharded too":
        shard(averaged.module)
    return Averaging(
        lambda: averaged.update_parameters(run.model), lambda: averaged.module.parameters()
    )


_SHARDED: dict[str, Build] = {
    FLOOR: _floor,
    POLYAK: _polyak,
    f"{HAND}foreach lerp on DTensors": _foreach_by_hand,
    f"{HAND}lerp_ of each DTensor": _loop_by_hand,
    "ema_pytorch, its model sharded too": partial(_ema_pytorch, prebuilt=True),
    "ema_pytorch, the same, foreach": partial(_ema_pytorch, prebuilt=True, lists=True),
    "torch_ema": _torch_ema,
    "diffusers": _diffusers,
    "diffusers, foreach": partial(_diffusers, lists=True),
    "AveragedModel, sharded too, avg_fn": partial(
        _averaged_model, multi=False, built="sharded too"
    ),
    "AveragedModel, sharded too, multi_avg_fn": partial(
        _averaged_model, multi=True, built="sharded too"
    ),
    "ema_pytorch of the sharded model": _ema_pytorch,
    "ema_pytorch, its model sharded too, foreach, a buffer in the model": partial(
        _ema_pytorch, prebuilt=True, lists=True, buffer=True
    ),
    "AveragedModel of the sharded model": partial(_averaged_model, multi=True),
    "AveragedModel made before sharding": partial(_averaged_model, multi=True, built="plain"),
    f"{HAND}copy.deepcopy(model)": _deepcopy,
}

_REPLICATED: dict[str, Build] = {
    FLOOR: _floor,
    FLOOR_OF_ROWS: _floor_of_rows,
    POLYAK: _polyak,
    POLYAK_SHARDED: _polyak_sharded,
    "ema_pytorch": _ema_pytorch,
    "ema_pytorch, foreach": partial(_ema_pytorch, lists=True),
    "torch_ema": _torch_ema,
    "diffusers": _diffusers,
    "diffusers, foreach": partial(_diffusers, lists=True),
    "AveragedModel, avg_fn": partial(_averaged_model, multi=False),
    "AveragedModel, multi_avg_fn": partial(_averaged_model, multi=True),
}
