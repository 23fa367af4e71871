"""A sharded training whose ranks kill themselves: `torchrun faults_ranks.py FOLDER SAVING`.

SAVING is "steps" (a folder a step, the last of them written in the background), "newest" (one folder,
exchanged for its successor), or "in_place", which is what `torch.distributed.checkpoint.save` does: the
control that must fail. POLYAK_FAULTS tells where ranks end by SIGKILL, each once: "event:rank:step",
separated by spaces. The first rank says the digest of all that was saved or taken over.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    warnings.simplefilter("ignore")  # torch's own

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import polyak
from polyak import _files as files
from polyak import checkpoints

RULES = {"ema": "exponential(0.9)", "last": "window(3)", "bema": "bema()"}
STEPS, IN_BACKGROUND = 13, range(10, 14)
PATIENCE = 600
FAULTS = frozenset(os.environ.get("POLYAK_FAULTS", "").split())


class Training:
    """A model, sharded or not, its optimizer, its averages, and a step of theirs."""

    def __init__(self, *, sharded: bool) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, 7), nn.Sequential(nn.Tanh(), nn.Linear(7, 8)))
        if sharded:
            fully_shard(self.model[1])
            fully_shard(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.averager = polyak.Averager(self.model, RULES)
        self.steps = 0

    def train(self) -> None:
        """Rows are a function of the step and the rank."""
        rows = torch.Generator().manual_seed(2 * self.steps + dist.get_rank())
        (self.model(torch.randn(4, 5, generator=rows)) - 1).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1

    def state(self) -> dict[str, Any]:
        """What is saved, and what is to be filled where it is loaded."""
        return {
            "model": self.model,
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
            "average": self.averager,
            "step": self.steps,
        }

    def take_over(self, state: dict[str, Any]) -> None:
        """The rest of a state that was filled."""
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])
        self.steps = state["step"]


class Run:
    """A training, and where it is saved."""

    def __init__(self, folder: Path, saving: str) -> None:
        self.folder, self.saving = folder / "run", saving
        self.training = Training(sharded=True)
        self.saved = 0
        """The step that is or was being saved."""
        self._background: Any = None

    def save(self) -> None:
        self.wait()
        self.saved, saving = self.training.steps, self.saving
        place = self.folder / (f"step-{self.saved}" if saving == "steps" else "newest")
        if saving == "in_place":
            save(self._plain_state(), checkpoint_id=place)
        elif saving == "steps" and self.saved in IN_BACKGROUND:
            self._background = checkpoints.save_distributed_async(place, self.training.state())
        else:
            state = self.training.state()
            checkpoints.save_distributed(place, state, overwrite=saving == "newest")

    def wait(self) -> None:
        """For a save in the background."""
        if self._background is not None:
            self._background.result(PATIENCE)

    def resume(self) -> None:
        """From what was saved last, if anything was."""
        place = checkpoints.latest(self.folder, group=dist.group.WORLD)
        if self.saving != "steps" and (self.folder / "newest").exists():
            place = self.folder / "newest"
        if place is not None:
            hidden = len(list(self.folder.glob(".*")))
            self._load(place)
            say(f"resumed {self.training.steps} {self.digest()} beside {hidden} unfinished")

    def _load(self, place: Path) -> None:
        if self.saving == "in_place":
            for _ in range(3):  # torch.distributed.checkpoint fills the slots that there are
                self.training.averager.update()
            state = self._plain_state()
            load(state, checkpoint_id=place)
            self.training.averager.load_state_dict(state["average"])
        else:
            state = self.training.state()
            checkpoints.load_distributed(place, state)
        self.training.take_over(state)

    def _plain_state(self) -> dict[str, Any]:
        """The state for torch.distributed.checkpoint alone."""
        return self.training.state() | {"average": self.training.averager.state_dict()}

    def digest(self) -> str:
        """Of the averages with their clock, the model and the optimizer's state, bit for bit."""
        state = self._plain_state() | {"model": self.training.model.state_dict()}
        held = hashlib.sha256()
        for name, each in sorted(flat(state)):
            held.update(name.encode())
            held.update(each.numpy().tobytes() if isinstance(each, Tensor) else repr(each).encode())
        return held.hexdigest()[:16]


