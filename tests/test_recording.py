"""Snapshots and what is made of them: errors known before, and held; stale and foreign ones refused."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import polyak
from models import assert_same, everything, wander
from polyak import Averager, Recorder, checkpoints, synthesize
from polyak.checkpoints._open.files import OpenFile
from polyak.checkpoints._own_format import Stored
from polyak.checkpoints._safetensors.files import TensorFile
from polyak.snapshots import snapshots

STORED = {"0.05": "power(relative_std=0.05)", "0.10": "power(relative_std=0.1)"}
WANTED = {
    "power .075": "power(relative_std=0.075)",
    "power .15": "power(relative_std=0.15)",
    "power .20": "power(relative_std=0.2)",
    "half-life 300": "exponential(half_life=300)",
    "half-life 600": "exponential(half_life=600)",
    "tail": "tail(uniform(), 3200)",
    "uniform": "uniform()",
}


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor], Tensor]:
    """A random walk of 4000 steps, recorded every 100; the averages that were tracked; the end."""
    folder = tmp_path_factory.mktemp("walk")
    generator = torch.Generator().manual_seed(0)
    weights = {"w": torch.zeros(300, dtype=torch.float64)}
    tracked = Averager(weights, WANTED)
    averager = Averager(weights, STORED)
    recorder = Recorder(averager, folder / "snapshots", every=100)
    for step in range(1, 4001):
        weights["w"] += torch.randn(300, generator=generator, dtype=torch.float64)
        averager.update()
        tracked.update()
        recorder.update()
        if step % 200 == 0:
            torch.save({"w": weights["w"].float()}, folder / f"step-{step}.pt")
    return folder, {name: tracked.average(name)["w"] for name in WANTED}, weights["w"]


@pytest.mark.parametrize("name", WANTED)
def test_it_is_the_tracked_average_to_within_the_error_said(
    walk: tuple[Path, dict[str, Tensor], Tensor], name: str
) -> None:
    folder, tracked, live = walk
    made = synthesize(folder / "snapshots", WANTED[name])
    error = (made.average()["w"] - tracked[name]).norm() / (tracked[name] - live).norm()
    assert error == pytest.approx(made.relative_error, rel=0.5, abs=1e-12)
    norm = (made.average()["w"] - tracked[name]).norm() / tracked[name].norm()
    assert norm < 1e-2
    if name in ("power .075", "power .15", "half-life 300", "tail"):
        assert norm < 1e-3, "the middle of the range"


def test_a_stored_average_is_itself(walk: tuple[Path, dict[str, Tensor], Tensor]) -> None:
    made = synthesize(walk[0] / "snapshots", STORED["0.05"])
    assert made.relative_error < 1e-9 and made.amplification == pytest.approx(1, abs=1e-6)
    last = Stored.open(snapshots(walk[0] / "snapshots")[-1].path)
    held = last["averages/0.05/average/w"]
    assert torch.allclose(made.average()["w"], held, rtol=1e-9)


def test_at_an_earlier_time(walk: tuple[Path, dict[str, Tensor], Tensor]) -> None:
    """Between snapshots too: only what was stored by then is used."""
    made = synthesize(walk[0] / "snapshots", "power(relative_std=0.1)", at=2050, max_error=0.5)
    assert made.at == 2050 and max(term.time for term in made.terms) <= 2050
    assert 0.05 < made.relative_error < 0.3
    exact = synthesize(walk[0] / "snapshots", "power(relative_std=0.1)", at=2000)
    assert exact.relative_error < 1e-9


def test_of_plain_checkpoints_alone(walk: tuple[Path, dict[str, Tensor], Tensor]) -> None:
    folder, tracked, live = walk
    files = {step: folder / f"step-{step}.pt" for step in range(200, 4001, 200)}
    made = synthesize(None, WANTED["half-life 600"], checkpoints=files, max_error=0.2)
    error = (made.average()["w"] - tracked["half-life 600"]).norm()
    assert error / (tracked["half-life 600"] - live).norm() == pytest.approx(
        made.relative_error, rel=0.5
    )
    assert made.average()["w"].dtype == torch.float32


def test_of_snapshots_and_checkpoints_it_is_better(
    walk: tuple[Path, dict[str, Tensor], Tensor],
) -> None:
    folder, _, _ = walk
    short = "exponential(half_life=60)"
    files = {step: folder / f"step-{step}.pt" for step in range(3200, 4001, 200)}
    options: dict[str, Any] = {"max_error": 1, "max_amplification": 1e3}
    alone = synthesize(folder / "snapshots", short, **options)
    both = synthesize(folder / "snapshots", short, checkpoints=files, **options)
    assert both.relative_error < alone.relative_error


def test_what_is_hopeless_is_refused_unless_told(
    walk: tuple[Path, dict[str, Tensor], Tensor],
) -> None:
    folder = walk[0] / "snapshots"
    with pytest.raises(ValueError, match=r"relative error .*\(limit 0.05\), amplification"):
        synthesize(folder, "exponential(half_life=3)")
    assert synthesize(folder, "exponential(half_life=3)", max_error=9, max_amplification=1e4)


def test_it_is_written_as_plain_safetensors(
    walk: tuple[Path, dict[str, Tensor], Tensor], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    made = synthesize(walk[0] / "snapshots", "power(relative_std=0.15)")
    seen: list[int] = []
    made.save(tmp_path / "a.safetensors", progress=lambda done, _: seen.append(done))
    assert torch.equal(load_file(tmp_path / "a.safetensors")["w"], made.average()["w"])
    assert seen[-1] == 300 * 8
    with pytest.raises(FileExistsError):
        made.save(tmp_path / "a.safetensors")


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_model_of_every_kind_of_tensor(tmp_path: Path, dtype: torch.dtype | None) -> None:
    """In the model's names and dtypes, tied weights under all their names, integers as they were."""
    torch.manual_seed(0)
    model = everything(torch.bfloat16)
    averager = Averager(model, STORED, select="*")
    tracked = Averager(model, "power(relative_std=0.08)", select="*")
    recorder = Recorder(averager, tmp_path / "s", every=5, dtype=dtype)
    for step in range(100):
        wander(model, step)
        averager.update()
        tracked.update()
        recorder.update()
    made = synthesize(tmp_path / "s", "power(relative_std=0.08)")
    average, wanted = made.average(), tracked.average()
    assert average.keys() == wanted.keys()
    for name, tensor in model.state_dict().items():
        assert average[name].dtype == tensor.dtype
        close = 2e-2 if dtype == torch.bfloat16 else 1e-2
        assert torch.allclose(
            average[name].to(wanted[name].dtype), wanted[name], atol=close, rtol=close
        )
    model.load_state_dict(average)


