"""The loop is an ordinary script, bit for bit, and nothing that watches a training disturbs it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from polyak import Averager
from polyak.rules import Rule
from polyak.study import cosine
from polyak.study._loop import Run, train
from polyak.study._weighting import profile_of
from quick import first_quick
from rule_examples import RULE_EXAMPLES, each_rule
from study_models import Scaled, Turned, cnn, images, mlp, study


class Plain:
    """An ordinary script with the study's four seeds. It uses nothing of polyak."""

    def __init__(self, seed: int, model: Callable[[], nn.Module], rate: float) -> None:
        torch.manual_seed(4 * seed)
        self.model = model().train()
        data = images(4 * seed + 3)
        order = torch.Generator().manual_seed(4 * seed + 1)
        loader = DataLoader(TensorDataset(*data.train), 20, shuffle=True, generator=order)
        torch.manual_seed(4 * seed + 2)
        optimizer = torch.optim.SGD(self.model.parameters(), rate, momentum=0.9, weight_decay=1e-3)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: (1 + math.cos(math.pi * step / 40)) / 2
        )
        self.ema = copy.deepcopy(self.model)
        self.snapshots: list[list[torch.Tensor]] = []
        self.losses: list[float] = []
        self.validation: list[dict[str, float]] = []
        steps = (batch for _ in range(8) for batch in loader)
        for step, (x, y) in enumerate(steps, 1):
            optimizer.zero_grad()
            loss = functional.cross_entropy(self.model(x), y)
            loss.backward()
            optimizer.step()
            schedule.step()
            self.losses.append(loss.item())
            self._average(step)
            if step % 10 == 0:
                parts = {"live": self.model, "ema": self.ema, "sma": self._window()}
                self.validation.append(
                    {k: self._loss(m, data.validation) for k, m in parts.items()}
                )
            if step == 40:
                break
        self.test = {name: self._loss(m, data.test) for name, m in parts.items()}

    @torch.no_grad()
    def _average(self, step: int) -> None:
        live = [*self.model.parameters(), *self.model.buffers()]
        self.snapshots.append([t.clone() for t in live])
        for average, new in zip([*self.ema.parameters(), *self.ema.buffers()], live, strict=True):
            if step == 1 or not (new.is_floating_point() or new.is_complex()):
                average.copy_(new)
            else:
                average.lerp_(new, 1 - 0.9)

    @torch.no_grad()
    def _window(self) -> nn.Module:
        window = copy.deepcopy(self.model)
        slots = zip(*self.snapshots[-7:], strict=True)
        for tensor, kept in zip([*window.parameters(), *window.buffers()], slots, strict=True):
            averaged = tensor.is_floating_point() or tensor.is_complex()
            tensor.copy_(torch.stack(kept).mean(0) if averaged else kept[-1])
        return window

    @torch.no_grad()
    def _loss(self, model: nn.Module, part: tuple[torch.Tensor, ...]) -> float:
        judged = copy.deepcopy(model).eval()
        return functional.cross_entropy(judged(part[0]), part[1]).item()


@pytest.mark.parametrize("model", [mlp, cnn, Scaled, Turned])
@pytest.mark.parametrize("seed", first_quick([3, 0]))
def test_a_run_is_the_plain_script_bit_for_bit(model: Callable[[], nn.Module], seed: int) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    plain = Plain(seed, model, 0.05)
    torch.set_num_threads(threads)
    record = train(study(model=model, schedules={"cosine": cosine}), Run(seed, "cosine", 0.05))
    means = [sum(plain.losses[i : i + 10]) / 10 for i in range(0, 40, 10)]
    assert record["train_loss"] == means
    for arm in ("live", "ema"):
        assert record["curves"][arm]["loss"] == [now[arm] for now in plain.validation]
        assert record["test"][arm]["last"]["loss"] == plain.test[arm]
    wanted = [now["sma"] for now in plain.validation]
    assert record["curves"]["sma"]["loss"] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    "rule", each_rule([r for each in RULE_EXAMPLES.values() for r in each]), ids=str
)
@pytest.mark.parametrize(("steps", "every"), [(12, 4), (14, 4), (15, 1), (3, 4)])
def test_the_profile_of_an_arm_is_what_it_averages(rule: Rule, steps: int, every: int) -> None:
    """An arm is updated at the end of its `every` steps, and read at any step."""
    weights = {"w": torch.zeros(steps, dtype=torch.float64)}
    averager = Averager(weights, rule)
    for step in range(1, steps + 1):
        weights["w"].zero_()[step - 1] = 1.0
        if step % every == 0:
            averager.update(every)
    found = profile_of(rule, steps, every)
    if found is None:
        assert averager.count == 0
    else:
        wanted = averager.average()["w"]
        torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=0, atol=1e-13)
