"""Reads files that may be hostile, in a process of its own: `python reading_hostile.py FOLDER`.

Of each line of FOLDER/cases it prints what came of it, so that whoever started this knows at which
file it died. Memory is limited, warnings are errors, and no file may take long.
"""

from __future__ import annotations

import hashlib
import json
import resource
import signal
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

import polyak
from corrupting import content, resident_bytes
from polyak.checkpoints import load, read

ROOM = 1_500_000_000
SECONDS = 20
KINDS = ("ema", "several", "one", "ratio")


class TooLongError(BaseException):
    """A file took too long; no reader catches this."""


class Net(nn.Module):
    """The model whose averages the valid files hold."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)


def digest(tensor: torch.Tensor) -> str:
    """A tensor's identity: dtype, shape and every bit."""
    form = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    return hashlib.sha256(form + content(tensor)).hexdigest()[:16]


def read_all(path: Path) -> list[str]:
    """The digests of all tensors that a checkpoint holds."""
    found = read(path, "positions")
    held = [*found.averages.values(), *([found.live] if found.live is not None else [])]
    for rule in found.rules.values():
        str(rule)
    return sorted({digest(weights[name]) for weights in held for name in weights})


def load_all(path: Path, averager: polyak.Averager | polyak.EMA) -> list[str]:
    """Loads; raises `AssertionError` if a refused file changed anything."""
    before = _state(averager.state_dict())
    try:
        load(path, averager)
    except BaseException:
        assert _state(averager.state_dict()) == before, (
            "a file that was refused changed the averager"
        )
        raise
    return []


def _state(state: object) -> object:
    if isinstance(state, torch.Tensor):
        return digest(state)
    if isinstance(state, Mapping):
        return {key: _state(value) for key, value in state.items()}
    return repr(state)


def outcome(path: Path, use: Callable[[Path], list[str]]) -> dict[str, object]:
    """What comes of a file: read, refused as it should be, or a fault."""
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        return {"read": use(path)}
    except (ValueError, OSError) as error:
        if str(path) not in str(error):
            return {"fault": f"the file is not named: {type(error).__name__}: {error!s:.300}"}
        if error.__cause__ or (error.__context__ and not error.__suppress_context__):
            return {"fault": f"two errors: {error!r:.200} after {error.__context__!r:.200}"}
        return {"refused": str(error)[:300]}
    except BaseException as error:
        return {"fault": f"{type(error).__name__}: {error!s:.300}"}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def averager_for(kind: str) -> polyak.Averager | polyak.EMA:
    model = Net()
    if kind == "ema":
        return polyak.EMA(model, beta=0.9)
    if kind == "several":
        return polyak.Averager(model, {"a": "exponential(0.9)", "b": "bema()"})
    return polyak.Averager(
        model, "exponential(ratio(0.9))" if kind == "ratio" else "exponential(0.9)"
    )


def most_bytes() -> int:
    """The most memory that this process had; getrusage would count that of who started it."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def too_long(*_: object) -> None:
    raise TooLongError


def main(folder: Path) -> None:
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", ".* file does not name its rule")
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, too_long)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
    start = resident_bytes()
    averagers = {kind: averager_for(kind) for kind in KINDS}
    for line in (folder / "cases").read_text().splitlines():
        case = json.loads(line)
        path = Path(case["path"])
        results = [outcome(path, read_all)]
        if kind := case.get("load"):
            results.append(outcome(path, lambda path, of=averagers[kind]: load_all(path, of)))  # type: ignore[misc]
        told = {"path": case["path"], "results": results, "memory": most_bytes() - start}
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
