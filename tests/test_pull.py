"""Pulling the live weights towards their average: parity with plain loops, exactness, refusals."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import polyak
from models import Everything
from polyak import Averager, Pull
from polyak.rules import Bema, Rule
from polyak.theory import feedback
from rule_examples import RULE_EXAMPLES, each_rule

RULES = [rule for examples in RULE_EXAMPLES.values() for rule in examples]


def trained(rule: Rule | str, kind: torch.dtype = torch.float64, **options: Any) -> Averager:
    """An averager of random weights that have moved at random three times."""
    torch.manual_seed(0)
    weights = {name: torch.randn(300).to(kind) for name in "ab"}
    averager = Averager(weights, rule, **options)
    for _ in range(3):
        for tensor in weights.values():
            tensor.add_(torch.randn(300).to(kind))
        averager.update()
    return averager


def tensors_of(averager: Averager) -> dict[str, Tensor]:
    return {item.name: item.local().clone() for item in averager.tracked}


@pytest.mark.parametrize("fraction", [0.1, 0.7, 1.0, 1])
@pytest.mark.parametrize("rule", each_rule(RULES), ids=str)
def test_every_rule_pulls_as_a_plain_lerp(rule: Rule, fraction: float) -> None:
    averager = trained(rule)
    before, average = tensors_of(averager), averager.average()
    averager.pull(fraction)
    for name, tensor in tensors_of(averager).items():
        wanted = torch.lerp(before[name], average[name], fraction)
        assert torch.equal(tensor, average[name] if fraction == 1 else wanted)
        if not isinstance(rule, Bema):  # its average has a term in the live weights
            assert torch.equal(averager.average()[name], average[name])


DTYPES = [
    (torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.float64),
    (torch.float64, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16),
]  # fmt: skip


@pytest.mark.parametrize(("weights", "slots"), DTYPES)
def test_it_computes_in_the_wider_dtype_and_rounds_once(
    weights: torch.dtype, slots: torch.dtype
) -> None:
    averager = trained("exponential(0.9)", weights, dtype=slots)
    before, average = tensors_of(averager), averager.average()
    averager.pull(0.3)
    wide = torch.promote_types(weights, slots)
    for name, tensor in tensors_of(averager).items():
        wanted = torch.lerp(before[name].to(wide), average[name].to(wide), 0.3).to(weights)
        assert tensor.dtype == weights and torch.equal(tensor, wanted)


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_of_one_byte_are_pulled_with_the_others(kind: torch.dtype) -> None:
    weights = {"a": torch.ones(3), "b": torch.ones(3).to(kind)}
    averager = Averager(weights, "uniform()")
    averager.update()
    for tensor in weights.values():
        tensor.copy_(torch.full((3,), 3.0))
    averager.pull(0.5)
    assert [tensor.tolist() for tensor in weights.values()] == [[2.0] * 3] * 2


def test_of_a_model_it_moves_what_is_averaged_once_and_in_place() -> None:
    torch.manual_seed(0)
    model = Everything()
    averager = Averager(model, {"fast": "exponential(0.5)", "slow": "exponential(0.9)"})
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
            model.norm.running_mean.add_(1.0)  # type: ignore[union-attr]
            model.spectral_u.add_(1.0)
        averager.update()
    before = {name: tensor.clone() for name, tensor in model.state_dict(keep_vars=True).items()}
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict(keep_vars=True).items()}
    slow = averager.average("slow")
    averager.pull(0.25, "slow")
    policies = {n: item.policy for item in averager.tracked for n in (item.name, *item.aliases)}
    for name, tensor in model.state_dict(keep_vars=True).items():
        moved = policies[name] == "average"
        wanted = torch.lerp(before[name], slow[name], 0.25) if moved else before[name]
        assert torch.equal(tensor, wanted), name
        assert tensor.data_ptr() == places[name]
    assert {policies["norm.running_mean"], policies["head.weight"]} == {"average"}
    assert not torch.equal(model.norm.running_mean, before["norm.running_mean"])  # type: ignore[arg-type]
    assert model.head.weight is model.embedding.weight


def test_a_constant_and_its_infinities_stay_bit_for_bit() -> None:
    weights = {"w": torch.tensor([0.1, math.inf, -math.inf, 3e-40])}
    averager, kept = Averager(weights, "exponential(0.9)"), weights["w"].clone()
    for _ in range(3):
        averager.update()
        averager.pull(0.3)
    assert torch.equal(weights["w"], kept)


METHODS: dict[str, dict[str, Any]] = {
    "Switch-EMA": {"decay": 0.9, "pull": 1.0, "every": 10},
    "Lookahead": {"decay": 0.5 ** (1 / 5), "pull": 1.0, "every": 5, "update_every": 5},
    "PACE": {"decay": 0.9, "pull": 0.2, "with_step": True},
    "weak pull": {"decay": 0.9, "pull": 0.1},
}


def train(method: dict[str, Any], weights: Tensor) -> Averager:
    """SGD on a quadratic with the method, as a user writes it; PACE pulls before the step, by hand."""
    every, cadence = method.get("every", 1), method.get("update_every", 1)
    rule, parameter = f"exponential({method['decay']})", nn.Parameter(weights)
    by_hand = method.get("with_step", False)
    pull = None if by_hand else Pull(method["pull"], every=every // cadence)
    averager = Averager({"w": parameter}, rule, every=cadence, pull=pull)
    if cadence > 1:  # Lookahead's slow weights begin as the model's
        averager.begin()
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        noise = torch.randn(weights.shape, generator=generator, dtype=weights.dtype)
        (parameter.square().sum() / 2 + (noise * parameter).sum()).backward()
        if by_hand and averager.count:
            averager.pull(method["pull"])
        optimizer.step()
        optimizer.zero_grad()
        averager.update()
    return averager


@pytest.mark.parametrize("name", METHODS)
def test_a_loop_is_the_plain_script_and_has_the_theorys_variance(name: str) -> None:
    """A plain loop gives the same weights; over 10 000 runs the variances are `feedback`'s."""
    method, size = METHODS[name], 10_000
    averager = train(method, torch.zeros(size, dtype=torch.float64))
    every, cadence = method.get("every", 1), method.get("update_every", 1)
    live = torch.zeros(size, dtype=torch.float64)
    average = live if cadence > 1 else None
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 151):
        gradient = live + torch.randn(live.shape, generator=generator, dtype=torch.float64)
        if method.get("with_step") and average is not None:
            live = live.lerp(average, method["pull"])
        live = live - 0.1 * gradient
        if step % cadence == 0:
            fraction = 1 - method["decay"] ** cadence
            average = live if average is None else average.lerp(live, fraction)
        if average is not None and not method.get("with_step") and step % every == 0:
            live = live.lerp(average, method["pull"])
    assert average is not None
    torch.testing.assert_close(averager.average()["w"], average, rtol=1e-12, atol=1e-14)
    now = averager.tracked[0].local().detach()
    torch.testing.assert_close(now, live, rtol=1e-12, atol=1e-14)
    found = feedback(0.1, **method)
    assert float(now.square().mean()) == pytest.approx(found.live, rel=0.06)
    assert float(average.square().mean()) == pytest.approx(found.average, rel=0.06)


