"""The step, epoch and metrics in a checkpoint's name, and which file of a folder holds its weights.

It is decided here once, for reading a folder and for finding checkpoints in a run.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from polyak._checks import listed
from polyak.checkpoints._dcp.metadata import METADATA

SUFFIX = re.compile(
    r"(\.safetensors|\.nemo|\.ckpt|\.bin|\.pt|\.pth|\.pkl)(\.tar)?$|(?<=^snapshot)(?=\.ep\.\d+$)"
)
"""How the names of files with weights end; those of espnet 1 have no suffix."""
UNFINISHED = {".tmp", ".part", ".incomplete"}
"""How the names of files and folders end whose save is not done."""
WHOLE = ("*.safetensors.index.json", "*.safetensors", "*.bin.index.json", "*model*.bin")
"""Files that make their folder a model's: of several patterns the first counts."""

# Billions are written 1B: 12b is the second of two, or a model's size.
_UNIT = r"(?:[km]|(?-i:B))"
_SHORT = rf"\d+(?:\.\d+)?(?:{_UNIT}|e\d)"
_WORD = r"(?:steps?|iter(?:ation)?s?|updates?)"
_EQUALS = rf"=(-?\d+(?:\.\d+)?(?:e[-+]?\d+|{_UNIT}(?![a-z0-9]))?)"
_PAIR = re.compile(rf"([a-z][\w./ ]*){_EQUALS}", re.IGNORECASE)
# Where no key is a count, a key begins behind one, as in step_100_loss=0.5.
_PAIR_BEHIND = re.compile(
    rf"(?<![a-z])((?=[a-z])(?:(?!(?<![a-z])(?:{_WORD}|epochs?|checkpoint|ckpt|model)[-_]?\d+[-_. ])"
    rf"[\w./ ])+){_EQUALS}",
    re.IGNORECASE,
)
_NOT_COUNTED = re.compile(
    r"-v\d+$|[-_.](rank|shard)[-_]?\d+$|[A-Za-z][A-Za-z_./ ]*=-?(nan|inf)(?![A-Za-z\d])"
)  # the first is Lightning's, where the name was taken
_STEP = re.compile(
    rf"(?:{_WORD}|(?<![a-z])ba)[-_]?((?:{_SHORT})(?![a-z0-9])|\d+(?![\d.]))", re.IGNORECASE
)
_STEP_FIRST = re.compile(rf"(?<!\de)({_SHORT}|\d+)[-_]?{_WORD}(?![\d.])", re.IGNORECASE)
_EPOCH = re.compile(
    r"(?:(?<![a-z])(?:epochs?|ep)[-_.]?(\d+(?:k(?![a-z0-9]))?)|(?<![\d.])(\d+)epoch)(?![\d.])",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"\d+")
# Those with e-5 are not the end of a hash. Behind another letter, as in resnet18.10, or an epoch, it is two numbers, as is ema-pytorch's 0.1000.
_DECIMAL = re.compile(
    r"(?<![a-f\d.])\d+(?:\.\d+)?e-\d\d?(?!\d)|(?:(?:(?<=[^a-z\d.])|(?<=loss|bleu)|(?<=acc|wer|cer|ppl|fid|mse|mae|iou))"
    r"(?<!epoch[-_])(?<!epochs[-_])(?<![^a-z]ep[-_])(?<!^ep[-_])\d+|(?!^0\.\d+$)(?<![\d.])0)"
    r"\.\d+(?![\d.]|e\d|[kmb](?![a-z0-9]))",
    re.IGNORECASE,
)  # a number that counts nothing: a metric, a setting; a unit makes it a count
_COUNT = re.compile(
    r"(?:(tokens?|checkpoint|ckpt|model|^(?=[\d.]+m$))[-_]?)?"
    r"(\d+(?:\.\d+)?[kmb](?![a-z0-9])|(?<![a-z\d.])\d+(?:\.\d+)?e\d(?![a-z0-9])|\d+)",
    re.IGNORECASE,
)
_REPEATS = re.compile(r"(?<![a-z])(best|last|latest|final|end)(?![a-z])", re.IGNORECASE)
_AVERAGES = re.compile(
    r"(?<![a-z])(ave|avg|average|averaged|ema|swa|mean|soup|merged)(?![a-z])", re.IGNORECASE
)
_BESIDE = re.compile(
    r"optim|schedul|scaler|sampler|rng|random_states|(^|_)args|counter|^brain$|dataloader|^init$"
    r"|(^|_)opt\d*$|trainer_state|custom_checkpoint|tokenizer|^initial|^common$",
    re.IGNORECASE,
)
_MODEL = re.compile(r"(pytorch_)?model|.*model_states|model_optim_rng|model_and_optim|weights")
_PART = re.compile(
    r"\d-of-\d|(rank|layer|stage|shard)[-_.]?\d+|^(pp|tp|mp|ep|cp|dp|sdp)_\d+|\.\d\d(\.|$)",
    re.IGNORECASE,
)
_UNITS = {"k": "e3", "m": "e6", "b": "e9"}
_CLOCKS = {"step": "step", "global_step": "step", "epoch": "epoch"}


