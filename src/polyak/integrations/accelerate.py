"""Averages in a loop of Accelerate, which `save_state` and `load_state` include.

model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
averager = polyak.Averager(model, "exponential(half_life=200)")
averager.attach(optimizer)                  counts no step that is accumulated or skipped
register(accelerator, averager)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from polyak.averager import Averager
from polyak.integrations._arguments import require_file_names, require_kind
from polyak.integrations._extra import extra
from polyak.integrations._states import NO_DEEPSPEED, load_state, require_apart, save_state

with extra("accelerate", "accelerate"):
    from accelerate import Accelerator, DistributedType  # type: ignore[import-untyped]

__all__ = ["register"]

_NAMES: WeakKeyDictionary[Any, list[list[str]]] = WeakKeyDictionary()
"""accelerator -> the names of the averages of each averager that it saves."""


def register(
    accelerator: Accelerator,
    averager: Averager,
    *,
    missing_ok: bool = False,
    change_rule: bool = False,
) -> Callable[[], None]:
    """Make `save_state` and `load_state` include an averager; return a function that ends this.

    Each folder gets the exact state in `averages/<names>.safetensors`; if the averager is sharded, all
    ranks write the folder `averages/<names>.dcp`. A run without averages loads such a folder too.
    `register_for_checkpointing` saves only the first rank's shards, and a run without averages cannot
    load its folder.

    Args:
        averager: with FSDP2, made after `prepare`, which replaces the parameters.
        missing_ok: whether `load_state` leaves the averager as it is if the folder has no state of it.
            With FSDP2 then call `attach` after `load_state`, in which torch steps a new optimizer once.
        change_rule: whether the averager may have another rule than the state, as for `polyak.load`.

    Raises `TypeError` for an argument of another type, `ValueError` for DeepSpeed, and for
    an average whose name no file can have or the accelerator already saves. `load_state` then raises
    `FileNotFoundError` for a folder without the state, and what `polyak.load` raises.
    """
    require_kind("register", "accelerator", accelerator, Accelerator)
    require_kind("register", "averager", averager, Averager)
    names = list(averager.rules)
    require_file_names(names)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError(NO_DEEPSPEED)
    others = _NAMES.setdefault(accelerator, [])
    remedy = ", or call what register returned for the other to remove it"
    require_apart(names, others, "two averagers", remedy)

    def saving(_models: Any, _weights: Any, folder: str) -> None:
        everywhere = accelerator.project_configuration.save_on_each_node
        first = accelerator.is_local_main_process if everywhere else accelerator.is_main_process
        save_state(Path(folder), averager, writes=first)

    def loading(_models: Any, folder: str) -> None:
        cure = None if missing_ok else "to go on without it, register with missing_ok=True"
        load_state(Path(folder), averager, change_rule=change_rule, cure=cure)

    handles = [
        accelerator.register_save_state_pre_hook(saving),
        accelerator.register_load_state_pre_hook(loading),
    ]
    others.append(names)

    def remove() -> None:
        if handles:  # a second call does nothing
            others.remove(names)
        while handles:
            handles.pop().remove()

    return remove
