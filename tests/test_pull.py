"""Pulling the live weights towards their average: parity with plain loops, exactness, refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import Everything
from polyak import Averager
from polyak.rules import Bema, Rule
from polyak.theory import feedback
from rule_examples import RULE_EXAMPLES

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
@pytest.mark.parametrize("rule", RULES, ids=str)
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
    """SGD on a quadratic with the method, as a user writes it."""
    every, cadence = method.get("every", 1), method.get("update_every", 1)
    rule, parameter = f"exponential({method['decay']})", nn.Parameter(weights)
    averager = Averager({"w": parameter}, rule, every=cadence)
    if cadence > 1:  # Lookahead's slow weights begin as the model's
        averager.begin()
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 151):
        noise = torch.randn(weights.shape, generator=generator, dtype=weights.dtype)
        (parameter.square().sum() / 2 + (noise * parameter).sum()).backward()
        if method.get("with_step") and averager.count:
            averager.pull(method["pull"])
        optimizer.step()
        optimizer.zero_grad()
        averager.update()
        if not method.get("with_step") and step % every == 0:
            averager.pull(method["pull"])
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


@pytest.mark.slow
def test_in_a_trainer_it_is_one_line_of_a_hook(tmp_path: Path) -> None:
    """Lightning with the callback and a hook that pulls is the plain loop, bit for bit."""
    import warnings

    from lightning.pytorch import Callback

    from integration_contract import RULES as AVERAGES
    from integration_contract import STEPS, batches, loss, net, optimizer
    from lightning_modules import made, trainer_of
    from polyak.integrations.lightning import AveragerCallback

    averages = AveragerCallback(AVERAGES)

    class Pulls(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step % 2 == 0:
                assert averages.averager is not None
                averages.averager.pull(0.5, "fast")

    module = made()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Lightning, on a small run
        trainer_of(averages, Pulls(), default_root_dir=tmp_path).fit(module)
    model = net()
    steps, averager = optimizer(model), Averager(model, AVERAGES)
    for step, batch in enumerate(batches()[:STEPS], 1):
        loss(model, batch).backward()
        steps.step()
        steps.zero_grad()
        averager.update()
        if step % 2 == 0:
            averager.pull(0.5, "fast")
    for name, tensor in model.state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor), name
    assert averages.averager is not None
    for name in AVERAGES:
        ours, wanted = averages.averager.average(name), averager.average(name)
        assert all(torch.equal(ours[key], tensor) for key, tensor in wanted.items())