def test_steps_of_any_length_are_remembered(tmp_path: Path) -> None:
    weights = {"w": torch.zeros(20, dtype=torch.float64)}
    rule = "power(relative_std=0.12)"
    tracked, averager = Averager(weights, rule), Averager(weights, STORED)
    recorder = Recorder(averager, tmp_path, every=64)
    generator = torch.Generator().manual_seed(0)
    for step in range(600):
        weights["w"] += torch.randn(20, generator=generator, dtype=torch.float64)
        elapsed = 1.0 + (step % 7) * 0.5
        averager.update(elapsed)
        tracked.update(elapsed)
        recorder.update()
    found = snapshots(tmp_path)
    assert sum(found[-1].elapsed()) == pytest.approx(found[-1].time)
    assert all(b.time - a.time < 64 + 4 for a, b in pairwise(found))
    recorder.record()
    made = synthesize(tmp_path, rule)
    assert made.at == averager.clock.t
    error = (made.average()["w"] - tracked.average()["w"]).norm() / tracked.average()["w"].norm()
    assert error < 1e-2


def recorded(folder: Path, steps: int, **options: Any) -> tuple[nn.Module, Averager, Recorder]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    averager = Averager(model, STORED)
    recorder = Recorder(averager, folder, every=10, **options)
    train(model, averager, recorder, steps)
    return model, averager, recorder


def train(model: nn.Module, averager: Averager, recorder: Recorder, steps: int) -> None:
    for _ in range(steps):
        wander(model, int(averager.clock.t))
        averager.update()
        recorder.update()


def test_a_resumed_run_leaves_the_snapshots_of_an_undisturbed_one(tmp_path: Path) -> None:
    recorded(tmp_path / "whole", 100)
    model, averager, recorder = recorded(tmp_path / "cut", 45)
    polyak.save(tmp_path / "state.safetensors", averager)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model, averager, recorder, 17)  # lost: the run is killed at step 62 and goes on from 45
    recorder.close()
    model.load_state_dict(state)
    averager = Averager(model, STORED)
    polyak.load(tmp_path / "state.safetensors", averager)
    recorder = Recorder(averager, tmp_path / "cut", every=10, resume=True)
    assert [p.name for p in (tmp_path / "cut").glob("*.stale")] != []
    train(model, averager, recorder, 55)
    whole, cut = snapshots(tmp_path / "whole"), snapshots(tmp_path / "cut")
    assert [s.updates for s in whole] == [s.updates for s in cut] == [1, *range(10, 101, 10)]
    for a, b in zip(whole, cut, strict=True):
        assert a.elapsed() == b.elapsed()
        held = [dict(TensorFile(OpenFile(each.path))) for each in (a, b)]
        assert_same(*held)


