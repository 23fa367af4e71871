"""What ranks save, load and refuse: `python saving_distributed_ranks.py FOLDER RANK WORLD`.

The file `phase` in the folder says what is to be done: "save" writes `saved` and what is wanted of it,
"load" takes it over on as many ranks as there are now, anything else is the name of a list of laws.
"""

from __future__ import annotations

import resource
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    warnings.simplefilter("ignore")  # torch's own

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as torch_load
from torch.distributed.checkpoint.state_dict_saver import save as torch_save
from torch.distributed.tensor import DTensor

import polyak
import polyak.offline
import replicas_ranks
from polyak import checkpoints
from polyak._ranks.agreement import chosen
from polyak.snapshots import snapshots
from sharding_ranks import (
    RULES,
    Net,
    Training,
    fsdp,
    grid,
    hybrid,
    plain,
    raises,
    run_laws,
    tensor_parallel,
)

OPTIONS: dict[str, Any] = {"rounding": "compensated", "dtype": torch.float32}
OTHER = "tail(exponential(0.8), 2)"


class Saved:
    """A training with two averagers, and what of it is saved."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        replicas = kind == "replicas"
        self.run: Any = replicas_ranks.Training() if replicas else Training(KINDS[kind])
        self.shard: Any = dist.group.WORLD if replicas else None
        self.averager = self.new_averager()
        self.other = polyak.Averager(self.run.model, OTHER, every=2, shard=self.shard)

    def new_averager(self) -> polyak.Averager:
        return polyak.Averager(self.run.model, RULES, shard=self.shard, **OPTIONS)

    def train(self, steps: int) -> None:
        self.run.train(steps, self.averager, self.other)

    def state(self) -> dict[str, Any]:
        model, optimizer = self.run.model, self.run.optimizer
        return {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer),
            "average": self.averager,
            "other": self.other,
            "step": self.run.steps,
        }

    def load(self, path: Path) -> None:
        state = self.state()
        checkpoints.load_distributed(path, state)
        set_optimizer_state_dict(self.run.model, self.run.optimizer, state["optimizer"])
        self.run.steps = state["step"]

    def content(self) -> Any:
        """All of it as whole tensors and numbers; collective."""
        held = self.state()
        average, other = held.pop("average"), held.pop("other")
        held |= {"average": average.state_dict(), "other": other.state_dict()}
        return gathered(held)


KINDS: dict[str, Callable[[Net], Net] | None] = {
    "plain": None,
    "fsdp": fsdp,
    "tensor_parallel": tensor_parallel,
    "grid": grid,
    "hybrid": hybrid,
}


def kinds_on(world: int) -> list[str]:
    return ["fsdp", "tensor_parallel", "replicas", *(["grid", "hybrid"] if world == 4 else [])]


def gathered(held: Any) -> Any:
    """Nested mappings with whole tensors."""
    if isinstance(held, DTensor):
        return held.full_tensor().detach().clone()
    if isinstance(held, Tensor):
        return held.detach().clone()
    return {n: gathered(each) for n, each in held.items()} if isinstance(held, Mapping) else held


def flat(held: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(held, Mapping):
        for key, value in held.items():
            yield from flat(value, f"{name}/{key}")
    else:
        yield name, held


def require_equal(got: Any, wanted: Any) -> None:
    """The same names, numbers and tensors, bit for bit; buffers of replicas are the first rank's."""
    both = dict(flat(got)), dict(flat(wanted))
    assert both[0].keys() == both[1].keys(), both[0].keys() ^ both[1].keys()
    for name, each in both[1].items():
        mine = both[0][name]
        if isinstance(each, Tensor):
            assert mine.dtype == each.dtype and torch.equal(mine, each), name
        else:
            assert mine == each, (name, mine, each)


def save(folder: Path, world: int) -> None:
    """Saves every kind of sharding, and what it holds: then, and three steps later."""
    for kind in kinds_on(world):
        saved, place = Saved(kind), folder / "saved" / f"{kind}-{world}"
        chosen("save", lambda p=place: shutil.rmtree(p, ignore_errors=True))  # type: ignore[misc]
        saved.train(5)
        polyak.save(place / "alone", saved.averager)
        checkpoints.save_distributed(place / "training", saved.state())
        saved_by_torch({"average": saved.averager.state_dict()}, place / "state")
        now = saved.content()
        saved.train(3)
        later = saved.content()
        polyak.save(place / "alone-later", saved.averager)
        checkpoints.save_distributed(place / "training-later", saved.state())
        if dist.get_rank() == 0:
            torch.save({"now": now, "later": later}, place / "wanted.pt")
        print(kind, flush=True)


