"""Save an averager's state in a file of polyak, with names, rules, clocks and checksums.

The format is safetensors; nothing is pickled. The header's metadata has, beside the checksums
(`_safetensors.files`), one entry `polyak`: the description, which is the state's numbers, rules and names as
JSON. The keys of the tensors are `averages/<average>/<slot>/<name>`, `copies/<name>`, and `live/<name>`
if a rule's readout has a term in the live weights.

A sharded averager is stored as a folder of torch.distributed.checkpoint with the same keys. Its
description is one more tensor, of bytes, under the key `polyak`. The description has a random mark of the
save, and each rank writes the mark under `polyak/<rank>`, so that a rank's file from another save is
noticed.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from polyak._dtypes import dtype_name
from polyak._engine import open_swaps
from polyak._engine.states import as_tick
from polyak._engine.tracking import Tracked, named
from polyak._lazy import TensorSpec
from polyak._ranks.agreement import agree, chosen, rank_of, together
from polyak._ranks.sharding import require_whole
from polyak.averager import Averager
from polyak.checkpoints._dcp.folders import save_folder
from polyak.checkpoints._own_format import FORMAT, PAIRS, SAVE
from polyak.checkpoints._rank_checks import require_one_model
from polyak.checkpoints._safetensors import files as tensorfile
from polyak.checkpoints._safetensors.files import KEY, narrowed
from polyak.ema import EMA
from polyak.rules import LIVE
from polyak.specs import own_classes, parse

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def save(
    path: Path | str,
    averager: Averager | EMA,
    *,
    group: ProcessGroup | None = None,
    overwrite: bool = False,
) -> None:
    """Write the state of an averager, or of the article's `EMA`, from which `load` continues bit for bit.

    The file appears when it is complete and on the disk. With `overwrite` it replaces what exists at the
    path; a process that is killed before that leaves the old file. Missing folders are made; through a
    symbolic link its target is written. Save the model, the optimizer and the position in the data
    yourself, in one folder with this file (`saving`), so that they belong to the same step.

    For a sharded averager it is collective: every rank of the group (by default all ranks) calls it, each
    writes its parts, and `path` becomes a folder of torch.distributed.checkpoint. Of a tensor that
    all ranks have (a buffer, which may differ between ranks) the lowest rank's is saved.
    `save_distributed` saves the rest of the training as well.

    >>> import tempfile
    >>> place = Path(tempfile.mkdtemp()) / "average.safetensors"
    >>> averager = Averager({"w": torch.zeros(2)}, "exponential(0.9)")
    >>> averager.update()
    >>> save(place, averager)
    >>> from safetensors.torch import load_file
    >>> load_file(place)["averages/average/average/w"]
    tensor([0., 0.])

    Raises `RuntimeError` inside `applied()`; `TypeError` for another object, or a dtype that safetensors
    does not have; `FileExistsError` if the path exists, unless `overwrite`; `OSError` if it cannot
    be written, or is a device, a pipe or a socket; `ValueError` if the ranks are at different updates or
    have different tensors. An error on one rank is raised on all.
    """
    if isinstance(averager, Averager) and averager.sharded:
        save_parts("save", path, averager, packed, group=group, overwrite=overwrite)
        return
    write_packed(path, averager, _packed, overwrite=overwrite)


NARROWED = ("averages/", "live/")
"""How the keys begin of tensors that snapshots may store in another dtype."""

Packed = tuple[dict[str, Any], dict[str, Tensor]]
"""The contents of a file: the description, and the tensors by key."""

Pack = Callable[[Averager], Packed]
"""Makes what is saved of an averager, on each rank."""

_Saved = TypeVar("_Saved")


def save_parts(
    call: str,
    path: Path | str,
    averager: Averager,
    pack: Pack,
    *,
    group: ProcessGroup | None,
    overwrite: bool = False,
) -> None:
    """Write a folder with what each rank of the group packs of its averager. Collective."""
    content = encoded(call, {"": averager}, pack, group)[""]
    save_folder(call, path, content, group=group, overwrite=overwrite)


def encoded(
    call: str, averagers: Mapping[str, Averager], pack: Pack, group: ProcessGroup | None
) -> dict[str, dict[str, Tensor]]:
    """Pack each averager for a file, as tensors only: its description is one of them.

    Collective. Raises on all ranks what packing raises on one, and `ValueError` if the ranks'
    descriptions differ.
    """
    for averager in averagers.values():
        with together(call, group):
            averager.check_replicas()  # only the ranks of its mesh compare; that may be some of the group
    with together(call, group):
        tracked = {f"{key} {i.name}".strip(): i for key, a in averagers.items() for i in a.tracked}
    require_one_model(call, tracked, group)
    with together(call, group):
        packed = {key: pack(averager) for key, averager in averagers.items()}
    texts = {"averagers": str(sorted(packed))}
    for key, (described, _) in packed.items():
        texts |= {f"{key}{name}".strip(): each for name, each in _texts(described).items()}
    wanted = "save an average from all ranks that share it (`group=`), at the same update"
    agree(call, texts, group, wanted)
    # A folder that was put together from two saves has marks that differ.
    save = chosen(call, lambda: secrets.token_hex(8), group)
    mine = {f"{KEY}/{rank_of(group)}": _bytes(save)}
    return {
        key: {**stored, **mine, KEY: _as_tensor({**described, SAVE: save})}
        for key, (described, stored) in packed.items()
    }


@open_swaps.in_turn  # a file of slots that an update moves meanwhile is of no update
def write_packed(
    path: Path | str,
    saved: _Saved,
    pack: Callable[[_Saved], Packed],
    *,
    overwrite: bool,
    narrow: torch.dtype | None = None,
) -> None:
    """Write what is packed of an averager that is not sharded, or of an `EMA`; calls in other threads wait."""
    described, stored = pack(saved)
    write(path, described, stored, overwrite=overwrite, narrow=narrow)


def write(
    path: Path | str,
    described: Mapping[str, Any],
    stored: Mapping[str, Tensor],
    *,
    overwrite: bool = False,
    narrow: torch.dtype | None = None,
) -> None:
    """Write a file of ours from a description and tensors by key.

    `narrow` is another dtype for the real tensors of averages and live weights. Raises `ValueError` for
    a value that it cannot hold.
    """
    # safetensors has no complex128, so these tensors are stored as pairs of float64.
    pairs = [key for key, tensor in stored.items() if tensor.dtype == torch.complex128]
    plain = {**stored, **{key: torch.view_as_real(stored[key].resolve_conj()) for key in pairs}}
    cast = [k for k, t in plain.items() if k.startswith(NARROWED) and t.is_floating_point()]
    dtypes = {key: tensor.dtype for key, tensor in plain.items()} | (
        dict.fromkeys(set(cast) - set(pairs), narrow) if narrow else {}
    )
    tensorfile.write(
        path,
        {key: TensorSpec(tuple(tensor.shape), dtypes[key]) for key, tensor in plain.items()},
        lambda key: [narrowed(key, plain[key], dtypes[key])],
        {KEY: json.dumps({"format": FORMAT, PAIRS: pairs, **described})},
        checksums=True,
        overwrite=overwrite,
    )


def _packed(averager: Averager | EMA) -> Packed:
    if isinstance(averager, EMA):
        described = {"kind": "ema", "rule": str(averager.rule), "every": averager.update_every}
        held = dict(averager.named_parameters()) | dict(averager.named_buffers())
        require_whole("save", held)
        open_swaps.refuse_parts("save", list(held.items()))
        state = averager.state_dict()
        return described, {f"ema/{key}": tensor for key, tensor in state.items()}
    if not isinstance(averager, Averager):
        raise TypeError(f"save: got {type(averager).__name__}, wanted a polyak.Averager or EMA")
    return packed(averager)


def packed(averager: Averager, kind: str = "averager", *, live: bool = False) -> Packed:
    """Pack an averager for a file: its state, and a description of its model.

    With `live` also the live weights of what it averages, which some rules need in any case.
    """
    for name, rule in averager.rules.items():
        if not rule.savable():
            raise ValueError(f"save: average {name!r}: {rule} is not saved (SAVABLE is False)")
    state, tracked = averager.state_dict(), averager.tracked
    averages = state.pop("averages")
    stored = _by_key(state.pop("copies"), averages)
    if averager.clock.n and (live or any(map(_needs_live, averages.values()))):
        items = [item for item in tracked if item.policy == "average"]
        open_swaps.refuse_swapped("save", items)
        weights = named(items, [item.local().detach() for item in items])
        stored |= {f"live/{name}": tensor for name, tensor in weights.items()}
    del state["format"]  # the file has its own
    # Their weights are the model's own and not in the file, which says so to who exports it.
    frozen = [item.name for item in tracked if item.policy == "frozen"]
    return {
        "kind": kind,
        "every": averager.every,
        **({"frozen": frozen} if frozen else {}),
        **state,
        "averages": {name: _described_average(entry) for name, entry in averages.items()},
        "model": described_model(tracked),
    }, stored


def _by_key(copies: Mapping[str, Tensor], averages: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state by their keys in a file."""
    stored = {f"copies/{name}": tensor for name, tensor in copies.items()}
    for average, entry in averages.items():
        stored |= {
            f"averages/{average}/{slot}/{name}": tensor
            for slot, tensors_of in entry["slots"].items()
            for name, tensor in tensors_of.items()
        }
    return stored


