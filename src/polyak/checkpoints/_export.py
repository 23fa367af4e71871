"""Write an average as plain safetensors, and another library's file as a file of polyak."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from polyak._dtypes import require_slot_dtype
from polyak._files import refuse_existing
from polyak._lazy import TensorSpec, as_lazy, distinct, joined, spec_of
from polyak._ranks.agreement import together
from polyak._ranks.sharding import is_distributed, local
from polyak.averager import Averager
from polyak.checkpoints._checkpoint import Checkpoint, Weights
from polyak.checkpoints._load import load
from polyak.checkpoints._rank_checks import require_all_parts, require_one_model
from polyak.checkpoints._read import read
from polyak.checkpoints._safetensors.by_ranks import Spread, write_together
from polyak.checkpoints._safetensors.files import narrowed
from polyak.checkpoints._safetensors.weights import write
from polyak.checkpoints._save import save
from polyak.checkpoints._unfit import placeholder, unfit
from polyak.rules import LIVE, Rule
from polyak.specs import as_rule

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def export(
    path: Path | str,
    source: Averager | Checkpoint,
    name: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int | None = None,
    group: ProcessGroup | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> None:
    """Write an average as plain safetensors, with the model's own names and dtypes, tied weights once.

    `safetensors.torch.load_model` loads the file. `from_pretrained` of transformers and diffusers loads
    a folder with the model's config and the file, under one of these names:
    `model.safetensors`, `diffusion_pytorch_model.safetensors`. What is not averaged is written as the
    model has it now; buffers that their module does not save are left out. One tensor is in memory at
    a time.

    Args:
        source: an averager, or the result of `checkpoints.read`. The dtypes of a file's average
            are those of its live weights, if the file says so.
        name: the average, if there are several; "live" for the live weights of a checkpoint.
        dtype: the dtype of floating-point tensors, in place of the model's.
        shard_bytes: `path` becomes a folder of files with at most this many bytes, and an index.
        group: the ranks that export a sharded average; by default all ranks.
        overwrite: whether to replace what exists at the path.
        progress: called with the bytes written so far and the bytes in all.

    >>> import tempfile
    >>> from safetensors.torch import load_model
    >>> model, other = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    >>> averager = Averager(model, "uniform()")
    >>> averager.update()
    >>> place = Path(tempfile.mkdtemp()) / "model.safetensors"
    >>> export(place, averager)
    >>> load_model(other, place)
    (set(), [])
    >>> torch.equal(other.weight, model.weight)
    True

    For a sharded model it is collective: every rank of the group calls it. The result is the file that
    one process would write, but no rank holds more than a few pieces of 32 MiB beside its weights. If
    all ranks see the path, each writes its own parts, except parts that are scattered over the file
    (columns of a matrix): these go through the first rank. If a rank does not see the path, all parts go
    through the first rank. Only the first rank calls `progress`.

    Raises `RuntimeError` before the first update and inside `applied()`; `FileExistsError` if the path
    exists, unless `overwrite`; `OSError` if it cannot be written; `ValueError` for a value that the
    dtype cannot hold, and if ranks would write different tensors. An error on one rank is raised on all,
    and leaves everything as it was.
    """
    require_slot_dtype(dtype, "export: dtype")
    if isinstance(source, Averager) and any(map(is_distributed, _held_by(source).values())):
        spreads, parts = _spread(source, name, dtype, group)
        write_together(
            path,
            spreads,
            parts.read,
            agreed=f"average {name!r} at {source.clock}",
            group=group,
            shard_bytes=shard_bytes,
            overwrite=overwrite,
            progress=progress,
        )
        return
    model, weights = _whole(source, name)
    specs = {n: _in_dtype(spec, dtype) for n, spec in model.items()}
    write(
        path,
        specs,
        lambda n: [narrowed(n, weights[n].detach(), specs[n].dtype)],
        shard_bytes=shard_bytes,
        overwrite=overwrite,
        progress=progress,
    )


def _held_by(averager: Averager) -> dict[str, Tensor]:
    """The model's tensors that are saved, as it has them: whole, or distributed over ranks."""
    return {item.name: item.held() for item in averager.tracked if item.persistent}


def _whole(
    source: Averager | Checkpoint, name: str | None
) -> tuple[dict[str, TensorSpec], Weights]:
    """The specs and the tensors of an average that one process has."""
    if isinstance(source, Averager):
        tensors = _held_by(source)
        specs = {n: spec_of(tensor) for n, tensor in tensors.items()}
        return specs, joined(tensors, source.weights(name))
    if isinstance(source, Checkpoint):
        specs, weights = _of_checkpoint(source, name)
        _require_content(source, specs)
        return specs, weights
    got = type(source).__name__
    raise TypeError(f"export: got {got}, wanted a polyak.Averager or a Checkpoint")


def _spread(
    averager: Averager,
    name: str | None,
    dtype: torch.dtype | None,
    group: ProcessGroup | None,
) -> tuple[dict[str, Spread], Weights]:
    """How the model's tensors lie on the ranks, and this rank's parts of them. Collective."""
    tracked, held = averager.tracked, _held_by(averager)
    with together("export", group):
        for n, tensor in held.items():
            if is_distributed(tensor):
                require_all_parts("export", n, tensor, group)
        averager.check_replicas()  # by the ranks of its mesh, which may be some of the group
        own = {n: local(tensor).detach() for n, tensor in held.items()}
        parts = joined(own, averager.weights(name))
    require_one_model("export", {item.name: item for item in tracked if item.persistent}, group)
    spreads = {n: Spread(_in_dtype(spec_of(t), dtype), t) for n, t in held.items()}
    return spreads, parts