def saved_by_torch(state: dict[str, Any], place: Path) -> None:
    """As the user's own `save`, buffers being those of the first rank."""
    planner = DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    torch_save(state, checkpoint_id=place, planner=planner)


def load(folder: Path, world: int) -> None:
    """Takes over all that was saved, on however many ranks: sharded in the same way, and in another."""
    for number, place in enumerate(sorted((folder / "saved").iterdir())):
        wanted = torch.load(place / "wanted.pt", weights_only=True)
        was, count = place.name.rsplit("-", 1)
        kinds = [kind for kind in kinds_on(world) if (kind == "replicas") == (was == "replicas")]
        both = dict.fromkeys([was, kinds[number % len(kinds)]])
        for kind in filter(kinds.__contains__, both):
            require_taken_over(kind, place, wanted, same=(was, int(count)) == (kind, world))
        print(place.name, flush=True)


def require_taken_over(kind: str, place: Path, wanted: Any, *, same: bool) -> None:
    new = Saved(kind)
    for path in ("alone", "training/average", "state", "state/average", "file"):
        if (place / path).exists() or "/" in path:
            fresh = new.new_averager()
            polyak.load(place / path, fresh)
            require_equal(gathered(fresh.state_dict()), wanted["now"]["average"])
    new.load(place / "training")
    require_equal(new.content(), wanted["now"])
    if same and kind != "replicas":  # whose gradients DistributedDataParallel sums in another order
        new.train(3)
        require_equal(new.content(), wanted["later"])


EITHER = (KeyError, OSError, RuntimeError, ValueError)


def new_folder() -> Path:
    return Path(chosen("folder", tempfile.mkdtemp))


def on(rank: int) -> bool:
    return dist.get_rank() == rank


def require_only(folder: Path, *names: str) -> None:
    """Nothing else is there, hidden or not, once the first rank is here; seen before any goes on."""
    dist.barrier()
    found = sorted(path.name for path in folder.iterdir())
    dist.barrier()
    assert found == sorted(names), found


class Unwritable:
    """Cannot be pickled."""

    def __reduce__(self) -> Any:
        raise KeyError("not to be written")