def test_a_run_that_is_resumed_pulls_on() -> None:
    averager = trained("exponential(0.9)")
    other = Averager(tensors_of(averager), averager.rule)
    other.load_state_dict(averager.state_dict())
    for each in (averager, other):
        each.pull(0.5)
    assert all(torch.equal(tensors_of(other)[n], t) for n, t in tensors_of(averager).items())


@pytest.mark.parametrize("fraction", [0, -0.1, 1.1, math.nan, "1", True, None])
def test_a_wrong_fraction_is_refused(fraction: Any) -> None:
    averager = trained("exponential(0.9)")
    before = tensors_of(averager)
    with pytest.raises(ValueError, match=r"fraction is .*, wanted a number in \(0, 1\]"):
        averager.pull(fraction)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(averager).items())


def test_a_pull_at_the_wrong_time_is_refused() -> None:
    averager = Averager({"w": torch.ones(2)}, "exponential(0.9)")
    with pytest.raises(RuntimeError, match="pull"):
        averager.pull(0.5)
    averager.update()
    with averager.applied(), pytest.raises(RuntimeError, match="pull"):
        averager.pull(0.5)
    with pytest.raises(KeyError, match="slow"):
        averager.pull(0.5, "slow")


# As an option


OPTIONS: list[dict[str, Any]] = [
    {}, {"every": 3}, {"nonfinite": "skip"}, {"dtype": torch.float64}, {"rounding": "compensated"},
    {"begun": True, "every": 2}, {"module": True}, {"attached": True}, {"attached": True, "skips": True},
]  # fmt: skip


