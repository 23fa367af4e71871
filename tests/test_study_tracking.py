"""What a study tracks are the library's averages, for every rule, alone and in a stack."""

from __future__ import annotations

from itertools import cycle

import pytest
import torch
from torch import nn

from polyak import Averager
from polyak.rules import Exponential, Rule, Tail, Uniform, Window
from polyak.study import Arm, Ensemble, Plateau, Study
from polyak.study._ensembles import MeanPrediction, of_ensemble, remember
from polyak.study._feasible import require_feasible
from polyak.study._stacked import stack
from polyak.study._tracking import Tracking, tensors_of
from polyak.study._weighting import due, misplaced
from polyak.theory import coefficients
from quick import slow_if
from rule_examples import RULE_EXAMPLES
from study_models import cnn, study

STEPS, EVALUATIONS, AFTER = 60, 7, 3
RULES = [rule for examples in RULE_EXAMPLES.values() for rule in examples]
RUNS = torch.tensor([2, 0])


def watched(every: int, **arms: Rule | Arm | Ensemble) -> Study:
    """A study of 60 steps, whose evaluations are not on a grid of the updates."""
    spaced = {n: Arm(a, every=every) if isinstance(a, Rule) else a for n, a in arms.items()}
    schedules = {"plateau": Plateau(stop=2, after=AFTER)}
    return study(model=cnn, arms=spaced, steps=STEPS, evaluations=EVALUATIONS, schedules=schedules)


@torch.no_grad()
def moved(model: nn.Module, step: int) -> None:
    """Other weights; the running variances stay above 0."""
    generator = torch.Generator().manual_seed(step)
    for tensor in tensors_of(model).values():
        if tensor.is_floating_point():
            tensor.copy_(1 + torch.rand(tensor.shape, generator=generator))


@pytest.mark.parametrize(
    ("rule", "every"),
    [slow_if((r, e), i % (8 if e == 4 else 3)) for i, r in enumerate(RULES) for e in (1, 4)],
    ids=str,
)
def test_an_arm_is_the_average_of_the_engine(rule: Rule, every: int) -> None:
    """Bit for bit; a window is a difference of sums and is equal up to rounding."""
    model = cnn()
    averager = Averager(model, rule)
    tracking = Tracking(watched(every, arm=rule, again=rule), model)
    evaluations = [due(watched(every, arm=rule), n) for n in range(1, EVALUATIONS + AFTER + 1)]
    for step in range(1, evaluations[-1] + 1):
        moved(model, step)
        tracking.update()
        if step % every == 0:
            averager.update(every)
        if step not in evaluations:
            continue
        networks = [tracking.networks(arm) for arm in ("arm", "again")]
        if not averager.count:
            assert networks == [[], []]
            continue
        wanted = {n: t for n, t in averager.average().items() if t.is_floating_point()}
        for (network,) in networks:
            found = {name: network.weights[name] for name in wanted}
            tolerance = 1e-6 if isinstance(rule, Window) else 0.0
            torch.testing.assert_close(found, wanted, rtol=tolerance, atol=0)


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_the_arms_of_a_stack_are_those_of_its_runs(every: int) -> None:
    """Also after some of the runs have been left out, and others exchanged."""
    arms = {str(number): rule for number, rule in enumerate(RULES)}
    swept = Arm(Exponential(0.9), every=every, start=0.3, swept=True)
    tried = watched(every, **arms, swept=swept, ensemble=Ensemble(3, every=every))
    models = [cnn() for _ in range(3)]
    alone = [Tracking(tried, model) for model in models]
    weights = stack(models)
    tracking = Tracking(tried, models[0], weights)
    for evaluation in range(1, EVALUATIONS + 1):
        for step in range(due(tried, evaluation - 1) + 1, due(tried, evaluation) + 1):
            for number, model in enumerate(models):
                moved(model, 100 * step + number)
            for name, tensor in stack(models).items():
                weights[name].copy_(tensor)
            for each in (*alone, tracking):
                each.update()
        for arm in tried.arm_names:
            together = tracking.networks(arm)
            for number, each in enumerate(alone):
                single = each.networks(arm)
                assert len(single) == len(together)
                for one, all_ in zip(single, together, strict=True):
                    for name, tensor in one.weights.items():
                        assert torch.equal(all_.weights[name][number], tensor), (arm, name)
        for network in tracking.networks("ensemble"):  # an output stays with its network's run
            output = network.weights["0.weight"]
            known = network.outputs.setdefault("test", {(0,): output.clone()})
            assert torch.equal(known[(0,)], output)
        if evaluation == EVALUATIONS // 2:
            models, alone = ([each[i] for i in RUNS.tolist()] for each in (models, alone))
            weights = stack(models)
            tracking.keep(weights, RUNS)


