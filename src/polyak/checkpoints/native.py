"""Our own files: a state in safetensors, with names, rules, clocks and a digest; no pickle anywhere.

The header's metadata holds, beside the digest (`tensorfile`), one entry `polyak`: the state's numbers,
rules and names as JSON. The tensors lie under `averages/<average>/<slot>/<name>`, `copies/<name>`,
`random/<average>/<device>`, and `live/<name>` where a rule's readout has a term in the live weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyak.averager import Averager
from polyak.checkpoints import tensorfile
from polyak.checkpoints.checkpoint import Checkpoint, Clock
from polyak.checkpoints.stored import FORMAT, KEY, PAIRS, ReadOut, Stored
from polyak.checkpoints.tensorfile import Form, narrowed
from polyak.ema import EMA
from polyak.engine import tick_data
from polyak.rules import LIVE
from polyak.sharding import require_whole
from polyak.specs import parse
from polyak.states import STATE_FORMAT, as_tick
from polyak.tensors import dtype_name
from polyak.tracking import Tracked


def save(path: Path | str, averager: Averager | EMA, *, overwrite: bool = True) -> None:
    """Writes all that an averager (or the article's `EMA`) needs to go on exactly: slots, clock, rule.

    The file appears when it is complete and on the disk; a process killed on the way leaves the
    file that was there before. Live weights, optimizer and data order are yours to save, in one
    folder with this file (`saving`) so that they agree.

    >>> import tempfile
    >>> place = Path(tempfile.mkdtemp()) / "average.safetensors"
    >>> averager = Averager({"w": torch.zeros(2)}, "exponential(0.9)")
    >>> averager.update()
    >>> save(place, averager)
    >>> tensorfile.TensorFile(place)["averages/average/average/w"]
    tensor([0., 0.])

    Raises `RuntimeError` inside `applied()`, `TypeError` for another object or a dtype that
    safetensors lacks, `ValueError` for a sharded model, `OSError` where it cannot be written.
    """
    described, stored = _packed(averager)
    write(path, described, stored, overwrite=overwrite)


def write(
    path: Path | str,
    described: Mapping[str, Any],
    stored: Mapping[str, Tensor],
    *,
    overwrite: bool = True,
    narrow: torch.dtype | None = None,
) -> None:
    """Writes a file of ours: its description as JSON, its tensors by key.

    `narrow` is the dtype of averages' real tensors in the file, if not their own; raises
    `ValueError` for a value that it cannot hold.
    """
    pairs = [key for key, tensor in stored.items() if tensor.dtype == torch.complex128]
    plain = {**stored, **{key: torch.view_as_real(stored[key].resolve_conj()) for key in pairs}}
    cast = [k for k, t in plain.items() if k.startswith("averages/") and t.is_floating_point()]
    dtypes = {key: tensor.dtype for key, tensor in plain.items()} | (
        dict.fromkeys(set(cast) - set(pairs), narrow) if narrow else {}
    )
    tensorfile.write(
        path,
        {key: Form(dtypes[key], tuple(tensor.shape)) for key, tensor in plain.items()},
        lambda key: [narrowed(key, plain[key], dtypes[key])],
        {KEY: json.dumps({"format": FORMAT, PAIRS: pairs, **described})},
        digest=True,
        overwrite=overwrite,
    )


def _packed(averager: Averager | EMA) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the tensors by key of what is saved."""
    if isinstance(averager, EMA):
        described = {"kind": "ema", "rule": str(averager.rule), "every": averager.update_every}
        held = averager.state_dict()
        require_whole("save", held)
        return described, {f"ema/{key}": tensor for key, tensor in held.items()}
    if not isinstance(averager, Averager):
        raise TypeError(f"save: got {type(averager).__name__}, wanted a polyak.Averager or EMA")
    return packed(averager, "averager")


def packed(averager: Averager, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the tensors by key of an averager: its state, and what its model is like."""
    state, tracked = averager.state_dict(), averager.tracked
    require_whole("save", {item.name: item.held() for item in tracked})
    averages = state.pop("averages")
    stored = {f"copies/{name}": tensor for name, tensor in state.pop("copies").items()}
    for average, held in averages.items():
        stored |= {
            f"averages/{average}/{slot}/{name}": tensor
            for slot, tensors_of in held["slots"].items()
            for name, tensor in tensors_of.items()
        }
        random = held.get("random", {})
        stored |= {f"random/{average}/{device}": state_of for device, state_of in random.items()}
    if averager.clock.n and any(map(_needs_live, averages.values())):
        live = {item.name: item.live().detach() for item in tracked if item.policy == "average"}
        stored |= {f"live/{name}": tensor for name, tensor in live.items()}
    described = {
        name: {"rule": held["rule"], "tick": held["tick"], "slots": list(held["slots"])}
        for name, held in averages.items()
    }
    del state["format"]
    return {
        "kind": kind,
        "every": averager.every,
        **state,
        "averages": described,
        "model": described_model(tracked),
    }, stored


def described_model(tracked: Sequence[Tracked]) -> dict[str, Any]:
    """What the averaged model is like: shape, dtype, policy, other names, of all that is stored."""
    return {item.name: _described(item) for item in tracked if item.policy != "live"}


def _needs_live(held: Mapping[str, Any]) -> bool:
    return LIVE in parse(held["rule"]).readout(as_tick(held["tick"]))


def _described(item: Tracked) -> dict[str, Any]:
    live = item.live()
    return {
        "shape": list(live.shape),
        "dtype": dtype_name(live.dtype),
        "policy": item.policy,
        "aliases": list(item.aliases),
    }


def state(stored: Stored) -> dict[str, Any]:
    """The state that an averager's `load_state_dict` takes, its tensors mapped from the file."""
    averages: dict[str, dict[str, Any]] = {}
    for name, held in stored.averages().items():
        slots = {slot: stored.under(f"averages/{name}/{slot}/") for slot in held.slots}
        averages[name] = {"rule": str(held.rule), "tick": tick_data(held.tick), "slots": slots}
        random = stored.under(f"random/{name}/")
        averages[name] |= {"random": random} if random else {}
    numbers = {name: stored.get(name) for name in ("calls", "elapsed", "skipped")}
    numbers |= {name: stored.get(name) for name in ("run", "mixed") if stored.has(name)}
    copies = stored.under("copies/")
    return {"format": STATE_FORMAT, **numbers, "copies": copies, "averages": averages}


def checkpoint(stored: Stored) -> Checkpoint:
    """What a file of ours holds, as any checkpoint: averages read out by their rules."""
    if stored.get("kind") == "ema":
        return _ema_checkpoint(stored)
    held, model = stored.averages(), stored.model()
    return Checkpoint(
        path=stored.path,
        format="polyak",
        live=stored.under("live/") or None,
        averages={name: ReadOut(stored, name, each) for name, each in held.items() if each.tick.n},
        rules={name: each.rule for name, each in held.items()},
        clock=Clock(max((each.tick.n for each in held.values()), default=0)),
        dtypes={name: getattr(torch, each["dtype"]) for name, each in model.items()},
    )


def _ema_checkpoint(stored: Stored) -> Checkpoint:
    held = stored.under("ema/")
    parts = {
        part: {k.removeprefix(part): t for k, t in held.items() if k.startswith(part)}
        for part in ("ema_model.", "online_model.")
    }
    step = stored.tensor("ema/step")
    if step.numel() != 1 or int(step) < 0:
        raise stored.error(f"step is {step}, wanted one integer >= 0")
    average = {"average": parts["ema_model."]}
    rules = {"average": stored.rule(stored.get("rule"))}
    clock = Clock(int(step), "calls")
    return Checkpoint(stored.path, "polyak", parts["online_model."] or None, average, rules, clock)
