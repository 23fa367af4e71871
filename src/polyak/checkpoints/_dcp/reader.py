"""A folder that is open here, for torch.distributed.checkpoint to load from.

torch's own reader would read the metadata again, by running them as a pickle, and open every file
again, which may have been replaced by then.
"""

from __future__ import annotations

import io
import os
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from polyak._ranks.shard_geometry import Box
from polyak.checkpoints._dcp.tensors import DistributedTensors


class FolderReader(StorageReader):
    """Gives tensors from an open folder; objects are given as bytes, which the planner unpickles."""

    def __init__(self, folder: DistributedTensors) -> None:
        self._folder = folder

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        entries: dict[str, Any] = {
            name: TensorStorageMetadata(
                TensorProperties(dtype=spec.dtype),
                torch.Size(spec.shape),
                [_chunk(box) for box in self._folder.chunks[name]],
            )
            for name, spec in self._folder.specs.items()
        }
        entries |= {name: BytesStorageMetadata() for name in self._folder.objects}
        return Metadata(entries, planner_data=dict(self._folder.paths), storage_data={})

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            name = item.storage_index.fqn
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, io.BytesIO(self._folder.object_bytes(name)))
                continue
            chunk = item.storage_index.offset or ()
            starts = [a + b for a, b in zip(chunk, item.storage_offsets, strict=True)]
            where = tuple(slice(a, a + n) for a, n in zip(starts, item.lengths, strict=True))
            target = planner.resolve_tensor(item).detach()
            target.copy_(self._folder.read(name, where))
            planner.commit_tensor(item, target)
            self._folder.release(name)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return isinstance(checkpoint_id, (str, os.PathLike))


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.shape))
