"""Checkpoints: averages in files, our own and other libraries'.

    polyak.save(path, averager), polyak.load(path, averager)     exact resume; `load` takes other libraries' files too
    checkpoints.read(path)                                       what a file holds: live weights, averages, rules
    checkpoints.export(path, averager)                           an average as plain safetensors
    checkpoints.write_like(out, like, weights)                   weights in the form of another checkpoint
    checkpoints.convert(path, out)                               another library's file as one of ours
    with checkpoints.saving(folder) as place: ...                several files, all complete or none
    checkpoints.save_distributed(folder, {"model": ..., "average": averager})    a training, by all ranks

Nothing here runs code from a file: pickles are read as data, and weights that need their own code are
refused.
"""

from __future__ import annotations

from polyak.checkpoints._checkpoint import Checkpoint, Clock
from polyak.checkpoints._export import convert, export
from polyak.checkpoints._folders import latest, saving
from polyak.checkpoints._like import write_like
from polyak.checkpoints._load import load
from polyak.checkpoints._read import read
from polyak.checkpoints._save import save
from polyak.checkpoints._save_async import Saving, save_distributed_async
from polyak.checkpoints._save_distributed import load_distributed, save_distributed

__all__ = [
    "Checkpoint", "Clock", "Saving", "convert", "export", "latest", "load", "load_distributed",
    "read", "save", "save_distributed", "save_distributed_async", "saving", "write_like",
]  # fmt: skip