@contextmanager
def small_disk(most: int = 4096) -> Iterator[None]:
    """No file may become longer than so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def what_fails_on_one_rank_fails_on_all() -> None:
    """And leaves the last complete folder; the next save is as if nothing had been."""
    saved, folder = Saved("fsdp"), new_folder()
    saved.train(2)
    checkpoints.save_distributed(folder / "good", saved.state())
    wanted = gathered(saved.averager.state_dict())
    for place in ("good", "new"):
        for fails in ("write", "disk", "place"):
            for rank in (0, 1):
                failing_save(saved, folder / place, fails, rank)
                require_only(folder, "good")
    polyak.load(folder / "good" / "average", saved.new_averager())
    with raises((FileExistsError, RuntimeError), "exists"):
        checkpoints.save_distributed(folder / "good", saved.state())
    saved.train(1)
    checkpoints.save_distributed(folder / "good", saved.state(), overwrite=True)
    require_only(folder, "good")
    fresh = saved.new_averager()
    polyak.load(folder / "good" / "average", fresh)
    require_equal(gathered(fresh.state_dict()), gathered(saved.averager.state_dict()))
    assert fresh.count == 3 and wanted["averages"]["ema"]["tick"][0] == 2


def failing_save(saved: Saved, path: Path, fails: str, rank: int) -> None:
    """Of a large model: a page is soon full."""
    state = saved.state() | {f"large {dist.get_rank()}": torch.zeros(4096)}
    if fails == "write" and on(rank):
        state[f"note {rank}"] = Unwritable()
    told = {
        "write": "not to be written",
        "disk": f"File too large: '{path}'",
        "place": f"rank {rank}" if rank else "torch",
    }
    disk = small_disk() if fails == "disk" and on(rank) else nullcontext()
    try:
        if fails == "place":
            unseen(saved, path, rank)
            return
        with disk, raises(EITHER, told[fails], *([] if on(rank) else [f"rank {rank}: "])):
            checkpoints.save_distributed(path, state, overwrite=True)
    finally:
        dist.barrier()


def unseen(saved: Saved, path: Path, rank: int) -> None:
    """A rank that does not see the folder, as without a shared file system."""
    seen = Path.is_dir
    if on(rank):
        Path.is_dir = lambda self: False if self.name.endswith(".part") else seen(self)  # type: ignore[method-assign]
    try:
        with raises(EITHER, "must share the file system"):
            checkpoints.save_distributed(path, saved.state(), overwrite=True)
    finally:
        Path.is_dir = seen  # type: ignore[method-assign]


def ranks_that_disagree_are_refused() -> None:
    saved, folder = Saved("fsdp"), new_folder()
    saved.train(2)
    with saved.averager.applied("ema") if on(1) else nullcontext():
        for save in (polyak.save, save_training):
            with raises(RuntimeError, "inside applied", *(["rank 1: "] if on(0) else [])):
                save(folder / "new", saved.averager)
    if on(1):
        saved.averager.update()
    for save in (polyak.save, save_training):
        told = ("ranks do not agree", "rank 1: ", "average ema: ", "update 2", "update 3")
        with raises(ValueError, *told):
            save(folder / "new", saved.averager)
    for key in ("", "a/b", ".."):
        with raises(ValueError, "an averager's key"):
            checkpoints.save_distributed(folder / "new", {key: saved.averager})
    require_only(folder)


def save_training(path: Path, averager: polyak.Averager) -> None:
    checkpoints.save_distributed(path, {"average": averager})


def what_does_not_fit_is_refused_and_changes_nothing() -> None:
    """Every difference is named, on all ranks, also where one rank alone asks for it."""
    saved, folder = Saved("fsdp"), new_folder()
    saved.train(2)
    checkpoints.save_distributed(folder / "good", saved.state())
    without = {key: each for key, each in saved.state().items() if key != "average"}
    checkpoints.save_distributed(folder / "without", without)
    run = Saved("fsdp")
    run.train(1)
    before = run.content()
    average, other = run.averager, run.other
    narrow = polyak.Averager(run.run.model, RULES, **{**OPTIONS, "dtype": torch.bfloat16})
    rules = polyak.Averager(run.run.model, {**RULES, "ema": "exponential(0.5)"}, **OPTIONS)
    part = polyak.Averager(run.run.model, RULES, select="first.*", **OPTIONS)
    model, wrong = run.state()["model"], gathered(run.state()["model"])
    name, other_name = "last.weight", "first.bias"
    cases: list[tuple[dict[str, Any], str, tuple[str, ...]]] = [
        ({"average": average, "model": model}, "without", ("no averager average", "other")),
        ({"model": {**model, name: torch.zeros(7, 4)}}, "good", (name, "(7, 4)", "(7, 3)")),
        (
            {"model": {n: t.to(torch.bfloat16) for n, t in model.items()}},
            "good",
            (other_name, "bfloat16", "float64"),
        ),
        ({"model": {n: t for n, t in model.items() if n != name}}, "good", ("extra", name)),
        ({"model": {**model, "more": torch.zeros(2)}}, "good", ("missing", "model.more")),
        ({"model": model, "lost": {"a": 1}}, "good", ("missing", "lost.a")),
        ({"average": other, "model": wrong}, "good", ("other averages", "ema")),
        ({"average": rules, "model": wrong}, "good", ("other rules", "ema")),
        ({"model": wrong, "average": narrow}, "good", ("first.weight", "bfloat16")),
        ({"model": wrong, "average": part}, "good", ("extra", "last.weight")),
    ]
    for state, place, told in cases:
        with raises(ValueError, place, *told):
            checkpoints.load_distributed(folder / place, state)
        mine = state if on(1) else {key: run.state()[key] for key in ("model", "optimizer")}
        with raises((ValueError, RuntimeError), *told):
            checkpoints.load_distributed(folder / place, mine)
        require_equal(run.content(), before)
    with raises(ValueError, "average, other", "give one", "good/average"):
        polyak.load(folder / "good", average)
    with raises(FileNotFoundError, "no averager 'third'"):
        polyak.load(folder / "good" / "third", average)
    with raises(ValueError, "missing: ema"):
        polyak.load(folder / "without", average)
    with raises((FileNotFoundError, RuntimeError), ".metadata"):
        checkpoints.load_distributed(folder / "nothing", run.state())


def a_fresh_state_is_no_place_to_load_into() -> None:
    """torch's own `load` fills what is there, and a fresh averager has no slots yet."""
    saved, folder = Saved("fsdp"), new_folder()
    saved.train(2)
    saved_by_torch({"average": saved.averager.state_dict()}, folder / "state")
    fresh = Saved("fsdp").averager
    state = {"average": fresh.state_dict()}
    torch_load(state, checkpoint_id=folder / "state")
    with raises(ValueError, "load_state_dict", "slots []", "wanted ['average'"):
        fresh.load_state_dict(state["average"])
    assert fresh.count == 0
    polyak.load(folder / "state", fresh)
    require_equal(gathered(fresh.state_dict()), gathered(saved.averager.state_dict()))


