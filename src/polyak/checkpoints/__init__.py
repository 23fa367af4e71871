"""Checkpoints: averages in files, our own and other libraries'.

    polyak.save(path, averager), polyak.load(path, averager)     exact resume; `load` takes other libraries' files too
    checkpoints.read(path)                                       what a file holds: live weights, averages, rules
    checkpoints.export(path, averager)                           an average as plain safetensors
    checkpoints.convert(path, out)                               another library's file as one of ours
    with checkpoints.saving(folder) as place: ...                what belongs together, all there or not at all
    checkpoints.save_distributed(folder, {"model": ..., "average": averager})    a training, by all ranks

Nothing here runs code from a file: pickles are read as data, and whatever asks for more is refused.
"""

from __future__ import annotations

from polyak.checkpoints.background import Saving, save_distributed_async
from polyak.checkpoints.checkpoint import Checkpoint, Clock
from polyak.checkpoints.converting import convert
from polyak.checkpoints.exporting import export
from polyak.checkpoints.folders import latest, saving
from polyak.checkpoints.native import save
from polyak.checkpoints.reading import read
from polyak.checkpoints.resuming import load
from polyak.checkpoints.training import load_distributed, save_distributed

__all__ = [
    "Checkpoint",
    "Clock",
    "Saving",
    "convert",
    "export",
    "latest",
    "load",
    "load_distributed",
    "read",
    "save",
    "save_distributed",
    "save_distributed_async",
    "saving",
]
