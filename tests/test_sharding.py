"""Sharded models: each rank averages its own parts, and the average is that of one process."""

from __future__ import annotations

from pathlib import Path

import pytest

import docs_ranks
import pipeline_ranks
import replicas_ranks
import sharding_ranks
from launching import require_laws


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_sharded_models(tmp_path: Path, world: int) -> None:
    require_laws(sharding_ranks.__file__, sharding_ranks.laws_on(world), world, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_averages_divided_over_replicas(tmp_path: Path, world: int) -> None:
    require_laws(replicas_ranks.__file__, replicas_ranks.LAWS, world, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_a_model_split_into_stages(tmp_path: Path, world: int) -> None:
    laws = pipeline_ranks.laws_on(world)
    require_laws(pipeline_ranks.__file__, laws, world, tmp_path, seconds=600)


@pytest.mark.slow
def test_the_examples_of_the_docs(tmp_path: Path) -> None:
    require_laws(docs_ranks.__file__, docs_ranks.LAWS, 2, tmp_path, seconds=600)