def flat(held: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """What lies in nested mappings, whole; collective."""
    if isinstance(held, dict):
        for key, value in held.items():
            yield from flat(value, f"{name}/{key}")
    else:
        yield name, (held.full_tensor() if isinstance(held, DTensor) else held)


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


class Faults:
    """Ends ranks at events, each once; marks in a folder tell what has happened already."""

    def __init__(self, marks: Path) -> None:
        self.marks = marks
        self.rank = dist.get_rank()
        self.mark(f"pid-{self.rank}", str(os.getpid()))

    def mark(self, name: str, text: str = "") -> None:
        (self.marks / f".{name}").write_text(text)
        (self.marks / f".{name}").rename(self.marks / name)

    def wait_for(self, name: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not (self.marks / name).exists():
            assert time.monotonic() < deadline, f"{name} has not happened"
            time.sleep(0.01)

    def is_due(self, event: str, rank: int, step: int) -> bool:
        fault = f"{event}:{rank}:{step}"
        return fault in FAULTS and not (self.marks / fault).exists()

    def reach(self, event: str, step: int, rank: int | None = None) -> None:
        """Ends this rank's process, or that of another one, if so it was told."""
        rank = self.rank if rank is None else rank
        if self.is_due(event, rank, step):
            print(f"fault {event}:{rank}:{step}", flush=True)
            self.mark(f"{event}:{rank}:{step}")
            os.kill(int((self.marks / f"pid-{rank}").read_text()), signal.SIGKILL)


def plant(faults: Faults, run: Run) -> None:
    """Puts the events of a save into the very functions that write."""
    rank, other = faults.rank, 1 - faults.rank
    writer: Any = filesystem.FileSystemWriter

    def reach(event: str) -> Callable[..., None]:
        return lambda *_, **__: faults.reach(event, run.saved)

    def before_data(*_: Any) -> None:
        if faults.is_due("before_data", rank, run.saved):
            faults.wait_for(f"wrote-{other}-{run.saved}")  # so that these data alone are missing
        faults.reach("before_data", run.saved)

    def after_data(*_: Any) -> None:
        faults.mark(f"wrote-{rank}-{run.saved}")
        faults.reach("after_data", run.saved)

    def before_rename(*_: Any) -> None:
        if faults.is_due("amid_background", other, run.saved + 1):
            faults.wait_for(f"amid_background:{other}:{run.saved + 1}")
        faults.reach("while_other_renames", run.saved, other)
        faults.reach("before_rename", run.saved)

    def amid_removal(folder: Path, **_: Any) -> None:
        if faults.is_due("amid_removal", rank, run.saved):
            min(folder.iterdir()).unlink()
        faults.reach("amid_removal", run.saved)

    wrap(writer, "write_data", before_data, after_data)
    wrap(filesystem, "_write_item", after=reach("amid_data"))
    wrap(filesystem.FileSystem, "rename", before=reach("before_metadata"))
    wrap(files, "_place_folder", before_rename, reach("after_rename"))
    wrap(shutil, "rmtree", before=amid_removal)


def wrap(
    place: Any,
    name: str,
    before: Callable[..., None] = lambda *_, **__: None,
    after: Callable[..., None] = lambda *_, **__: None,
) -> None:
    """Lets something happen before a function and after it, told its arguments."""
    wrapped = getattr(place, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        before(*args, **kwargs)
        result = wrapped(*args, **kwargs)
        after(*args, **kwargs)
        return result

    setattr(place, name, call)


def train(folder: Path, saving: str) -> None:
    run = Run(folder, saving)
    faults = Faults(folder / "marks")
    run.resume()
    plant(faults, run)
    while run.training.steps < STEPS:
        run.training.train()
        faults.reach("train", run.training.steps)
        faults.reach("amid_background", run.training.steps)
        run.training.averager.update()
        run.save()
        say(f"saved {run.training.steps} {run.digest()}")
    run.wait()
    say("done")


if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(seconds=PATIENCE))
    train(Path(sys.argv[1]), sys.argv[2])
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may not let go