def saves_go_on_in_the_background() -> None:
    """While the training does; what is written is what was at the call."""
    undisturbed, saved, folder = Saved("fsdp"), Saved("fsdp"), new_folder()
    undisturbed.train(12)
    savings, wanted = [], []
    for number in range(3):
        saved.train(4)
        wanted.append(saved.content())
        savings.append(checkpoints.save_distributed_async(folder / f"step-{number}", saved.state()))
    saved.train(6)
    undisturbed.train(6)
    for saving in savings:
        saving.result(60)
        assert saving.done()
    require_equal(saved.content(), undisturbed.content())
    require_only(folder, *(f"step-{number}" for number in range(3)))
    for number, each in enumerate(wanted):
        fresh = Saved("fsdp")
        fresh.load(folder / f"step-{number}")
        require_equal(fresh.content(), each)


def errors_in_the_background_surface() -> None:
    """From `result()`, and if no one asked for it at the next save; the folder is not there."""
    saved, folder = Saved("fsdp"), new_folder()
    saved.train(2)
    bad = saved.state() | ({"note": Lost()} if on(1) else {"note": 1})
    for asks in (True, False):
        saving = checkpoints.save_distributed_async(
            folder / "bad", {**bad, f"n{dist.get_rank()}": bad["note"]}
        )
        if asks:
            with raises((KeyError, RuntimeError), "not to be written"):
                saving.result()
        else:
            with raises((KeyError, RuntimeError), "not to be written"):
                checkpoints.save_distributed_async(folder / "next", saved.state())
        require_only(folder)
        checkpoints.save_distributed_async(folder / "good", saved.state()).result()
        require_only(folder, "good")
        if on(0):
            shutil.rmtree(folder / "good")
        dist.barrier()
    with raises((KeyError, RuntimeError), "inside applied"), saved.averager.applied("ema"):
        checkpoints.save_distributed_async(folder / "bad", saved.state())
    require_only(folder)


