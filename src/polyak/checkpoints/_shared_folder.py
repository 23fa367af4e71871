"""Collective saves: what all ranks of a group write into one folder of torch.distributed.checkpoint.

The folder is filled beside its place and renamed when every rank is done: it is there as a whole, or
not at all, and what fails on one rank fails on all. A process alone, without a process group, is a
group of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from warnings import catch_warnings, filterwarnings

import torch.distributed as dist

from polyak import _files as files
from polyak._ranks import agreement as ranks
from polyak._ranks.replicas import sample
from polyak._ranks.shard_geometry import box_of, missing_parts
from polyak._ranks.sharding import is_distributed, local

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

    from polyak._engine.tracking import Tracked

_T = TypeVar("_T")


def alone(group: ProcessGroup | None = None) -> bool:
    """Whether this process has no process group, and none was given."""
    return group is None and not (dist.is_available() and dist.is_initialized())


@contextmanager
def together(call: str, group: ProcessGroup | None) -> Iterator[None]:
    """`ranks.together`, for a process alone too."""
    if alone(group):
        yield
        return
    with ranks.together(call, group):
        yield


def chosen(call: str, choose: Callable[[], _T], group: ProcessGroup | None) -> _T:
    """`ranks.chosen`, for a process alone too."""
    return choose() if alone(group) else ranks.chosen(call, choose, group)


def agree(call: str, told: Mapping[str, object], group: ProcessGroup | None, remedy: str) -> None:
    """`ranks.agree`, for a process alone too."""
    if not alone(group):
        ranks.agree(call, told, group, remedy)


def number(group: ProcessGroup | None) -> int:
    """This process among all ranks."""
    return 0 if alone(group) else dist.get_rank()


def require_one_model(
    call: str, tracked: Mapping[str, Tracked], group: ProcessGroup | None
) -> None:
    """Raises `ValueError` on all ranks where some have the same parts of what are different tensors.

    They would be taken for copies, and one be kept: so stages of a pipeline whose names and shapes
    are equal. Compared are samples of the live weights, among ranks whose parts are all the same.
    Collective.
    """
    if alone(group):
        return
    with together(call, group):
        items = {n: i for n, i in tracked.items() if i.policy == "average" and i.kind != "buffer"}
        where = ranks.digest([(name, _where(name, item.held())) for name, item in items.items()])
        samples = {name: int(sample(local(item.held()))) for name, item in items.items()}
    first: dict[str, tuple[int, str]] = {}
    several = ranks.gathered((where, ranks.digest(samples)), group)
    for rank, (parts, content) in enumerate(several):
        other, wanted = first.setdefault(parts, (rank, content))
        if content != wanted:
            theirs = ranks.gathered(samples, group)
            names = [n for n in theirs[rank] if theirs[rank][n] != theirs[other].get(n)]
            raise ValueError(
                f"{call}: ranks {other} and {rank} have the same part of {', '.join(names[:8])}, with "
                "different content, of which one would be lost: give the group of ranks that share a "
                "model (a stage of a pipeline) as `group=`, and each its own path; if these are "
                "copies of one model, they have come apart"
            )


def _where(name: str, held: Tensor) -> object:
    """Which part of a tensor lies on this rank."""
    return box_of(name, held) if is_distributed(held) else tuple(held.shape)


def save_folder(
    call: str,
    path: Path | str,
    content: Mapping[str, Any],
    *,
    group: ProcessGroup | None,
    overwrite: bool,
) -> None:
    """Writes a folder of torch.distributed.checkpoint; what several ranks have is the lowest one's."""
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
    from torch.distributed.checkpoint.state_dict_saver import save

    class Writer(FileSystemWriter):
        """Writes a rank's parts. Only here are the system's errors seen, which torch.save hides."""

        def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
            with files.naming(Path(path), str(self.path)):
                return super().write_data(plan, planner)

    with together(call, group):
        for name, tensor in _sharded(content):
            _require_box(call, name, tensor)
            require_all_parts(call, name, tensor, group)
    agree(call, {"path": str(path)}, group, "give all ranks one path, or each group its own")
    with _shared_folder(call, Path(path), overwrite, group) as folder, _plain_errors(call, group):
        save(
            dict(content),
            storage_writer=Writer(folder),
            planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True),
            process_group=group,
            no_dist=alone(group),
        )


