"""Converting: another library's file as one of ours, from which `load` goes on."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from polyak._files import refuse_existing
from polyak.averager import Averager
from polyak.checkpoints._checkpoint import Checkpoint
from polyak.checkpoints._load import load
from polyak.checkpoints._read import read
from polyak.checkpoints._save import save
from polyak.rules import Rule
from polyak.specs import as_rule


def convert(
    path: Path | str,
    out: Path | str,
    rule: Rule | str | Mapping[str, Rule | str] | None = None,
    *,
    names: Sequence[str] | None = None,
    count: int | None = None,
    every: int | None = None,
    copied: Sequence[str] = (),
    overwrite: bool = False,
) -> Checkpoint:
    """Writes a file of ours that goes on where another library's average was; gives what was read.

    It is what `load` of that file and `save` give, without the model: all tensors of floating-point
    and complex dtypes are averaged, integers copied. Whatever of a model's buffers are averaged
    otherwise (`Averager`: but for running statistics they are copied) must be said.

    Args:
        rule: of each average by name, or of the only one, where the file does not tell.
        names: of tensors without names, in their order.
        count: of the updates so far, where the file does not tell.
        every: calls of the library's update function per update, for a file that counts calls.
        copied: patterns of the names of such buffers.

    The averages are held in memory. Raises `ValueError` for a file without averages, one of ours,
    one whose rule, count or cadence is not known or given twice; `FileExistsError` for an `out` that
    exists, unless `overwrite`; and what `read`, `load` and `save` raise.
    """
    refuse_existing(out, overwrite)
    found = read(path, names)
    _require_foreign(found)
    rules = _rules(found, rule)
    averager = Averager(
        _weights(found),
        rules,
        every=_cadence(found, every, count),
        buffers=dict.fromkeys(copied, "copy") if copied else "auto",
    )
    load(path, averager, names=names, count=count)
    save(out, averager, overwrite=overwrite)
    return found


def _require_foreign(found: Checkpoint) -> None:
    if found.format == "polyak":
        raise ValueError(f"{found.path} is polyak's own file already: polyak.load reads it")
    if not found.averages:
        raise ValueError(f"{found.path}: {found.format}, live weights and no average")


def _rules(
    found: Checkpoint, given: Rule | str | Mapping[str, Rule | str] | None
) -> dict[str, Rule]:
    """The rule of each average, by the file or as given."""
    named = given if isinstance(given, Mapping) else _alone(found, given)
    rules = {name: as_rule(rule) for name, rule in named.items()}
    lines = [f"{name}: {found.rules[name]}" for name in rules if name in found.rules]
    if lines:
        raise ValueError(f"{found.path} tells its own rule, so give none; {', '.join(lines)}")
    rules = {**found.rules, **rules}
    has = ", ".join(found.averages)
    if unknown := [name for name in rules if name not in found.averages]:
        raise ValueError(f"{found.path} has no average {', '.join(unknown)}; it has {has}")
    if missing := [name for name in found.averages if name not in rules]:
        raise ValueError(
            f"{found.path}: the format {found.format} does not tell the rule of {', '.join(missing)}; "
            "give it, as it was in training (polyak.theory.equivalents names the libraries' calls)"
        )
    return {name: rules[name] for name in found.averages}


def _alone(found: Checkpoint, given: Rule | str | None) -> dict[str, Rule | str]:
    if given is None:
        return {}
    if len(found.averages) > 1:
        has = ", ".join(found.averages)
        raise ValueError(f"{found.path} has the averages {has}: give the rule of each by its name")
    return dict.fromkeys(found.averages, given)


def _cadence(found: Checkpoint, every: int | None, count: int | None) -> int:
    """The calls per update, which a file that counts calls does not tell."""
    if every is None and count is None and found.clock and found.clock.unit == "calls":
        raise ValueError(
            f"{found.path}: the format {found.format} counts calls, of which each so many made an "
            "update; give every (update_every of ema-pytorch), 1 if each did"
        )
    return 1 if every is None else every


def _weights(found: Checkpoint) -> dict[str, Tensor]:
    """Every tensor of the model by name, live if the file has it; tied ones are one object."""
    held: dict[str, Tensor] = {}
    by_identity: dict[Hashable, Tensor] = {}
    live = [] if found.live is None else [found.live]
    for weights in (*live, *found.averages.values()):
        for name in weights:
            if name not in held:
                tensor, identity = weights[name], weights.identity(name)
                tied = tensor if identity is None else by_identity.setdefault(identity, tensor)
                held[name] = tied
    return held