def some_ranks_have_saved_by_themselves_before() -> None:
    """In the background, over a group that the others know nothing of."""
    saved, folder = Saved("fsdp"), new_folder()
    some = dist.new_group(list(range(dist.get_world_size() // 2)))
    model = torch.nn.Linear(3, 2)
    for tensor in model.parameters():
        torch.nn.init.constant_(tensor, 2.0)
    averager = polyak.Averager(model, "uniform()")
    averager.update()
    if dist.get_rank(some) >= 0:
        path = folder / "some"
        checkpoints.save_distributed_async(path, {"average": averager}, group=some).result(60)
    saved.train(1)
    checkpoints.save_distributed_async(folder / "all", saved.state()).result(60)
    require_only(folder, "some", "all")


def a_rank_alone_is_told_so() -> None:
    """It waits as long as its group lets it; what it would have saved is not there."""
    saved, folder = Saved("fsdp"), new_folder()
    saved.train(1)
    impatient = dist.new_group(timeout=timedelta(seconds=3))
    if on(0):
        with raises(
            RuntimeError,
            "save: Another rank never reached this call, or has exited",
            "must make this call",
        ):
            polyak.save(folder / "alone", saved.averager, group=impatient)
    require_only(folder)


class Lost:
    """Can be copied, not pickled."""

    def __deepcopy__(self, memory: Any) -> Lost:
        return self

    def __reduce__(self) -> Any:
        raise KeyError("not to be written")


def the_first_rank_finds_the_latest() -> None:
    saved, folder = Saved("fsdp"), new_folder()
    saved.train(1)
    for step in (9, 10):
        checkpoints.save_distributed(folder / f"step-{step}", saved.state())
    if on(0):
        (folder / "step-11").mkdir()
        (folder / "step-11" / "__0_0.distcp").write_bytes(b"torn")
        (folder / ".step-12.0123456789abcdef.part").mkdir()
    dist.barrier()
    mine = folder if on(0) else folder / "elsewhere"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert checkpoints.latest(mine, group=dist.group.WORLD) == folder / "step-10"
        assert checkpoints.latest(folder) == folder / "step-10"
    assert all("skipped step-11 in" in str(each.message) for each in told)
    assert len(told) == (2 if on(0) else 1)
    assert checkpoints.latest(folder / "elsewhere", group=dist.group.WORLD) is None


def attached_it_follows_the_optimizer() -> None:
    saved, by_hand = Saved("fsdp"), Saved("fsdp")
    attachment = saved.averager.attach(saved.run.optimizer)
    saved.run.train(4)
    by_hand.run.train(4, by_hand.averager)
    require_equal(gathered(saved.averager.state_dict()), gathered(by_hand.averager.state_dict()))
    assert saved.averager.count == 4
    attachment.remove()
    saved.run.train(1)
    assert saved.averager.count == 4


def files_of_others_are_taken_over() -> None:
    """torch's own average of the whole model, by ranks that have a part each."""
    saved, folder = Saved("fsdp"), new_folder()
    saved.run.train(3)
    weights = gathered(saved.run.model.state_dict())
    model = plain()
    model.load_state_dict(weights)
    theirs = torch.optim.swa_utils.AveragedModel(model)
    for _ in range(3):
        theirs.update_parameters(model)
    if on(0):
        torch.save(theirs.state_dict(), folder / "theirs.pt")
    dist.barrier()
    narrow = polyak.Averager(saved.run.model, "uniform()", **OPTIONS)
    with raises(ValueError, "float64", "make the averager with dtype"):
        polyak.load(folder / "theirs.pt", narrow)
    options: list[dict[str, Any]] = [{}, {"rounding": "compensated"}]
    for each in options:
        both = [polyak.Averager(held, "uniform()", **each) for held in (saved.run.model, model)]
        for averager in both:
            polyak.load(folder / "theirs.pt", averager)
        require_equal(gathered(both[0].state_dict()), both[1].state_dict())
        assert both[0].count == 3


def recorded_it_is_what_one_process_records() -> None:
    """Bit for bit: the snapshots, and what is made of them by one rank, or by all together."""
    for dtype in (None, torch.bfloat16):
        run, folder = Training(fsdp), new_folder()
        stored = {"short": "power(relative_std=0.05)", "long": "power(relative_std=0.1)"}
        averager = polyak.Averager(run.model, stored)
        whole_model = {n: t.clone() for n, t in gathered(run.model.state_dict()).items()}
        one = polyak.Averager(whole_model, stored)
        recorder = polyak.Recorder(averager, folder / "ranks", every=4, dtype=dtype)
        recorder_of_one = (
            polyak.Recorder(one, folder / "one", every=4, dtype=dtype) if on(0) else None
        )
        for _ in range(40):
            run.step()
            averager.update()
            recorder.update()
            for name, tensor in gathered(run.model.state_dict()).items():
                whole_model[name].copy_(tensor)
            one.update()
            if recorder_of_one is not None:
                recorder_of_one.update()
        dist.barrier()
        both = [
            synthesized(folder / name, folder / f"{name}.safetensors") for name in ("ranks", "one")
        ]
        assert len(both[0].terms) == len(both[1].terms) > 10
        require_equal(both[0].average(), both[1].average())
        by_all = polyak.synthesize(folder / "ranks", "power(relative_std=0.08)")
        for name, shard_bytes in (("file.safetensors", None), ("files", 300)):
            by_all.save(folder / name, group=dist.group.WORLD, shard_bytes=shard_bytes)
            if on(0):
                by_all.save(folder / f"alone-{name}", shard_bytes=shard_bytes)
            dist.barrier()
            assert content_of(folder / name) == content_of(folder / f"alone-{name}")
        with raises(EITHER, "exists"):
            by_all.save(folder / "file.safetensors", group=dist.group.WORLD)
        with small_disk(64) if on(1) else nullcontext(), raises(EITHER, "too large", "other.saf"):
            by_all.save(folder / "other.safetensors", group=dist.group.WORLD)
        other = polyak.synthesize(folder / "ranks", f"power(relative_std=0.08{dist.get_rank()})")
        with raises(ValueError, "ranks do not agree", "rank 1: ", "file 1: ", "same files"):
            other.save(folder / "other.safetensors", group=dist.group.WORLD)
        files = [folder / f"{name}.safetensors" for name in ("ranks", "one", "file")]
        mean = polyak.offline.average(files, [0.5, 0.2, 0.3])
        mean.write(folder / "mean.safetensors", group=dist.group.WORLD)
        if on(0):
            mean.write(folder / "alone-mean.safetensors")
        dist.barrier()
        assert content_of(folder / "mean.safetensors") == content_of(
            folder / "alone-mean.safetensors"
        )
        mine = [files[0], files[min(dist.get_rank(), 1)]]
        with raises(ValueError, "ranks do not agree", "rank 1: ", "file 2: 0.5 of ", "one.safe"):
            polyak.offline.average(mine).write(folder / "other.safetensors", group=dist.group.WORLD)
        assert not (folder / "other.safetensors").exists()
        last = [folder / "ranks" / "snapshot-0000000040"] * 2
        if dtype is None:
            require_equal(dict(polyak.offline.average(last, which="long")), whole_of(averager))


def whole_of(averager: polyak.Averager) -> Any:
    return gathered(averager.average("long"))


def synthesized(folder: Path, out: Path) -> polyak.offline.Synthesis:
    made = polyak.synthesize(folder, "power(relative_std=0.08)")
    if on(0):
        made.save(out)
    return made


def content_of(path: Path) -> dict[str, bytes]:
    """A file's bytes, or those of all files in a folder."""
    files = [path] if path.is_file() else sorted(path.iterdir())
    return {file.name if path.is_dir() else "": file.read_bytes() for file in files}


def a_recorder_goes_on_in_its_run() -> None:
    """From a state that was saved, on these ranks; later snapshots are set aside, once and again."""
    saved, folder = Saved("fsdp"), new_folder()
    recorder = polyak.Recorder(saved.averager, folder / "run", every=2)
    with raises((ValueError, RuntimeError), "is in use in this process", "close()"):
        saved.run.train(1, saved.averager)
        recorder.update()
        polyak.Recorder(Saved("fsdp").averager, folder / "run", every=2)
    for step in range(2, 10):
        saved.run.train(1, saved.averager)
        recorder.update()
        if step == 5:
            checkpoints.save_distributed(folder / "step-5", saved.state())
    recorder.close()
    for _ in range(2):
        again = Saved("fsdp")
        again.load(folder / "step-5")
        resumed = polyak.Recorder(again.averager, folder / "run", every=2, resume=True)
        for _ in range(6, 10):
            again.run.train(1, again.averager)
            resumed.update()
        resumed.close()
        found = snapshots(folder / "run")
        assert [each.updates for each in found] == [1, 2, 4, 6, 8]
        assert resumed.run == recorder.run
        assert found[-1].elapsed() == [1.0] * 8
        names = sorted(path.suffix for path in (folder / "run").iterdir())
        dist.barrier()
        assert names == ["", "", "", "", "", ".stale", ".stale"]
    require_equal(gathered(again.averager.state_dict()), gathered(saved.averager.state_dict()))


LAWS: dict[str, list[Callable[[], None]]] = {
    "refusals": [
        what_fails_on_one_rank_fails_on_all,
        ranks_that_disagree_are_refused,
        what_does_not_fit_is_refused_and_changes_nothing,
        a_fresh_state_is_no_place_to_load_into,
    ],
    "background": [
        some_ranks_have_saved_by_themselves_before,  # the first: later there is a group of all
        saves_go_on_in_the_background,
        errors_in_the_background_surface,
        the_first_rank_finds_the_latest,
        attached_it_follows_the_optimizer,
        files_of_others_are_taken_over,
        a_rank_alone_is_told_so,
    ],
    "recording": [
        recorded_it_is_what_one_process_records,
        a_recorder_goes_on_in_its_run,
    ],
}


def main(folder: Path, rank: int, world: int) -> None:
    phase = (folder / "phase").read_text()
    if phase in LAWS:
        run_laws(folder, rank, world, LAWS[phase])
    whole = named(partial({"save": save, "load": load}[phase], folder, world), phase)
    run_laws(folder, rank, world, [whole])


def named(law: Any, name: str) -> Callable[[], None]:
    law.__name__ = name
    return law  # type: ignore[no-any-return]


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