def _of_checkpoint(found: Checkpoint, name: str | None) -> tuple[dict[str, TensorSpec], Weights]:
    """The specs of an average's tensors in the dtypes of the live ones, tied weights once."""
    weights = found.weights(name) if name == LIVE else found.average(name)
    live = found.live.specs if found.live is not None else {}
    dtypes = found.dtypes or {n: spec.dtype for n, spec in live.items()}
    specs = distinct(weights).items()
    return {n: TensorSpec(spec.shape, dtypes.get(n, spec.dtype)) for n, spec in specs}, weights


def _in_dtype(spec: TensorSpec, dtype: torch.dtype | None) -> TensorSpec:
    """The spec with another floating-point dtype, if one is given."""
    change = dtype is not None and spec.dtype.is_floating_point
    return TensorSpec(spec.shape, dtype) if change and dtype is not None else spec


def _require_content(found: Checkpoint, specs: Mapping[str, TensorSpec]) -> None:
    """Raises `ValueError` if a checkpoint holds placeholders in place of weights."""
    if placeholder(specs, found.shapes):
        raise ValueError(f"{found.path}: {unfit(specs, found.shapes)}")


def convert(
    path: Path | str | Checkpoint,
    out: Path | str,
    rule: Rule | str | Mapping[str, Rule | str] | None = None,
    *,
    names: Sequence[str] | None = None,
    count: int | None = None,
    every: int | None = None,
    copied: Sequence[str] = (),
    overwrite: bool = False,
) -> Checkpoint:
    """Convert another library's file into a polyak file, from which `load` continues; return what was read.

    The result is the file that `load` and `save` would give, but needs no model: all tensors of
    floating-point and complex dtypes are averaged, integers are copied. An `Averager` copies a model's
    other buffers too, except running statistics: name these buffers in `copied`.

    Args:
        path: the file, or the result of `read`.
        rule: the rule of each average by name, or of the only average, if the file does not say it.
        names: the names of tensors that the file stores without names, in their order.
        count: the number of updates so far, if the file does not say it.
        every: calls of the library's update function per update, for a file that counts calls.
        copied: patterns for the names of buffers to copy.
        overwrite: whether to replace what exists at `out`.

    The averages are held in memory. Raises `ValueError` for a file without averages, for one of ours, and
    if its rule, count or cadence is unknown or given twice; `FileExistsError` if `out` exists, unless
    `overwrite`; and what `read`, `load` and `save` raise.
    """
    refuse_existing(out, overwrite)
    found = path if isinstance(path, Checkpoint) else read(path, names)
    if found.format == "polyak":
        raise ValueError(f"{found.path} is polyak's own file already: polyak.load reads it")
    if not found.averages:
        raise ValueError(
            f"{found.path} ({found.format}) has live weights and no average; "
            'if these weights are an average, pass role="average" (--as average)'
        )
    for average in found.averages.values():
        _require_content(found, as_lazy(average).specs)
    averager = Averager(
        _held(found),
        _rules(found, rule),
        every=_cadence(found, every, count),
        buffers=dict.fromkeys(copied, "copy") if copied else "auto",
    )
    load(replace(found, rules=averager.rules), averager, count=count)
    save(out, averager, overwrite=overwrite)
    return found


def _rules(
    found: Checkpoint, given: Rule | str | Mapping[str, Rule | str] | None
) -> dict[str, Rule]:
    """The rule of each average, from the file or as given."""
    named = given if isinstance(given, Mapping) else _alone(found, given)
    rules = {name: as_rule(rule) for name, rule in named.items()}
    lines = [f"{name}: {found.rules[name]}" for name in rules if name in found.rules]
    if lines:
        raise ValueError(f"{found.path} names its own rule, so do not pass one; {', '.join(lines)}")
    rules = {**found.rules, **rules}
    has = ", ".join(found.averages)
    if unknown := [name for name in rules if name not in found.averages]:
        raise ValueError(f"{found.path} has no average {', '.join(unknown)}; it has {has}")
    if missing := [name for name in found.averages if name not in rules]:
        raise ValueError(
            f"{found.path}: the format {found.format} does not name the rule of {', '.join(missing)}; "
            "pass the rule of the training (--rule SPEC; polyak.theory.from_library translates a call)"
        )
    return {name: rules[name] for name in found.averages}


def _alone(found: Checkpoint, given: Rule | str | None) -> dict[str, Rule | str]:
    if given is None:
        return {}
    if len(found.averages) > 1:
        has = ", ".join(found.averages)
        raise ValueError(f"{found.path} has the averages {has}: pass the rule of each by its name")
    return dict.fromkeys(found.averages, given)


def _cadence(found: Checkpoint, every: int | None, count: int | None) -> int:
    """The calls per update, which a file that counts calls may not say."""
    clock = found.clock
    if every is None and clock is not None and clock.every is not None:
        return clock.every
    if every is None and count is None and clock is not None and clock.unit == "calls":
        raise ValueError(
            f"{found.path}: the format {found.format} counts update() calls, not updates. Pass every=N "
            "(ema-pytorch: update_every), 1 if each call made an update"
        )
    return 1 if every is None else every


def _held(found: Checkpoint) -> dict[str, Tensor]:
    """Every tensor of the model by name, the live one if the file has it; tied names share an object."""
    tensors: dict[str, Tensor] = {}
    by_origins: dict[Hashable, Tensor] = {}
    live = [] if found.live is None else [found.live]
    for weights in (*live, *found.averages.values()):
        for name in weights:
            if name not in tensors:
                tensors[name] = by_origins.setdefault(weights.origins(name), weights[name])
    return tensors
