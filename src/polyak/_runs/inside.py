"""Numbers that a checkpoint's own file holds beside its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from polyak._runs.tables import Row, numbers
from polyak.checkpoints._open.files import OpenFile
from polyak.checkpoints._peers.common import is_state
from polyak.checkpoints._torch_save.files import is_torch, load
from polyak.checkpoints._torch_save.tensors import StoredTensor

_DEPTH = 4


def inside(path: Path) -> Mapping[str, Any]:
    """Read the top mapping of a file of torch.save without reading a tensor; empty for other files.

    Raises `ValueError` naming the file if it is damaged.
    """
    if not path.is_file():
        return {}
    file = OpenFile(path)
    if not is_torch(file.read(0, 64)):
        return {}
    content = load(file.whole).value
    return content if isinstance(content, dict) and not is_state(content) else {}


def scalars(held: Mapping[str, Any]) -> Row:
    """The numbers beside the weights by dotted name; those in states of optimizers are left out."""
    return dict(numbers(_plain(held)))


def _plain(value: Any, depth: int = _DEPTH) -> Any:
    """The mappings of plain numbers; tensors with one element at the top count as numbers."""
    if isinstance(value, StoredTensor):
        return value.read().item() if depth == _DEPTH - 1 and value.spec.numel == 1 else None
    if isinstance(value, dict) and depth and not is_state(value):
        return {key: _plain(part, depth - 1) for key, part in value.items() if _counts(key)}
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        return [_plain(value[-1], depth - 1)]
    return value


def _counts(key: object) -> bool:
    return not (isinstance(key, str) and ("optimizer_states" in key or key == "optimizer"))


def scores(held: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    """(metric, the file's name, its score) of what Lightning's `ModelCheckpoint` remembers."""
    callbacks = held.get("callbacks")
    for state in callbacks.values() if isinstance(callbacks, dict) else ():
        best = state.get("best_k_models") if isinstance(state, dict) else None
        monitor = state.get("monitor") if isinstance(state, dict) else None
        if isinstance(best, dict) and isinstance(monitor, str):
            for path, score in best.items():
                number = score.read().item() if isinstance(score, StoredTensor) else score
                yield monitor, str(path).replace("\\", "/").rpartition("/")[2], float(number)


def epochs(held: Mapping[str, Any]) -> list[Row]:
    """The rows of espnet's reporter, `{"stats": {epoch: {"valid": {"loss": ...}}}}`."""
    reporter = held.get("reporter")
    stats = reporter.get("stats") if isinstance(reporter, dict) else None
    of_epochs = stats.items() if isinstance(stats, dict) else ()
    return [{"epoch": float(n), **dict(numbers(row))} for n, row in of_epochs if type(n) is int]