class Named(NamedTuple):
    """The information in the name of a file or folder.

    `clock` has "step", "epoch" or "number" (the last number of a name that does not say of what).
    `repeats`: it may be a copy of another, such as `last.ckpt`. `averages`: it is made of others.
    `rest`: the name without its suffix, each `key=value`, and its "number".
    """

    clock: dict[str, float]
    metrics: dict[str, float]
    repeats: bool
    averages: bool
    rest: str

    @property
    def numbered(self) -> bool:
        """Whether it may be one of a series, whose order may lie inside."""
        return bool(self.clock) or _NUMBER.search(self.rest) is not None


def named(path: Path) -> Named:
    """Read the step, epoch or number in the name of a file or folder, and its other hints.

    >>> named(Path("epoch=3-step=64-val_loss=0.25.ckpt"))
    Named(clock={'epoch': 3.0, 'step': 64.0}, metrics={'val_loss': 0.25}, repeats=False, averages=False, rest='--')
    >>> [named(Path(name)).clock for name in ("iter_0001000", "12epoch.pth", "checkpoint-500", "7.pt")]
    [{'step': 1000.0}, {'epoch': 12.0}, {'number': 500.0}, {'number': 7.0}]
    """
    stem = SUFFIX.sub("", path.name)
    pairs, rest = _pairs(stem, _PAIR)
    if not pairs.keys() & _CLOCKS.keys():
        pairs, rest = _pairs(stem, _PAIR_BEHIND)
    clock = {_CLOCKS[key]: value for key, value in pairs.items() if key in _CLOCKS}
    metrics = {key: value for key, value in pairs.items() if key not in _CLOCKS}
    hints = bool(_REPEATS.search(rest)), bool(_AVERAGES.search(rest))
    if not clock:
        clock, rest = _counted(rest)
    return Named(clock, metrics, *hints, rest)


def _pairs(stem: str, pattern: re.Pattern[str]) -> tuple[dict[str, float], str]:
    """Each `key=value`, and the name without them."""
    pairs = {key.strip(" -_"): _in_full(value) for key, value in pattern.findall(stem)}
    return pairs, _NOT_COUNTED.sub("", pattern.sub("", stem))


def _in_full(number: str) -> float:
    """The number that is written such as 10, 10k, 1.5M or 1e4."""
    return float(number[:-1] + _UNITS.get(number[-1].lower(), number[-1]))


def _counted(stem: str) -> tuple[dict[str, float], str]:
    """The step, the epoch, or else the last number in a name without `key=value`; the name without that number."""
    found: dict[str, float] = {}
    if epochs := _EPOCH.findall(stem):
        found["epoch"] = _in_full("".join(epochs[-1]))
    if steps := _steps(_EPOCH.sub(" ", stem)):
        found["step"] = _in_full(steps[-1])
    return (found, stem) if found else _last_number(stem)


def _steps(stem: str) -> list[str]:
    """The numbers behind a word such as "step", else those before it.

    Of two, as in 10k-steps-350m, one in millions or billions may be a model's size, the greater.
    """
    behind, before = _STEP.findall(stem), _STEP_FIRST.findall(stem)
    if behind and before and _is_size(None, behind[-1][-1].lower()):
        return [min(behind[-1], before[-1], key=_in_full)]
    return behind or before


