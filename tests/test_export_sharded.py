"""Exports of sharded averages: the files of one process, all or nothing, in little memory."""

from __future__ import annotations

from pathlib import Path

import pytest

import export_ranks
from launching import require_laws


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4, 6])
def test_exports_of_sharded_averages(tmp_path: Path, world: int) -> None:
    require_laws(export_ranks.__file__, export_ranks.laws_on(world), world, tmp_path)
