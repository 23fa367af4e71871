"""What the commands on files rest on: comparing, describing and converting, against plain oracles."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import polyak
from corrupting import DTYPES, of_bytes
from polyak import EMA, Averager, checkpoints, theory
from polyak.checkpoints import convert
from polyak.offline import _comparison as comparison
from polyak.offline import compare, describe

NUMBERS = st.floats(-1e6, 1e6, width=32)


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=60), st.integers(1, 7))
def test_the_distances_are_those_of_numpy(pairs: list[tuple[float, float]], piece: int) -> None:
    a, b = (torch.tensor(each) for each in zip(*pairs, strict=True))
    x, y = a.double().numpy(), b.double().numpy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "PIECE", piece)
        (found,) = compare({"w": a}, {"w": b}).tensors
    apart, whole = float(np.linalg.norm(x - y)), float(np.linalg.norm(x))
    wanted = 0.0 if apart == 0 else math.inf if whole == 0 else apart / whole
    assert found.relative == pytest.approx(wanted)
    assert found.largest == float(np.abs(x - y).max())
    assert found.elements == int(np.count_nonzero(x != y))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_equal_themselves_in_every_dtype(dtype: torch.dtype) -> None:
    """Random bytes have NaN, infinities and the largest integers."""
    a = {"w": of_bytes(dtype, (7, 31))}
    assert compare(a, {"w": a["w"].clone()}).equal
    other = of_bytes(dtype, (7, 31), seed=1)
    (found,) = compare(a, {"w": other}).tensors
    assert found.elements and found.relative and found.largest and not found.equal


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint64], ids=str)
def test_integers_are_compared_exactly(dtype: torch.dtype) -> None:
    a = torch.tensor([2**53, 5]).to(dtype)
    assert compare({"n": a}, {"n": torch.tensor([2**53 + 1, 5]).to(dtype)}).tensors[0].elements == 1


@pytest.mark.parametrize(
    ("a", "b", "relative", "elements"),
    [
        ([math.nan, 1.0], [math.nan, 1.0], 0.0, 0),
        ([math.inf, 1.0], [math.inf, 1.0], 0.0, 0),
        ([math.nan, 1.0], [2.0, 1.0], math.inf, 1),
        ([math.inf, 1.0], [-math.inf, 1.0], math.inf, 1),
        ([math.inf, 4.0], [math.inf, 3.0], 0.25, 1),
        ([0.0, 0.0], [-0.0, 0.0], 0.0, 0),
        ([0.0, 0.0], [1e-300, 0.0], math.inf, 1),
        ([3.0 + 4.0j, 0.0], [3.0 + 4.5j, 0.0], 0.1, 1),
        ([], [], 0.0, 0),
    ],
)
def test_numbers_that_are_strange(a: Any, b: Any, relative: float, elements: int) -> None:
    dtype = torch.complex128 if isinstance((a or [0.0])[0], complex) else torch.float64
    (found,) = compare(
        {"w": torch.tensor(a, dtype=dtype)}, {"w": torch.tensor(b, dtype=dtype)}
    ).tensors
    assert found.relative == pytest.approx(relative)
    assert found.elements == elements


def test_the_whole_is_one_vector_of_the_weights() -> None:
    a = {"u": torch.tensor([3.0]), "v": torch.tensor([[4.0]]), "steps": torch.tensor(10**6)}
    b = {"u": torch.tensor([3.0]), "v": torch.tensor([[4.5]]), "steps": torch.tensor(1)}
    assert compare(a, b).relative == pytest.approx(0.1)


def test_names_shapes_and_dtypes_are_differences() -> None:
    a = {"w": torch.ones(2), "x": torch.ones(2), "y": torch.ones(2)}
    b = {"w": torch.ones(2).half(), "x": torch.ones(2, 1), "z": torch.ones(2)}
    found = compare(a, b)
    assert (found.only_a, found.only_b) == (("y",), ("z",))
    assert [each.name for each in found.different] == ["x", "w"]
    assert found.tensors[0].relative is None and found.tensors[1].relative == 0
    assert not found.equal and compare(a, dict(reversed(a.items()))).equal


def test_layout_does_not_matter() -> None:
    a = torch.arange(60_000.0).view(200, 300)
    assert compare({"w": a}, {"w": a.T.contiguous().T}).equal


class Fresh(Mapping[str, Tensor]):
    """Tensors that are made when asked for; it knows how many are alive."""

    alive = 0

    def __init__(self) -> None:
        self.most = 0

    def __getitem__(self, name: str) -> Tensor:
        tensor = torch.zeros(10)
        Fresh.alive += 1
        self.most = max(self.most, Fresh.alive)
        weakref.finalize(tensor, self._gone)
        return tensor

    @staticmethod
    def _gone() -> None:
        Fresh.alive -= 1

    def __iter__(self) -> Iterator[str]:
        return iter(str(i) for i in range(50))

    def __len__(self) -> int:
        return 50


def test_one_tensor_of_each_is_in_memory() -> None:
    gc.collect()
    a, b = Fresh(), Fresh()
    seen: list[tuple[int, int]] = []
    assert compare(a, b, progress=lambda done, total: seen.append((done, total))).equal
    assert max(a.most, b.most) <= 4  # the two of the loop's last turn and of this one
    assert seen[0] == (40, 2000) and seen[-1] == (2000, 2000)


def described(path: Path, held: object) -> Any:
    torch.save(held, path)
    return describe(path)


class TestDescribe:
    def test_before_the_first_update(self, tmp_path: Path) -> None:
        polyak.save(tmp_path / "a.safetensors", Averager(nn.Linear(2, 2), "uniform()"))
        found = describe(tmp_path / "a.safetensors")
        assert (found.count, found.averages, found.tensors) == (0, {}, ())

    def test_the_articles_class(self, tmp_path: Path) -> None:
        ema = EMA(nn.Linear(2, 2), update_after_step=0, update_every=4)
        for _ in range(200):
            ema.update()
        polyak.save(tmp_path / "a.safetensors", ema)
        found = describe(tmp_path / "a.safetensors")
        c = theory.coefficients(ema.rule, [1.0] + [4.0] * 49)
        average = found.averages["average"]
        assert (found.count, found.unit, average.rule) == (200, "calls", str(ema.rule))
        assert average.mean_age == pytest.approx(theory.mean_age(c) * 197 / 50)

    def test_a_clock_of_time(self, tmp_path: Path) -> None:
        """EDM2's power averages: half-life and mean age are shares of the images so far."""
        state = nn.Linear(2, 2).state_dict()
        ema = {"stds": [0.05, 0.1], "emas": [state, state]}
        held = {"state": {"cur_nimg": 10**9}, "net": state, "ema": ema}
        found = described(tmp_path / "edm2.pt", held)
        assert (found.format, found.count, found.unit) == ("edm2", 10**9, "time")
        gamma = polyak.Power.from_relative_std(0.1).gamma
        assert found.averages["0.1"].mean_age == pytest.approx(1e9 / (gamma + 2), rel=1e-3)
        wanted = 1e9 * (1 - 0.5 ** (1 / (gamma + 1)))
        assert found.averages["0.1"].half_life == pytest.approx(wanted, rel=1e-3)

    def test_of_very_long_runs_no_half_life_is_computed(self, tmp_path: Path) -> None:
        tensors = [torch.zeros(2)]
        held = {
            "decay": 0.9,
            "num_updates": 10**8,
            "shadow_params": tensors,
            "collected_params": None,
        }
        average = described(tmp_path / "t.pt", held).averages["average"]
        assert (average.rule, average.half_life) == ("exponential(ratio(0.9))", None)

    def test_running_statistics_are_no_parameters(self, tmp_path: Path) -> None:
        norm = nn.BatchNorm1d(3)
        found = described(tmp_path / "n.pt", {"bn." + n: t for n, t in norm.state_dict().items()})
        assert found.live.parameters == 6 and found.norms == ("bn",)

    def test_tied_weights_of_every_kind(self, tmp_path: Path) -> None:
        shared = torch.randn(4, 4)
        held = {
            "a": shared,
            "b": shared,
            "part": shared[:2],
            "turned": shared.T,
            "none": torch.ones(0),
        }
        assert described(tmp_path / "t.pt", held).live.parameters == 16 + 8 + 16

    def test_tensors_that_are_made_when_asked_for_are_all_counted(self, tmp_path: Path) -> None:
        """They may lie at one address, one after the other."""
        live = nn.Sequential(*[nn.Linear(64, 64) for _ in range(8)])
        averager = Averager(live, "bema()")
        averager.update()
        polyak.save(tmp_path / "b.safetensors", averager)
        assert describe(tmp_path / "b.safetensors").averages["average"].weights.tensors == 16


