"""Read a checkpoint of any library, a file or a folder, as one `Checkpoint`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from polyak._checks import prefixed
from polyak._lazy import LazyTensors
from polyak.checkpoints import _own_format as own
from polyak.checkpoints._checkpoint import Checkpoint, Clock
from polyak.checkpoints._dcp.tensors import DistributedTensors
from polyak.checkpoints._names import Names, canonical, under
from polyak.checkpoints._open.files import FilePart, OpenFile, Verified, all_verified
from polyak.checkpoints._peers import recognise
from polyak.checkpoints._peers.common import Found, count, type_of
from polyak.checkpoints._peers.libraries import diffusers_rules
from polyak.checkpoints._peers.walk import under_keys
from polyak.checkpoints._sniff import POST_HOC, Source, files_beside, sniff
from polyak.checkpoints._torch_save.files import load
from polyak.rules import AVERAGE

_MODEL = "model"  # the key under which training is saved with an averager (`save_distributed`)
_REGISTERED = "custom_checkpoint_*.pkl"  # what accelerate's register_for_checkpointing saves
_SETTINGS_BYTES = 10_000_000


Role = Literal["live", "average"]


def read(
    path: Path | str,
    names: Names = None,
    *,
    key: str | None = None,
    prefix: str | None = None,
    role: Role | None = None,
) -> Checkpoint:
    """Read what a checkpoint holds: live weights, averages, their rules and clock; run none of its code.

    It reads polyak's own files; state dicts of torch.save and safetensors, in one file or several
    with an index, wherever they lie in a file; folders of torch.distributed.checkpoint; and what
    ema-pytorch, torch_ema, torch's `AveragedModel`, diffusers, Lightning, NeMo, timm, Composer,
    MMEngine, EDM2 and torchtitan write. `format` says which it was. An average is known by its own
    layout, or by a word of its key or prefix: ema, swa, avg, average, shadow. `left` says what of the
    file is neither live weights nor an average.

    It reads only headers. A tensor is read when you ask for it, and is then compared with its checksum
    in the file; `Checkpoint.verify` does this for all tensors.

    Args:
        path: a file or a folder.
        names: the names of tensors that a file stores in order and without names (torch_ema,
            diffusers, NeMo), such as `[n for n, p in model.named_parameters() if p.requires_grad]`;
            with "positions" they are called "0", "1", ... Ignored if the file has names.
        key: the part of the file to read: its keys, joined by dots, such as "g_ema".
        prefix: read only tensors whose names begin with it, such as "teacher.", and remove it.
        role: what the weights are, "live" or "average", if the file does not say.

    >>> import tempfile, torch
    >>> place = Path(tempfile.mkdtemp()) / "average.pt"
    >>> model = torch.nn.Linear(2, 1)
    >>> torch.save(torch.optim.swa_utils.AveragedModel(model).state_dict(), place)
    >>> found = read(place)
    >>> found.format, found.clock.count, list(found.averages["average"])
    ('averaged-model', 0, ['weight', 'bias'])
    >>> torch.save({"g": model.state_dict(), "d": model.state_dict()}, place)
    >>> list(read(place, key="g", role="average").averages["average"])
    ['weight', 'bias']

    Raises `ValueError` that names the file: for a file without state dicts; for one with several state
    dicts, with a list, if none is known to be the live weights; for one that needs names; for a damaged
    file; for weights that only code in the file could make. `FileNotFoundError` if nothing is there.
    """
    return read_source(sniff(path), names, key=key, prefix=prefix, role=role)


def read_source(
    source: Source,
    names: Names = None,
    *,
    key: str | None = None,
    prefix: str | None = None,
    role: Role | None = None,
) -> Checkpoint:
    """Make a checkpoint of an opened path; raises as `read`."""
    found = _read(source, names, key, whole=prefix is not None)
    found = found if prefix is None else _under(found, prefix)
    found = found if role is None else _as(found, role)
    if beside := files_beside(source):
        found = replace(found, left={**found.left, **dict.fromkeys(beside, 0)})
    return found if source.opened is None else replace(found, check=source.verify)


def _under(found: Checkpoint, prefix: str) -> Checkpoint:
    """The weights whose names begin with a prefix, without it."""
    live = None if found.live is None else under(found.live, prefix)
    averages = {name: under(average, prefix) for name, average in found.averages.items()}
    averages = {name: average for name, average in averages.items() if average}
    if not live and not averages:
        sets: list[Iterable[str]] = [found.live or {}, *found.averages.values()]
        has = ", ".join(
            dict.fromkeys(f"{name.split('.')[0]!r}" for weights in sets for name in weights)
        )
        raise ValueError(
            f"{found.path}: no name begins with {prefix!r}; names begin with {has:.200}"
        )
    return replace(found, live=live or None, averages=averages)


def _as(found: Checkpoint, role: Role) -> Checkpoint:
    """The weights of a file that holds either live weights or one average, as the other."""
    sets = [found.live] if found.live is not None else []
    sets += found.averages.values()
    if len(sets) != 1:
        has = ", ".join((["live"] if found.live is not None else []) + list(found.averages))
        raise ValueError(
            f"{found.path}: role={role!r} is for a file with one set of weights, and this one has {has}; "
            "leave role out (--as)"
        )
    if role == "live":
        return replace(found, live=sets[0], averages={}, rules={}, ticks={}, clock=None)
    return replace(found, live=None, averages={AVERAGE: sets[0]})


def _read(source: Source, names: Names, key: str | None, *, whole: bool) -> Checkpoint:
    path, opened = source.path, source.opened
    if source.kind == "snapshots":
        raise ValueError(
            f"{path} is a folder of polyak.Recorder's snapshots: read one of them, or make any average "
            "of them with polyak.synthesize"
        )
    if source.kind == "post-hoc":
        return _post_hoc(path)
    if key is None and (stored := own.of_source(source)) is not None:
        found = own.checkpoint(stored)
        return replace(found, live=_live_beside(source, found)) if source.kind == "dcp" else found
    if source.key is not None:
        raise FileNotFoundError(f"{path}: the folder {path.parent} has no averager {source.key!r}")
    top = replace(content(source, names), whole=whole)
    found = recognise(top if key is None else _part(top, key))
    if path.is_dir() and not isinstance(opened, DistributedTensors):
        config = settings(path / "config.json")
        return _diffusers(found, config) if "optimization_step" in config else found
    return found


def _part(found: Found, key: str) -> Found:
    """The part of a file's content under a path of keys."""
    with prefixed(found.path):
        value = under_keys(found.top, key)
    if isinstance(value, (list, tuple)):
        value = {key: value}
    if not isinstance(value, Mapping):
        raise ValueError(f"{found.path}: key={key!r} is a {type_of(value)}, wanted a state dict")
    return replace(found, top=value, keys=key)


