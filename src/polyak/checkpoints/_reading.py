"""Reading: a file or a folder of checkpoints, whoever wrote it, as one `Checkpoint`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from polyak.checkpoints import _save as native
from polyak.checkpoints._checkpoint import Checkpoint, Clock
from polyak.checkpoints._distributed import DistributedTensors
from polyak.checkpoints._loading import IndexedTensors, load_pickle
from polyak.checkpoints._mapped import head
from polyak.checkpoints._metadata import METADATA
from polyak.checkpoints._names import Names, canonical
from polyak.checkpoints._own_format import Stored
from polyak.checkpoints._peers import recognise
from polyak.checkpoints._peers.found import Found, count
from polyak.checkpoints._peers.modules import SNAPSHOT
from polyak.checkpoints._peers.positional import diffusers_rules
from polyak.checkpoints._tensorfile import TensorFile, is_safetensors
from polyak.rules import AVERAGE

_MODEL = "model"  # the key under which training is saved with an averager (`save_distributed`)
_SETTINGS_BYTES = 1_000_000
_WEIGHTS = ("*.safetensors.index.json", "*.safetensors", "*.bin.index.json", "*model*.bin")


def read(path: Path | str, names: Names = None) -> Checkpoint:
    """What a checkpoint holds: live weights, averages, their rules and clock; nothing in it is run.

    It reads polyak's own files; state dicts of torch.save and safetensors, in one file or several
    with an index, alone or under the usual keys; folders of torch.distributed.checkpoint; and what
    ema-pytorch, torch_ema, torch's `AveragedModel`, diffusers, Lightning, NeMo, timm, Composer,
    MMEngine, EDM2 and torchtitan write. `format` says which it was.

    `names` are those of tensors that a file has in order only (torch_ema, diffusers, NeMo), such as
    `[n for n, p in model.named_parameters() if p.requires_grad]`; with "positions" they are called
    "0", "1", ... Files with names go by their own.

    >>> import tempfile, torch
    >>> place = Path(tempfile.mkdtemp()) / "average.pt"
    >>> model = torch.nn.Linear(2, 1)
    >>> torch.save(torch.optim.swa_utils.AveragedModel(model).state_dict(), place)
    >>> found = read(place)
    >>> found.format, found.clock.count, list(found.averages["average"])
    ('averaged-model', 0, ['weight', 'bias'])

    Raises `ValueError` naming the file: for a layout that is not known, with what the file holds;
    for one that needs names; for what is damaged or asks for code. `FileNotFoundError` where there
    is nothing.
    """
    path = Path(path)
    if (path / METADATA).exists():
        return _distributed(DistributedTensors(path))
    if (stored := Stored.find(path)) is not None:
        return native.checkpoint(stored)
    if path.is_dir():
        return _folder(path, names)
    if (path.parent / METADATA).is_file() and not path.exists():
        raise FileNotFoundError(f"{path}: the folder {path.parent} has no averager {path.name!r}")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is a pipe or a device, wanted a file or a folder")
    if path.suffix == ".json":
        return recognise(Found(path, "sharded-safetensors", IndexedTensors(path)))
    if is_safetensors(path):
        return recognise(Found(path, "safetensors", TensorFile(path)))
    held = load_pickle(path)
    if not isinstance(held, Mapping):
        raise ValueError(f"{path} holds a {type(held).__name__}, wanted a dictionary")
    return recognise(Found(path, "state-dict", held, names))


def _distributed(folder: DistributedTensors) -> Checkpoint:
    """A folder of torch.distributed.checkpoint: of ours, or of another's layout."""
    parts, stored = folder.parts(), Stored.only(folder)
    if stored is None:
        return recognise(Found(folder.path, "dcp", parts[""] if list(parts) == [""] else parts))
    found = native.checkpoint(stored)
    live = canonical(parts[_MODEL]) if found.live is None and _MODEL in parts else found.live
    return replace(found, path=folder.path, live=live)


def _folder(path: Path, names: Names) -> Checkpoint:
    """A folder of snapshots, or of one set of weights."""
    if snapshots := [file for file in path.iterdir() if SNAPSHOT.fullmatch(file.name)]:
        return _snapshots(path, snapshots)
    found = replace(read(_weights(path), names), path=path)
    settings = _settings(path / "config.json")
    return _diffusers(found, settings) if "optimization_step" in settings else found


def _snapshots(path: Path, files: list[Path]) -> Checkpoint:
    """The snapshots of an ema-pytorch `PostHocEMA`: averages "<index>.<step>", in that order."""
    places = {tuple(map(int, file.stem.split("."))): file for file in files}
    averages = {
        f"{i}.{step}": read(places[i, step]).averages[AVERAGE] for i, step in sorted(places)
    }
    steps = {step for _, step in places}
    clock = Clock(steps.pop(), "updates", ahead=1) if len(steps) == 1 else None
    return Checkpoint(path, "post-hoc-ema", None, averages, {}, clock)


def _weights(path: Path) -> Path:
    """The file that has a folder's weights: one index, or one file."""
    for pattern in _WEIGHTS:
        files = sorted(path.glob(pattern))
        if len(files) == 1:
            return files[0]
        if files:
            names = ", ".join(file.name for file in files)
            raise ValueError(
                f"{path} holds {names}: read one of them, or save an index beside them"
            )
    held = ", ".join(sorted(each.name for each in path.iterdir())[:20]) or "nothing"
    raise ValueError(
        f"{path} holds no weights ({held}); wanted a folder of torch.distributed.checkpoint, or one "
        "with a file or an index of weights"
    )


def _settings(config: Path) -> dict[str, Any]:
    try:
        settings = json.loads(head(config, _SETTINGS_BYTES)) if config.exists() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{config}: no readable settings ({str(error)[:200]})") from None
    return settings if isinstance(settings, dict) else {}


def _diffusers(found: Checkpoint, settings: Mapping[str, Any]) -> Checkpoint:
    """What `EMAModel.save_pretrained` writes: a model's folder, its weights being the average's."""
    try:
        clock = Clock(count("optimization_step", settings["optimization_step"]))
        rules = diffusers_rules(settings)
    except ValueError as error:
        raise ValueError(f"{found.path / 'config.json'}: {error}") from None
    average = found.live if found.live is not None else next(iter(found.averages.values()))
    return Checkpoint(found.path, "diffusers", None, {AVERAGE: average}, rules, clock)