@pytest.mark.parametrize(("rule", "every"), list(zip(RULES, cycle([1, 4]), strict=False)), ids=str)
def test_a_swept_arm_gives_the_updates_between_evaluations_equal_weights(
    rule: Rule, every: int
) -> None:
    """What the tracked average differs by is at most the misplaced weight times the spread of the weights."""
    model = nn.Linear(3, 1, bias=False)
    tried = watched(every, swept=Arm(rule, every=every, swept=True))
    if "bema" in str(rule):
        with pytest.raises(
            ValueError, match="'swept' is swept, and its rule has a term in the live"
        ):
            require_feasible(tried)
        return
    tracking, averager = Tracking(tried, model), Averager(model, rule)
    ends = [due(tried, n) for n in range(1, EVALUATIONS + AFTER + 1)]
    seen: list[torch.Tensor] = []
    for step in range(1, ends[-1] + 1):
        moved(model, step)
        tracking.update()
        if step % every == 0:
            averager.update(every)
            seen.append(model.weight.detach().double().clone())
        if step not in ends or not seen:
            continue
        exact = torch.tensor(coefficients(rule, [every] * len(seen)))
        bounds = sorted({1, *(end // every for end in ends if end <= step)})
        shares = torch.cat(
            [part.mean().expand(len(part)) for part in exact.tensor_split(bounds) if len(part)]
        )
        (network,) = tracking.networks("swept")
        found, all_seen = network.weights["weight"], torch.stack(seen)
        torch.testing.assert_close(
            found.double(), (shares @ all_seen[:, 0])[None], rtol=1e-5, atol=1e-5
        )
        away = (exact - shares).abs().sum() / 2 * (all_seen.amax() - all_seen.amin())
        assert (found - averager.average()["weight"]).abs().max() <= away + 1e-4
        if step == STEPS and not step % every:
            share = (exact - shares).abs().sum() / 2
            assert misplaced(tried, Arm(rule, every=every)) == pytest.approx(float(share), abs=1e-9)


def test_a_swept_mean_over_whole_stretches_is_the_tracked_one() -> None:
    rules = {"all": Uniform(), "half": Window(30), "tail": Tail(Uniform(), 40)}
    arms = {n: Arm(rule, swept=True) for n, rule in rules.items()}
    tried = study(arms=arms, model=cnn, steps=60, evaluations=6)
    model = cnn()
    tracking, averager = Tracking(tried, model), Averager(model, rules)
    for step in range(1, 61):
        moved(model, step)
        tracking.update()
        averager.update()
    assert len(tracking._kept) == 1
    for name, arm in arms.items():
        (network,) = tracking.networks(name)
        wanted = {n: t for n, t in averager.average(name).items() if t.is_floating_point()}
        found = {n: network.weights[n] for n in wanted}
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
        assert misplaced(tried, arm) < 1e-12


def test_arms_with_one_rule_share_an_average_and_windows_a_sum() -> None:
    arms: dict[str, Rule] = {f"tail {n}": Tail(Window(3), 5) for n in range(3)}
    arms |= {f"window {n}": Window(n + 1) for n in range(20)}
    tracking = Tracking(watched(1, **arms), cnn())
    assert len(tracking._kept) == 2


class Counted(nn.Module):
    """A linear model that counts its calls."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Counted.calls += 1
        output: torch.Tensor = self.layer(x)
        return output


def test_each_network_of_an_ensemble_predicts_a_part_once() -> None:
    """It predicts anew only for tensors that are not those of the part."""
    model = Counted()
    tracking = Tracking(
        study(model=Counted, arms={"e": Ensemble(4)}, steps=6, evaluations=6), model
    )
    part = (torch.randn(5, 3), torch.zeros(5, 2))
    Counted.calls = 0
    for step in range(1, 7):
        moved(model, step)
        tracking.update()
        networks = tracking.networks("e")
        weights, known = of_ensemble(networks, "test")
        mean = MeanPrediction(model, lambda outputs: outputs.mean(0), weights, known, part)
        outputs = mean(part[0])
        remember(networks, "test", mean.outputs)
        assert Counted.calls == step
        wanted = [part[0] @ w["layer.weight"].T + w["layer.bias"] for w in weights]
        torch.testing.assert_close(outputs, torch.stack(wanted).mean(0))
    torch.testing.assert_close(mean(part[0].clone()), outputs)
    assert Counted.calls == 10
