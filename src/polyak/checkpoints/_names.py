"""Names of tensors without the prefixes of wrappers, and for files that store tensors without names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from torch import Tensor

from polyak._engine.tracking import WRAPPERS
from polyak._lazy import Renamed, renamed

Names = Sequence[str] | Literal["positions"] | None
"""The names, in order, of tensors that a file has without names; "positions" calls them "0", "1", ..."""

_PARALLEL = "module."


class NamesNeededError(ValueError):
    """Tensors have no names, and none were given."""


def canonical_names(keys: Iterable[str]) -> dict[str, str]:
    """The name in the plain model -> key, for the keys of a state dict, in their order.

    Names of wrappers (torch.compile, FSDP, activation checkpointing) are left out wherever they
    stand; `module.`, of DistributedDataParallel, at the beginning if every key has it.

    >>> canonical_names(["module._orig_mod.0.weight", "module._orig_mod.0.bias"])
    {'0.weight': 'module._orig_mod.0.weight', '0.bias': 'module._orig_mod.0.bias'}

    Raises `ValueError` for two keys that are one name.
    """
    plain = {key: ".".join(p for p in key.split(".") if p not in WRAPPERS) for key in keys}
    if all(name.startswith(_PARALLEL) for name in plain.values()):
        plain = {key: name.removeprefix(_PARALLEL) for key, name in plain.items()}
    named: dict[str, str] = {}
    for key, name in plain.items():
        if name in named:
            raise ValueError(
                f"the keys {named[name]!r} and {key!r} are both {name!r} without the prefixes that wrappers add: "
                "save the state_dict of one model"
            )
        named[name] = key
    return named


def canonical(held: Mapping[str, Tensor]) -> Renamed:
    """The tensors of a state dict by the plain model's names."""
    return renamed(held, canonical_names(held))


def under(held: Mapping[str, Tensor], prefix: str) -> Renamed:
    """The tensors whose keys begin with the prefix, by the plain model's names for the rest."""
    rests = (key.removeprefix(prefix) for key in held if key.startswith(prefix))
    return renamed(held, {name: prefix + rest for name, rest in canonical_names(rests).items()})


def named(tensors: Mapping[str, Tensor], names: Names) -> Renamed:
    """Tensors in their order, by the names given.

    Raises `NamesNeededError` if there are none, `ValueError` if they do not fit.
    """
    if names is None:
        raise NamesNeededError(
            f"it has {len(tensors)} tensors in the order of a model's parameters, without names: give "
            "names=[...], such as [n for n, p in model.named_parameters() if p.requires_grad]"
        )
    order = [str(i) for i in range(len(tensors))] if names == "positions" else _listed(names)
    if len(order) != len(tensors):
        raise ValueError(
            f"{len(order)} names were given for {len(tensors)} tensors: give the names of the "
            "parameters that were averaged, in the model's order"
        )
    if len(set(order)) < len(order):
        raise ValueError("a name is given twice in names")
    keys = dict(zip(order, tensors, strict=True))
    return renamed(tensors, {name: keys[key] for name, key in canonical_names(order).items()})


def _listed(names: Sequence[str]) -> list[str]:
    if isinstance(names, str):
        raise ValueError(f'names is {names!r}, wanted a list of names, or "positions"')
    return list(names)
