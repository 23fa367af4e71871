"""The exact states of averagers in a framework's checkpoint folder.

`folder/averages/<names>.safetensors` is the state of one averager, named after its averages. If it is
sharded it is a folder, `<names>.dcp`, which all ranks write.
"""

from __future__ import annotations

from pathlib import Path

from polyak.averager import Averager
from polyak.checkpoints import load, save

NO_DEEPSPEED = "DeepSpeed keeps the weights where no averager sees them: use FSDP2"
AVERAGES = "averages"
_SUFFIXES = (".safetensors", ".dcp")


def save_state(folder: Path, averager: Averager, *, writes: bool) -> None:
    """Save an averager in a checkpoint folder; `writes` says whether this process writes files."""
    if writes or averager.sharded:
        save(_path(folder, averager, _SUFFIXES[averager.sharded]), averager)


def load_state(
    folder: Path, averager: Averager, *, change_rule: bool = False, cure: str | None = None
) -> None:
    """Load what `save_state` saved on any number of ranks; without a `cure` it may be missing.

    Raises `FileNotFoundError` with the cure if it is, and what `polyak.load` raises.
    """
    for path in (_path(folder, averager, suffix) for suffix in _SUFFIXES):
        if path.exists():
            load(path, averager, change_rule=change_rule)
            return
    there = [p.name for p in (folder / AVERAGES).glob("*") if p.suffix in _SUFFIXES]
    if cure is not None:
        raise FileNotFoundError(
            f"{folder} has no state of the averages {', '.join(averager.rules)} (there: "
            f"{', '.join(sorted(there)) or 'none'}); {cure}"
        )


def _path(folder: Path, averager: Averager, suffix: str) -> Path:
    return folder / AVERAGES / f"{'-'.join(averager.rules)}{suffix}"