def test_snapshots_of_two_runs_are_not_mixed(tmp_path: Path) -> None:
    recorded(tmp_path / "a", 30)
    with pytest.raises(ValueError, match=r"has 4 snapshots.*resume=True"):
        recorded(tmp_path / "a", 30)
    recorded(tmp_path / "b", 50)
    for path in (tmp_path / "b").glob("*0000005*"):
        path.rename(tmp_path / "a" / path.name)
    with pytest.raises(ValueError, match="do not belong together"):
        synthesize(tmp_path / "a", "uniform()")
    with pytest.raises(ValueError, match="do not belong together"):
        model = nn.Linear(3, 2)
        averager = Averager(model, STORED)
        averager.update()
        Recorder(averager, tmp_path / "a", every=10, resume=True)


def test_another_averager_does_not_go_on_in_a_folder(tmp_path: Path) -> None:
    recorded(tmp_path, 30)
    other = Averager(nn.Linear(3, 2), {"0.05": STORED["0.05"]})
    with pytest.raises(ValueError, match=r"another averager.*\n.*extra: 0.10"):
        Recorder(other, tmp_path, every=10, resume=True)
    late = Averager(nn.Linear(3, 2), STORED)
    for _ in range(4):
        late.update(2.5)
    with pytest.raises(ValueError, match="the averager is of the run None"):
        Recorder(late, tmp_path, every=10, resume=True)
    late.run = snapshots(tmp_path)[0].run
    with pytest.raises(ValueError, match=r"was at time 4.0 at update 4, and the averager is at 10"):
        Recorder(late, tmp_path, every=10, resume=True)
    larger = Averager(nn.Linear(4, 2), STORED)
    with pytest.raises(ValueError, match="another averager"):
        Recorder(larger, tmp_path, every=10, resume=True)


def test_a_damaged_snapshot_is_refused(tmp_path: Path) -> None:
    recorded(tmp_path, 30)
    path = snapshots(tmp_path)[-1].path
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    key = next(key for key in header if key.startswith("averages/0.05/average"))
    damaged = 8 + length + header[key]["data_offsets"][0]
    path.write_bytes(whole[:damaged] + bytes([whole[damaged] ^ 4]) + whole[damaged + 1 :])
    made = synthesize(tmp_path, "power(relative_std=0.07)", max_error=1)
    with pytest.raises(ValueError, match="damaged"):
        made.average()
    path.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match=path.name):
        synthesize(tmp_path, "uniform()")


def test_an_update_that_is_taken_back_is_forgotten(tmp_path: Path) -> None:
    """`nonfinite="skip"` leaves updates out: their time counts in the next."""
    weights = {"w": torch.zeros(2)}
    averager = Averager(weights, STORED, nonfinite="skip")
    recorder = Recorder(averager, tmp_path, every=5)
    for step in range(20):
        weights["w"].fill_(math.nan if step in (3, 4, 11) else float(step))
        averager.update()
        recorder.update()
    recorder.record()
    times = snapshots(tmp_path)[-1].elapsed()
    assert times == [1, 1, 1, 3, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1, 1, 1, 1]


def test_a_window_and_a_bema_are_recorded_slot_by_slot(tmp_path: Path) -> None:
    weights = {"w": torch.zeros(50, dtype=torch.float64)}
    averager = Averager(weights, {"window": "window(4)", "bema": "bema()"})
    tracked = Averager(weights, {"mean": "tail(uniform(), 100)", "bema": "bema()"})
    recorder = Recorder(averager, tmp_path, every=20)
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        weights["w"] += torch.randn(50, generator=generator, dtype=torch.float64)
        averager.update()
        tracked.update()
        recorder.update()
    made = synthesize(tmp_path, "tail(uniform(), 100)", max_error=0.2)
    wanted = tracked.average("mean")["w"]
    error = (made.average()["w"] - wanted).norm() / (wanted - weights["w"]).norm()
    assert error == pytest.approx(made.relative_error, rel=0.6)