class TestConvert:
    def test_it_goes_on_as_load_of_the_peers_file_does(self, tmp_path: Path) -> None:
        """Three ways of the same resumption: the file itself, and its conversion."""
        import torch_ema

        torch.manual_seed(0)
        live = nn.Linear(3, 3)
        peer = torch_ema.ExponentialMovingAverage(live.parameters(), 0.9)
        for _ in range(5):
            with torch.no_grad():
                live.weight.add_(torch.randn(3, 3))
            peer.update()
        torch.save(peer.state_dict(), tmp_path / "peer.pt")
        names = [name for name, _ in live.named_parameters()]
        read = convert(tmp_path / "peer.pt", tmp_path / "ours.safetensors", names=names)
        assert read.format == "torch-ema"
        rule = read.rules["average"]
        direct, converted = Averager(live, rule), Averager(live, rule)
        polyak.load(tmp_path / "peer.pt", direct)
        polyak.load(tmp_path / "ours.safetensors", converted)
        for averager in (direct, converted):
            averager.update()
        a, b = direct.average(), converted.average()
        assert direct.clock == converted.clock and all(torch.equal(a[n], b[n]) for n in a)

    def test_the_rule_that_a_file_tells_is_not_changed(self, tmp_path: Path) -> None:
        held = {
            "decay": 0.9,
            "num_updates": 3,
            "shadow_params": [torch.zeros(2)],
            "collected_params": None,
        }
        torch.save(held, tmp_path / "t.pt")
        with pytest.raises(
            ValueError, match="names its own rule, so do not pass one; average: exponential"
        ):
            convert(tmp_path / "t.pt", tmp_path / "o.safetensors", "uniform()", names=["w"])

    def test_each_of_several_averages_needs_its_rule(self, tmp_path: Path) -> None:
        import ema_pytorch

        peer = ema_pytorch.PostHocEMA(
            nn.Linear(2, 2), sigma_rels=(0.05, 0.1), checkpoint_folder=str(tmp_path / "post")
        )
        peer.update()
        torch.save(peer.state_dict(), tmp_path / "p.pt")
        for rule, said in (
            (None, "rule of 0, 1;"),
            ("power(3)", "pass the rule of each by its name"),
        ):
            with pytest.raises(ValueError, match=said):
                convert(tmp_path / "p.pt", tmp_path / "o.safetensors", rule)
        with pytest.raises(ValueError, match="rule of 1;"):
            convert(tmp_path / "p.pt", tmp_path / "o.safetensors", {"0": "power(3)"})

    def test_buffers_that_are_not_said_are_found_at_the_load(self, tmp_path: Path) -> None:
        live = nn.Linear(2, 2)
        live.register_buffer("scale", torch.ones(2))
        torch.save({"model": live.state_dict(), "ema": live.state_dict()}, tmp_path / "b.pt")
        convert(tmp_path / "b.pt", tmp_path / "o.safetensors", "uniform()", count=3)
        with pytest.raises(ValueError, match="scale"):
            polyak.load(tmp_path / "o.safetensors", Averager(live, "uniform()"))
        assert checkpoints.read(tmp_path / "o.safetensors").count == 3
