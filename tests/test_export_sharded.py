"""Exports of sharded averages: the files of one process, all or nothing, in little memory."""

from __future__ import annotations

from pathlib import Path

import pytest

import export_ranks
from test_sharding import said_by


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4, 6])
def test_exports_of_sharded_averages(tmp_path: Path, world: int) -> None:
    wanted = [law.__name__ for law in export_ranks.laws_on(world)]
    for said in said_by(export_ranks.__file__, world, tmp_path, seconds=240):
        assert said.splitlines() == wanted