def _described_average(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The description of an average, with the classes of its rule that are not polyak's."""
    described = {"rule": entry["rule"], "tick": entry["tick"], "slots": list(entry["slots"])}
    classes = own_classes(entry["rule"])
    return {**described, "classes": classes} if classes else described


def _texts(described: Mapping[str, Any]) -> dict[str, str]:
    """A description as texts by name, for ranks to compare; equal texts mean equal descriptions."""
    entries = {f" {name}": each for name, each in described.items()}
    averages, model = entries.pop(" averages"), entries.pop(" model")
    for name, each in averages.items():
        entries[f" average {name}"] = f"update {each['tick'][0]} of {each}"
    entries |= {f" tensor {name}": each for name, each in model.items()}
    return {name: json.dumps(each, sort_keys=True) for name, each in entries.items()}


def _as_tensor(described: Mapping[str, Any]) -> Tensor:
    return _bytes(json.dumps({"format": FORMAT, PAIRS: [], **described}))


def _bytes(text: str) -> Tensor:
    """A text as a tensor of bytes."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def described_model(tracked: Sequence[Tracked]) -> dict[str, Any]:
    """name -> shape, dtype, policy and other names of every tensor that is stored."""
    return {item.name: _described(item) for item in tracked if item.stored}


def _needs_live(held: Mapping[str, Any]) -> bool:
    return LIVE in parse(held["rule"]).readout(as_tick(held["tick"]))


def _described(item: Tracked) -> dict[str, Any]:
    tensor = item.held()
    return {
        "shape": list(tensor.shape),
        "dtype": dtype_name(tensor.dtype),
        "policy": item.policy,
        "aliases": list(item.aliases),
    }
