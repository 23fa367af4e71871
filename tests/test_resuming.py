"""Going on from other libraries' files: loaded at step 150, at step 300 equal to the library itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import callbacks
from torch import nn

import polyak
from peer_files import SAVED, Net, Run, averaged_by, fit, follow, karras
from polyak import EMA, Averager, Exponential, Power, Uniform
from polyak.rules import Rule
from quick import first_quick
from test_peers_files import CASES, PARAMETERS, TOLERANCE, Case, assert_near, dtype, lightning_warns

__all__ = ["dtype"]


def gone_on(run: Run, rule: Rule, every: int, **options: Any) -> dict[str, torch.Tensor]:
    """The average of a fresh model that loads the file and lives what the library's model lived."""
    model = Net()
    model.load_state_dict(run.live)
    # ema-pytorch and Lightning average all that floats
    averager = Averager(model, rule, every=every, buffers="average")
    polyak.load(run.path, averager, **options)
    for live in run.later:
        model.load_state_dict({name: live[name] for name in model.state_dict()})
        averager.update()
    average = averager.average()
    return {name: average[name] for name in PARAMETERS}


@pytest.mark.parametrize("dtype", first_quick(TOLERANCE), ids=str, indirect=True)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_loaded_average_goes_on_as_the_library_does(
    tmp_path: Path, case: Case, dtype: torch.dtype
) -> None:
    model = Net()
    run = follow(tmp_path / "average.pt", case.make(model, **case.options), model)
    counted = {} if case.clock else {"count": SAVED}
    assert_near(gone_on(run, case.rule, case.every, **counted), run.final, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str, indirect=True)
def test_a_karras_ema_goes_on_as_a_power(tmp_path: Path, dtype: torch.dtype) -> None:
    model = Net()
    run = follow(tmp_path / "it.pt", karras(model, sigma_rel=0.1, update_every=1), model)
    assert_near(gone_on(run, Power.from_relative_std(0.1), 1), run.final, dtype)


@lightning_warns
@pytest.mark.parametrize("dtype", first_quick(TOLERANCE), ids=str, indirect=True)
@pytest.mark.parametrize(
    ("callback", "rule"),
    [
        (lambda: callbacks.EMAWeightAveraging(decay=0.97), Exponential(0.97)),
        (callbacks.WeightAveraging, Uniform()),
    ],
    ids=["ema", "mean"],
)
def test_a_lightning_checkpoint_goes_on(
    tmp_path: Path, callback: Any, rule: Rule, dtype: torch.dtype
) -> None:
    averaging = callback()
    run = fit(tmp_path / "it.ckpt", [averaging], averaged_by(averaging), dtype)
    model = {name: tensor.clone() for name, tensor in run.live.items()}
    averager = Averager(model, rule)
    polyak.load(run.path, averager)
    for live in run.later:
        for name, tensor in model.items():
            tensor.copy_(live[name])
        averager.update()
    average = averager.average()
    trained = [name for name in run.final if run.final[name].is_floating_point()]
    assert trained
    assert_near({name: average[name] for name in trained}, run.final, dtype)


class TestTheArticlesClass:
    def test_an_ema_pytorch_file_goes_into_it(self, tmp_path: Path) -> None:
        model = Net()
        case = CASES["ema-pytorch"]
        run = follow(tmp_path / "average.pt", case.make(model, **case.options), model)
        ema = EMA(Net(), **case.options)
        polyak.load(run.path, ema)
        assert_near(dict(ema.ema_model.named_parameters()), run.average, torch.float32)

    def test_other_files_do_not(self, tmp_path: Path) -> None:
        model = Net()
        case = CASES["averaged-model-swa"]
        run = follow(tmp_path / "average.pt", case.make(model, **case.options), model)
        with pytest.raises(ValueError, match="not the state of this EMA"):
            polyak.load(run.path, EMA(Net()))