class Pulled:
    """A network that trains with an averager: what `pull=` must do, or `averager.pull` by hand."""

    def __init__(self, options: dict[str, Any], pull: Pull | None) -> None:
        kinds = {"begun", "module", "attached", "skips"}
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.5)
        rules = {"fast": "exponential(0.5)", "slow": "uniform()"}
        own = {key: value for key, value in options.items() if key not in kinds}
        self.averager = Averager(self.model, rules, pull=pull, **own)
        self.options, self.scaler = options, torch.amp.GradScaler("cpu", init_scale=4.0)
        if options.get("begun"):
            self.averager.begin()
        if options.get("attached"):
            self.averager.attach(self.optimizer, self.scaler)
        self.teacher: nn.Module | None = None

    def train(self, first: int, last: int, by_hand: Pull | None = None) -> None:
        for step in range(first, last):
            torch.manual_seed(step)
            value = self.model(torch.randn(8, 3)).square().mean()
            bad = self.options.get("skips") and step in (2, 5)
            self.scaler.scale(value * (float("inf") if bad else 1.0)).backward()
            before = self.averager.clock
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            if not self.options.get("attached"):
                self.averager.update()
            moved = self.averager.clock != before
            if by_hand is not None and moved and self.averager.count % by_hand.every == 0:
                self.averager.pull(by_hand.fraction, by_hand.name)
            if self.options.get("module"):
                self.teacher = self.averager.module("fast")

    def tensors(self) -> list[Tensor]:
        averages = [self.averager.average(name) for name in ("fast", "slow")]
        return [t for each in (self.model.state_dict(), *averages) for t in each.values()]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_option_is_the_call_after_each_due_update(options: dict[str, Any]) -> None:
    pull = Pull(0.5, every=2, name="fast")
    ours, wanted, without = Pulled(options, pull), Pulled(options, None), Pulled(options, None)
    ours.train(0, 12)
    wanted.train(0, 12, pull)
    without.train(0, 12)
    assert all(map(torch.equal, ours.tensors(), wanted.tensors()))
    assert not all(map(torch.equal, ours.tensors(), without.tensors()))


WAYS = {
    "state": lambda old, new, _: new.load_state_dict(old.state_dict()),
    "file": lambda old, new, path: polyak.load(_saved(path, old), new),
}


def _saved(path: Path, averager: Averager) -> Path:
    polyak.save(path, averager)
    return path


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stop", [3, 4])
def test_a_resumed_run_pulls_where_the_other_would(tmp_path: Path, way: str, stop: int) -> None:
    pull = Pull(1.0, every=2, name="slow")
    whole, old, new = (Pulled({}, pull) for _ in range(3))
    whole.train(0, 9)
    old.train(0, stop)
    new.model.load_state_dict(old.model.state_dict())
    new.optimizer.load_state_dict(old.optimizer.state_dict())
    WAYS[way](old.averager, new.averager, tmp_path / "a.safetensors")
    new.train(stop, 9)
    assert all(map(torch.equal, new.tensors(), whole.tensors()))


@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_forgets_its_pull_is_refused(tmp_path: Path, way: str) -> None:
    old, new = Pulled({}, Pull(0.5, name="fast")), Pulled({}, None)
    old.train(0, 3)
    with pytest.raises(
        ValueError, match=r"saved with pull=Pull\(fraction=0\.5.*pull=None: make it"
    ):
        WAYS[way](old.averager, new.averager, tmp_path / "a.safetensors")
    polyak.save(tmp_path / "b.safetensors", old.averager)
    polyak.load(tmp_path / "b.safetensors", new.averager, change_rule=True)
    assert new.averager.count == 3
    old.averager.load_state_dict(new.averager.state_dict())  # a run may begin to pull


BAD: list[tuple[Any, Any, str]] = [
    (lambda: Pull(0.0), ValueError, r"fraction is 0\.0, wanted a number in \(0, 1\]"),
    (lambda: Pull(1.5), ValueError, r"fraction is 1\.5"),
    (lambda: Pull("1"), ValueError, "fraction is '1'"),  # type: ignore[arg-type]
    (lambda: Pull(0.5, every=0), ValueError, "pull: every is 0, wanted an integer >= 1"),
    (lambda: Pulled({}, 0.5), TypeError, r"pull is 0\.5, wanted polyak\.Pull\("),  # type: ignore[arg-type]
    (lambda: Pulled({}, Pull(0.5)), ValueError, "wanted the name of an average: fast, slow"),
    (lambda: Pulled({}, Pull(0.5, name="ema")), ValueError, "name='ema'.*fast, slow"),
]


@pytest.mark.parametrize(("make", "kind", "said"), BAD, ids=[said for _, _, said in BAD])
def test_a_bad_option_is_refused_when_it_is_given(make: Any, kind: Any, said: str) -> None:
    with pytest.raises(kind, match=said):
        make()


def test_a_copy_of_the_averager_pulls_too() -> None:
    one = Pulled({}, Pull(0.5, name="fast"))
    one.train(0, 2)
    two = copy.deepcopy(one)
    one.train(2, 5)
    two.train(2, 5)
    assert all(map(torch.equal, one.tensors(), two.tensors()))
