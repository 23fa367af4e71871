"""The plan's arithmetic, byte for byte, against torch's sharding code and polyak's averagers.

Ranks are fake (`plan_ranks.py`), each a process of its own; weights too large for any machine have no
content, and their shapes and places are torch's own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

import polyak
from patience import HANG

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import plan
from plan import (
    BFLOAT16,
    FLOAT32,
    LLAMA_70B,
    MODELS,
    MOVED,
    PAIRS,
    SNAPSHOT,
    SNAPSHOTS,
    UPDATES,
    Model,
    Parameters,
    Spread,
    elements,
    expert_parallel,
    fully_sharded,
    hybrid,
    made,
    rows,
    tensor_parallel,
)
from plan_ranks import ODD

RANKS = Path(__file__).with_name("plan_ranks.py")
PLACES = (0, 0.4, 1)  # of a rank among all
TENSOR = 4
ODD_MODEL = Model("odd", [Parameters(shape) for shape in ODD])


def counted(case: str, given: Any) -> Any:
    """What a process counts on a fake rank."""
    done = subprocess.run(
        [sys.executable, str(RANKS), case, json.dumps(given)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=HANG,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def spread_of(kind: str, size: int, ranks: int) -> Spread:
    if kind == "fully_sharded":
        return fully_sharded(ranks)
    spread: Spread = getattr(plan, kind)(ranks, size)
    return spread


def rank_at(place: float, world: int) -> int:
    return round(place * (world - 1)) if place >= 0 else int(world + place)


def cases_at(worlds: list[int]) -> list[tuple[int, str, int, int]]:
    """Every layout of every model that it can have."""
    found = [(m, "fully_sharded", w, w) for w in worlds for m in range(3)]
    found += [(m, "hybrid", w // 4, w) for w in worlds for m in (0, 1)]
    found += [(m, "tensor_parallel", TENSOR, w) for w in worlds for m in (0, 1)]
    return found + [(2, "expert_parallel", min(w, 64), w) for w in worlds]


@pytest.mark.slow
@pytest.mark.parametrize("place", [*PLACES, -TENSOR])
@pytest.mark.parametrize("worlds", [[8, 64, 512], [4096, 16384]], ids=str)
def test_a_rank_has_the_parts_that_torch_gives_it(worlds: list[int], place: float) -> None:
    """Minus four: the first tensor part of the last rows."""
    cases = [(*case, rank_at(place, case[-1])) for case in cases_at(worlds)]
    for (model, kind, size, world, rank), found in zip(cases, counted("parts", cases), strict=True):
        spread = spread_of(kind, size, world)
        wanted = elements(MODELS[model], spread, rank) * FLOAT32
        assert found["held"] == wanted, (kind, world, rank)
        if kind == "fully_sharded":
            # FSDP2 gives each rank's weights the memory of the fullest; an average has its part alone.
            fullest = elements(MODELS[model], spread, 0) * FLOAT32
            assert found["padded"] == fullest >= wanted


@pytest.mark.slow
def test_the_models_are_those_that_transformers_builds() -> None:
    for model, built in zip(MODELS, counted("models", None), strict=True):
        shapes: Counter[tuple[int, ...]] = Counter()
        for each in model.parameters:
            shapes[each.shape] += each.times
        assert shapes == Counter(map(tuple, built["shapes"]))
        assert built["held"] == elements(model, fully_sharded(64), 3) * FLOAT32


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_averagers_hold_and_save_what_is_planned(place: float) -> None:
    cases = [(world, rank_at(place, world)) for world in (8, 64)]
    for (world, rank), found in zip(cases, counted("averagers", cases), strict=True):
        numel = elements(ODD_MODEL, fully_sharded(world), rank)
        wanted = {"one": FLOAT32, "two": 2 * FLOAT32, "window": 8 * FLOAT32}
        wanted |= {"bfloat16": 2 * BFLOAT16, "saved": 2 * FLOAT32}
        assert found == {name: numel * itemsize for name, itemsize in wanted.items()}


@pytest.mark.slow
@pytest.mark.parametrize("place", [0, 1])
def test_averagers_of_full_size_hold_and_move_what_is_planned(place: int) -> None:
    cases = [
        (1, "tensor_parallel", 8, 4096, 4095 * place),
        (2, "expert_parallel", 64, 16384, 16383 * place),
    ]
    for (model, kind, size, world, rank), found in zip(
        cases, counted("full_size", cases), strict=True
    ):
        numel = elements(MODELS[model], spread_of(kind, size, world), rank)
        assert found == {"two": 2 * numel * FLOAT32, "moved": numel * MOVED}


@given(st.integers(1, 300), st.integers(1, 300))
def test_rows_are_those_of_chunk(length: int, parts: int) -> None:
    found = [rows(length, parts, index) for index in range(parts)]
    chunks = [len(chunk) for chunk in torch.arange(length).chunk(parts)]
    assert found == chunks + [0] * (parts - len(chunks))


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_averages_of_replicas_lie_and_travel_as_planned(place: float) -> None:
    cases = [(world, rank_at(place, world)) for world in (8, 64)]
    for (world, rank), found in zip(cases, counted("replicas", cases), strict=True):
        held, padded = (elements(ODD_MODEL, fully_sharded(world), r) * FLOAT32 for r in (rank, 0))
        assert found == {"held": held, "received": (world - 1) * padded}


@pytest.mark.parametrize("ranks", [1, 7, 64, 512])
def test_all_ranks_have_all_of_it_and_the_first_the_most(ranks: int) -> None:
    for model in (*MODELS, ODD_MODEL):
        spreads = [fully_sharded(ranks)]
        if ranks >= 64:
            spreads += [hybrid(ranks, 16), expert_parallel(ranks, 32)]
        for spread in spreads:
            held = [elements(model, spread, rank) for rank in range(ranks)]
            assert sum(held) == model.numel * spread.copies
            assert max(held) == held[0]


def test_tensor_parallel_ranks_repeat_what_is_not_cut() -> None:
    norms = Model("norms", [p for p in LLAMA_70B.parameters if p.kind == "whole"]).numel
    spread = tensor_parallel(512, 8)
    held = [elements(LLAMA_70B, spread, rank) for rank in range(512)]
    assert sum(held) == LLAMA_70B.numel + 7 * norms


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_snapshots_take_and_give_what_is_planned(pair: tuple[float, float], tmp_path: Path) -> None:
    weights = {"w": torch.zeros(33, 7)}
    averager = polyak.Averager(weights, {str(s): f"power(relative_std={s})" for s in pair})
    every = UPDATES // SNAPSHOTS
    recorder = polyak.Recorder(averager, tmp_path, every=every, dtype=torch.bfloat16)
    for _ in range(UPDATES):
        averager.update()
        recorder.update()
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == SNAPSHOTS + 1
    assert {stored_bytes(path) for path in files} == {33 * 7 * SNAPSHOT}
    for share in (100, 50):
        rule = f"exponential(half_life={UPDATES // share})"
        found = polyak.synthesize(tmp_path, rule, max_amplification=1e6)
        error, amplification = made(rule, pair).split(" %, ")
        assert float(error) == pytest.approx(100 * found.relative_error, rel=5e-3)
        assert float(amplification) == pytest.approx(found.amplification, abs=5e-3)
        if found.amplification > 5.1:
            with pytest.raises(ValueError, match="amplification"):
                polyak.synthesize(tmp_path, rule)
        else:
            polyak.synthesize(tmp_path, rule)


def stored_bytes(path: Path) -> int:
    """The bytes of the averages in a snapshot."""
    with safe_open(path, "pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys() if name.startswith("averages/")]  # noqa: SIM118
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_the_page_is_what_the_command_writes() -> None:
    page = plan.PAGE.read_text()
    assert plan.filled(page) == page