class TestWhatAFileDoesNotFit:
    @pytest.fixture
    def run(self, tmp_path: Path) -> Run:
        model, case = Net(), CASES["torch-ema"]
        return follow(tmp_path / "average.pt", case.make(model, **case.options), model)

    def refused(self, path: Path, averager: Averager, said: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=said) as error:
            polyak.load(path, averager, **options)
        assert str(path) in str(error.value)
        assert averager.count == 0

    def test_another_rule(self, run: Run) -> None:
        averager = Averager(Net(), "exponential(0.95)")
        said = r"(?s)other rules.*change_rule=True.*ratio\(0.95\)\), wanted exponential\(0.95\)"
        self.refused(run.path, averager, said)
        polyak.load(run.path, averager, change_rule=True)
        assert averager.count == SAVED + 1

    def test_no_clock(self, tmp_path: Path) -> None:
        case = CASES["torch-ema-constant"]
        model = Net()
        run = follow(tmp_path / "it.pt", case.make(model, **case.options), model)
        averager = Averager(Net(), case.rule)
        self.refused(
            run.path, averager, "does not say how many updates its average had; pass count="
        )
        with pytest.raises(ValueError, match="count is 0"):
            polyak.load(run.path, averager, count=0)

    def test_a_rule_with_other_slots(self, run: Run) -> None:
        said = "needs the slots window.0, window.1: give it a rule of one slot"
        self.refused(run.path, Averager(Net(), "window(2)"), said, change_rule=True)

    def test_names(self, run: Run) -> None:
        rule = CASES["torch-ema"].rule
        self.refused(run.path, Averager(nn.Linear(3, 2), rule), "2 names were given for 4 tensors")
        names = ["a", *PARAMETERS[1:]]
        said = "(?s)other tensors.*missing: body.weight.*extra: a"
        self.refused(run.path, Averager(Net(), rule), said, names=names)

    def test_dtypes(self, run: Run) -> None:
        averager = Averager(Net(), CASES["torch-ema"].rule, dtype=torch.bfloat16)
        self.refused(run.path, averager, "body.weight is torch.float32.*dtype=torch.float32")
        wide = Averager(Net(), CASES["torch-ema"].rule, dtype=torch.float64)
        polyak.load(run.path, wide)
        assert wide.average()["body.weight"].dtype == torch.float64

    def test_a_file_without_an_average(self, tmp_path: Path) -> None:
        torch.save(Net().state_dict(), tmp_path / "it.pt")
        self.refused(tmp_path / "it.pt", Averager(Net(), "uniform()"), "missing: average")

    def test_tensors_that_are_not_tracked_may_be_in_it(self, run: Run) -> None:
        """The file holds all weights; the averager's `select` takes the body's alone."""
        model = torch.optim.swa_utils.AveragedModel(Net())
        model.update_parameters(Net())
        path = run.path.with_name("swa.pt")
        torch.save(model.state_dict(), path)
        averager = Averager(Net(), "uniform()", select="body*")
        polyak.load(path, averager)
        assert set(averager.average()) == {"body.weight", "body.bias"}

    def test_compensated_slots_begin_without_residue(self, run: Run) -> None:
        averager = Averager(Net(), CASES["torch-ema"].rule, rounding="compensated")
        polyak.load(run.path, averager)
        average = averager.average()
        assert all(torch.equal(average[name], run.average[name]) for name in PARAMETERS)


def test_an_averagers_buffers_are_the_files_live_ones_where_the_library_has_none(
    tmp_path: Path,
) -> None:
    """torch's AveragedModel copies buffers; torch_ema has none: then they are the model's of now."""
    model, case = Net(), CASES["torch-ema"]
    run = follow(tmp_path / "average.pt", case.make(model, **case.options), model)
    other = Net()
    other.norm.running_mean = torch.full((2,), 7.0)
    averager = Averager(other, case.rule)
    polyak.load(run.path, averager)
    assert averager.average()["norm.running_mean"].tolist() == [7.0, 7.0]