def content(source: Source, names: Names = None) -> Found:
    """Read the top of a file or folder; what accelerate saved beside weights lies under its file."""
    found = _content(source, names)
    beside = [] if found.plain == "dcp" else sorted(source.path.glob(_REGISTERED))
    if not beside:
        return found
    contents = {file.name: load(OpenFile(file).whole) for file in beside}
    aside = sum((Counter(loaded.aside) for loaded in contents.values()), Counter(found.aside))
    top = {"": found.top, **{name: loaded.value for name, loaded in contents.items()}}
    return replace(found, top=top, aside=dict(aside))


def _content(source: Source, names: Names) -> Found:
    path, opened = source.path, source.opened
    if isinstance(opened, DistributedTensors):
        parts = opened.parts()
        return Found(path, "dcp", parts[""] if list(parts) == [""] else parts, names)
    if isinstance(opened, LazyTensors):
        plain = "sharded-safetensors" if source.kind == "index" else "safetensors"
        return Found(path, plain, opened, names)
    assert isinstance(opened, FilePart)
    top, aside, _ = load(opened)
    if isinstance(top, (list, tuple)) and any(isinstance(one, Mapping) for one in top):
        top = {str(place): one for place, one in enumerate(top)}
    if not isinstance(top, Mapping) or (type_of(top) in aside and not top):
        raise ValueError(
            f"{path} holds a {type_of(top)}, wanted a dictionary: load it in the project that wrote it, "
            "and save the model's state_dict"
        )
    return Found(path, "state-dict", top, names, aside)


def _live_beside(source: Source, found: Checkpoint) -> LazyTensors | None:
    """The live weights of an averager in a folder: its own, or the model that was saved beside it."""
    assert isinstance(source.opened, DistributedTensors)
    parts = source.opened.parts() if found.live is None and source.key is None else {}
    return canonical(parts[_MODEL]) if _MODEL in parts else found.live


def _post_hoc(path: Path) -> Checkpoint:
    """The snapshots of an ema-pytorch `PostHocEMA`: averages "<index>.<step>", in that order."""
    files = [file for file in path.iterdir() if POST_HOC.fullmatch(file.name)]
    places = {tuple(map(int, file.stem.split("."))): file for file in files}
    found = {f"{i}.{step}": read(places[i, step]) for i, step in sorted(places)}
    averages = {name: snapshot.averages[AVERAGE] for name, snapshot in found.items()}
    steps = {step for _, step in places}
    clock = Clock(steps.pop(), "updates", ahead=1) if len(steps) == 1 else None

    def check() -> Verified:
        return all_verified(snapshot.verify() for snapshot in found.values())

    return Checkpoint(path, "post-hoc-ema", None, averages, {}, clock, check=check)


def settings(config: Path) -> dict[str, Any]:
    """The settings beside weights, in JSON; empty without them, or if they are not a mapping."""
    if not config.is_file():
        return {}
    file = OpenFile(config)
    try:
        values = json.loads(file.read(0, min(file.size, _SETTINGS_BYTES)))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{config}: the settings cannot be read ({str(error)[:200]})") from None
    return values if isinstance(values, dict) else {}


def _diffusers(found: Checkpoint, settings: Mapping[str, Any]) -> Checkpoint:
    """A checkpoint of a folder of `EMAModel.save_pretrained`: a model's folder, whose weights are the average."""
    with prefixed(found.path / "config.json"):
        clock = Clock(count("optimization_step", settings["optimization_step"]))
        rules = diffusers_rules(settings)
    average = found.live if found.live is not None else next(iter(found.averages.values()))
    return Checkpoint(found.path, "diffusers", None, {AVERAGE: average}, rules, clock)