def load_folder(
    call: str, path: Path | str, content: dict[str, Any], *, group: ProcessGroup | None
) -> None:
    """Reads a folder into the tensors of `content`, and its objects into its places.

    Objects are unpickled: what they are told to run is run.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with _plain_errors(call, group):
        load(
            content,
            storage_reader=FileSystemReader(path),
            process_group=group,
            no_dist=alone(group),
        )


@contextmanager
def _shared_folder(
    call: str, path: Path, overwrite: bool, group: ProcessGroup | None
) -> Iterator[Path]:
    """A folder for all ranks to fill, which appears at `path` when the block ends on all of them.

    What the block raises, it must raise on all ranks.
    """
    with ExitStack() as first:

        def begin() -> Path:
            writing = files.writing_folder(path, overwrite=overwrite)
            return first.enter_context(writing).absolute()

        folder = chosen(call, begin, group)
        with together(call, group):
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"{call}: this rank does not see {folder}, which the first rank made: all ranks "
                    "must share the file system on which they save"
                )
        yield folder
        chosen(call, first.close, group)


def _sharded(held: object, name: str = "") -> Iterator[tuple[str, DTensor]]:
    """The DTensors in nested mappings and lists, by their flat names."""
    if is_distributed(held):
        yield name, held
    within = held.items() if isinstance(held, Mapping) else ()
    for key, value in enumerate(held) if isinstance(held, (list, tuple)) else within:
        yield from _sharded(value, f"{name}.{key}" if name else str(key))


def _require_box(call: str, name: str, tensor: DTensor) -> None:
    """Raises `ValueError` where torch.distributed.checkpoint would put a part at a wrong place.

    It does so for some that are cut twice, into uneven pieces.
    """
    wanted = box_of(name, tensor)
    # The protocol by which torch.distributed.checkpoint asks a tensor for what it stores of it.
    told = [(tuple(each.offsets), tuple(each.sizes)) for each in tensor.__create_chunk_list__()]
    if told != [wanted] and (wanted.numel or any(0 not in shape for _, shape in told)):
        raise ValueError(
            f"{call}: {name} of shape {tuple(tensor.shape)} is cut as {tensor.placements} into "
            f"uneven parts, which torch.distributed.checkpoint stores at wrong places ({told}, "
            f"wanted {wanted}): choose sizes that the ranks divide"
        )


def require_all_parts(call: str, name: str, tensor: DTensor, group: ProcessGroup | None) -> None:
    """Raises `ValueError` where parts lie on ranks that do not save: what is written would lack them."""
    saving = set(dist.get_process_group_ranks(group)) if group is not None else set()
    if saving and (lost := missing_parts(tensor, saving)):
        raise ValueError(
            f"{call}: parts of {name} lie on the ranks {lost[:8]} alone, which are not of the group "
            f"({sorted(saving)[:8]}): give the group of all ranks that share it"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that this process is alone."""
    with catch_warnings():
        filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


@contextmanager
def _plain_errors(call: str, group: ProcessGroup | None) -> Iterator[None]:
    """`CheckpointException`, which `except Exception` does not catch, as the error of the rank.

    A rank that has none gets a `RuntimeError` that tells those of others.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with _quiet() if alone(group) else nullcontext():
            yield
        return
    except CheckpointException as raised:
        failures = {rank: error for rank, (error, _) in raised.failures.items()}
    own = failures.get(0 if alone(group) else dist.get_rank(group))
    if own is not None:
        raise own
    failed = (f"rank {rank}: {type(e).__name__}: {e}" for rank, e in list(failures.items())[:4])
    raise RuntimeError(f"{call}: given up on all ranks, as {'; '.join(failed)}")