def test_errors(tmp_path: Path) -> None:
    averager = Averager({"w": torch.full((2,), 1e6)}, STORED)
    for options, message in (
        ({"every": 0}, "Recorder every is 0"),
        ({"every": 5, "dtype": torch.int8}, "Recorder dtype is torch.int8"),
        ({"every": 5, "resume": 1}, "Recorder resume is 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Recorder(averager, tmp_path / "s", **options)
    with pytest.raises(TypeError, match=r"wanted a polyak\.Averager"):
        Recorder(nn.Linear(1, 1), tmp_path / "s", every=1)  # type: ignore[arg-type]
    recorder = Recorder(averager, tmp_path / "s", every=5, dtype=torch.float16)
    assert recorder.update() is None
    with pytest.raises(RuntimeError, match="before the first update"):
        recorder.record()
    averager.update()
    with pytest.raises(ValueError, match=r"has a value of 1e\+06, which torch.float16 cannot hold"):
        recorder.record()
    assert not list((tmp_path / "s").glob("*"))
    with pytest.raises(ValueError, match="no snapshots"):
        synthesize(tmp_path / "s", "uniform()")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        synthesize(tmp_path / "nowhere", "uniform()")
    with pytest.raises(ValueError, match="give a folder of snapshots, or checkpoints"):
        synthesize(None, "uniform()")
    recorded(tmp_path / "t", 30)
    for at, message in ((31, "a time up to 30"), (0.5, "a time of 1 or later"), (-1, "at is -1")):
        with pytest.raises(ValueError, match=message):
            synthesize(tmp_path / "t", "uniform()", at)
    file = tmp_path / "c.pt"
    torch.save({"w": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="the time of an update"):
        synthesize(tmp_path / "t", "uniform()", checkpoints={99: file})
    with pytest.raises(ValueError, match="an integer >= 1"):
        synthesize(None, "uniform()", checkpoints={0: file})
    made = synthesize(tmp_path / "t", "uniform()", checkpoints={30: file}, max_error=1)
    with pytest.raises(ValueError, match="not of the same model"):
        made.average()


def test_read_does_not_take_a_snapshot_for_a_checkpoint_of_nothing(tmp_path: Path) -> None:
    recorded(tmp_path, 30)
    found = checkpoints.read(snapshots(tmp_path)[-1].path)
    assert set(found.averages) == {"0.05", "0.10"} and found.count == 30


def both(folder: Path, seed: int) -> tuple[dict[str, Tensor], Averager, Averager, Recorder, Any]:
    """A run that is recorded, an average of it that is tracked, and how to go on by some steps."""
    weights = {"w": torch.zeros(50, dtype=torch.float64)}
    averager, tracked = Averager(weights, STORED), Averager(weights, "exponential(half_life=30)")
    recorder = Recorder(averager, folder, every=10)
    generator = torch.Generator().manual_seed(seed)

    def go(steps: int) -> None:
        for _ in range(steps):
            weights["w"] += torch.randn(50, generator=generator, dtype=torch.float64)
            averager.update()
            tracked.update()
            recorder.update()

    return weights, averager, tracked, recorder, go


def test_a_run_that_goes_back_in_its_process_leaves_no_other_path(tmp_path: Path) -> None:
    """A state is loaded into the same averager after a loss spike: its recorder notices."""
    weights, averager, tracked, _, go = both(tmp_path / "s", 0)
    go(100)
    states = [averager.state_dict(), tracked.state_dict()]
    states = [torch.load(_saved(tmp_path, state), weights_only=True) for state in states]
    before = weights["w"].clone()
    go(55)
    weights["w"].copy_(before)
    averager.load_state_dict(states[0])
    tracked.load_state_dict(states[1])
    go(60)
    made = synthesize(tmp_path / "s", "exponential(half_life=30)", max_error=1)
    wanted = tracked.average()["w"]
    error = (made.average()["w"] - wanted).norm() / (wanted - weights["w"]).norm()
    assert error < 3 * made.relative_error
    assert sorted(tmp_path.glob("s/*.stale"))


def _saved(folder: Path, state: dict[str, Any]) -> Path:
    path = folder / f"{len(list(folder.iterdir()))}.pt"
    torch.save(state, path)
    return path


def test_another_run_with_the_same_rules_and_steps_does_not_go_on(tmp_path: Path) -> None:
    *_, recorder, go = both(tmp_path / "a", 0)
    go(60)
    recorder.close()
    _, averager, _, _, go_other = both(tmp_path / "b", 1)
    go_other(30)
    with pytest.raises(ValueError, match="the averager is of the run"):
        Recorder(averager, tmp_path / "a", every=10, resume=True)


def test_an_average_of_two_rules_is_not_recorded(tmp_path: Path) -> None:
    weights, averager, _, _, go = both(tmp_path / "a", 0)
    go(20)
    polyak.save(tmp_path / "it", averager)
    other = Averager(weights, {**STORED, "0.05": "uniform()"})
    polyak.load(tmp_path / "it", other, change_rule=True)
    polyak.save(tmp_path / "again", other)
    later = Averager(weights, {**STORED, "0.05": "uniform()"})
    polyak.load(tmp_path / "again", later)
    for mixed in (other, later):
        with pytest.raises(ValueError, match="continued with another rule"):
            Recorder(mixed, tmp_path / "b", every=10)