def _last_number(stem: str) -> tuple[dict[str, float], str]:
    """The last number that is not a model's size. Sizes are 7b or 350m; if only they are there, the last one's digits.

    A decimal, as in model_0.91, counts nothing: it is a metric or a setting.
    """
    text = _DECIMAL.sub(lambda decimal: " " * len(decimal[0]), stem)
    counts = [
        each.span(2) for each in _COUNT.finditer(text) if not _is_size(each[1], each[2][-1].lower())
    ]
    places = counts or [each.span() for each in _NUMBER.finditer(text)]
    if not places:
        return {}, stem
    start, end = places[-1]
    return {"number": _in_full(text[start:end])}, f"{stem[:start]} {stem[end:]}"


def _is_size(word: str | None, unit: str) -> bool:
    if unit == "b":
        return word is None or "token" not in word.lower()
    return unit == "m" and word is None


def holder(folder: Path, *, deeper: bool = True) -> Path | None:
    """The folder itself, the file in it, or what its only folder with weights has; None if nothing has them.

    Of several files or folders, the one that is called the model's counts.

    Raises `ValueError` where several may be it, where each is a part of the model, and for a save that
    was interrupted.
    """
    if (folder / METADATA).exists():
        return folder
    if any(folder.glob("*.distcp")):
        raise ValueError("it has no .metadata: its save was interrupted")
    if any(any(folder.glob(pattern)) for pattern in WHOLE):
        return folder
    if any(folder.glob("zero/*/fp32.pt")):
        raise ValueError(
            "it is DeepSpeed's universal form, a file for each weight: read the checkpoint that it was made from"
        )
    files = _torch_files(folder)
    within = [each for each in folders(folder) if not is_beside(each)]
    models = [each for each in (*files, *within) if _is_model(each)]
    if len(models) == 1 and deeper:
        inner = holder(models[0], deeper=False) if models[0] in within else models[0]
        if inner is not None:
            return inner
    if files:
        return _chosen(files)
    if parts := [each for each in within if _PART.search(each.name)]:
        _require_one_part(parts)
        return holder(parts[0], deeper=False)
    return _of_folders(within) if deeper else None


def is_beside(path: Path) -> bool:
    """Whether a file or folder lies beside the weights: states of optimizers, schedulers, random numbers, loaders."""
    return bool(_BESIDE.search(SUFFIX.sub("", path.name))) and not _is_model(path)


def _is_model(path: Path) -> bool:
    return bool(_MODEL.fullmatch(SUFFIX.sub("", path.name)))


def folders(folder: Path) -> Iterator[Path]:
    """The folders in a folder that are not hidden."""
    return (path for path in sorted(folder.iterdir()) if path.is_dir() and path.name[0] != ".")


def _of_folders(within: list[Path]) -> Path | None:
    holders = {each: weights for each in within if (weights := holder(each, deeper=False))}
    if len(holders) > 1 and not any(named(each).numbered for each in holders):
        raise ValueError(_several([each.name for each in holders]))
    return next(iter(holders.values())) if len(holders) == 1 else None


def _chosen(files: list[Path]) -> Path | None:
    """The one file of weights, or the one that is called the model's; None for those of a whole run."""
    models = [path for path in files if _is_model(path)]
    for several in (files, models):
        if len(several) == 1:
            return several[0]
    if not models and _is_of_run(files):
        return None
    _require_one_part(models)
    _require_one_part([path for path in files if _PART.search(path.name)])
    raise ValueError(_several([path.name for path in files]))


def _is_of_run(files: list[Path]) -> bool:
    """Whether several files have a step or an epoch, or names that differ in their numbers only."""
    counted = sum(bool({"step", "epoch"} & named(path).clock.keys()) for path in files)
    kinds = Counter(_NUMBER.sub("*", path.name) for path in files if not _PART.search(path.name))
    return counted > 1 or max(kinds.values(), default=0) > 1


def _require_one_part(parts: list[Path]) -> None:
    if len(parts) > 1:
        shown = listed([path.name for path in parts])
        raise ValueError(
            f"it holds parts of one model that several ranks or stages wrote ({shown}): average each part by a "
            "command of its own (--file, its path in the folder), or let their trainer merge them (DeepSpeed: run "
            "zero_to_fp32.py)"
        )


def _several(names: list[str]) -> str:
    return (
        f"it holds {listed(names)}: read the file with the weights; to average a run, name that file "
        f"(file={names[0]!r}, on the command line --file {names[0]})"
    )


def _torch_files(folder: Path) -> list[Path]:
    return [
        path
        for path in sorted(folder.iterdir())
        if SUFFIX.search(path.name) and not is_beside(path) and path.is_file()
    ]
