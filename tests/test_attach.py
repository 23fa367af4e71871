"""attach: one real step of an optimizer is one update, however many calls the step is made of.

A new kind of optimizer joins `STEPPERS` by one line: what is attached, and how one real step is made.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import schedulefree  # type: ignore[import-untyped]
import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.optimizer import AcceleratedOptimizer  # type: ignore[import-untyped]
from accelerate.state import GradientState  # type: ignore[import-untyped]
from lightning.pytorch.core.optimizer import LightningOptimizer
from schedulefree import AdamWScheduleFree
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as checkpoint
from torch.optim import SGD, Optimizer

from models import assert_same
from polyak import Averager, Uniform
from polyak._engine import attachment, optimizers


class Inheriting(SGD):
    """Its `step` calls the base class's, whose hooks run too once there was a plain instance."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class InheritingTwice(Inheriting):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Looping(SGD):
    def step(self, closure: Any = None) -> Any:
        for _ in range(3):
            loss = super().step(closure)
        return loss


def steps_and_shrinks(outer: Any, closure: Any) -> Any:
    """Steps the optimizer inside some times, and changes the weights afterwards (Lookahead)."""
    for _ in range(outer.times):
        loss = outer.base_optimizer.step(closure)
    for group in outer.param_groups:
        for parameter in group["params"]:
            parameter.data.mul_(0.9)
    return loss


class Outer(Optimizer):
    def __init__(self, optimizer: Optimizer, times: int = 1) -> None:
        self.base_optimizer, self.times = optimizer, times
        super().__init__(optimizer.param_groups, {})

    def step(self, closure: Any = None) -> Any:
        return steps_and_shrinks(self, closure)


class WithoutHooks(Optimizer):
    """As torch's PostLocalSGDOptimizer: an Optimizer that never calls `Optimizer.__init__`."""

    def __init__(self, optimizer: Optimizer, times: int = 1) -> None:
        self.base_optimizer, self.times = optimizer, times
        self.param_groups = optimizer.param_groups

    def step(self, closure: Any = None) -> Any:
        return steps_and_shrinks(self, closure)


class Duck:
    """No torch optimizer, and it has one."""

    def __init__(self, optimizer: Any, times: int = 1) -> None:
        self.optimizer, self.times = optimizer, times

    def step(self, closure: Any = None) -> Any:
        return [self.optimizer.step(closure) for _ in range(self.times)][-1]


class Sharpness(Optimizer):
    """SAM: to be stepped in two halves, or by a closure."""

    def __init__(self, parameters: Iterator[nn.Parameter], **options: Any) -> None:
        super().__init__(parameters, {})
        self.base_optimizer = SGD(self.param_groups, **options)

    @torch.no_grad()
    def first_step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["old"] = parameter.clone()
                parameter.add_(0.01)

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.copy_(self.state[parameter]["old"])
        self.base_optimizer.step()

    def step(self, closure: Any = None) -> Any:
        self.first_step()
        loss = closure()
        self.second_step()
        return loss


class Stepper(NamedTuple):
    """What is attached, and what makes one real step; it is given a closure."""

    attached: Any
    step: Callable[[Callable[[], Tensor]], object]


def plain(model: nn.Module, its_class: type[Optimizer] = SGD, **options: Any) -> Any:
    return its_class(model.parameters(), **{"lr": 0.1, **options})


def stepping(optimizer: Any) -> Stepper:
    """Backward, then `optimizer.step()`."""
    return Stepper(optimizer, lambda closure: (closure(), optimizer.step()))


def closing(optimizer: Any) -> Stepper:
    """`optimizer.step(closure)`."""
    return Stepper(optimizer, optimizer_step(optimizer))


def optimizer_step(optimizer: Any) -> Callable[[Callable[[], Tensor]], object]:
    return lambda closure: optimizer.step(closure)


def by_class(optimizer: Any) -> Stepper:
    """Past whatever `step` the instance has."""
    return Stepper(optimizer, lambda closure: (closure(), type(optimizer).step(optimizer)))


def in_halves(optimizer: Sharpness) -> Stepper:
    def step(closure: Callable[[], Tensor]) -> None:
        closure()
        optimizer.first_step()
        closure()
        optimizer.second_step()

    return Stepper(optimizer, step)


def scheduled(optimizer: Any) -> Stepper:
    """A scheduler puts its own `step` around the optimizer's."""
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)

    def step(closure: Callable[[], Tensor]) -> None:
        closure()
        optimizer.step()
        scheduler.step()

    return Stepper(optimizer, step)


def scheduled_later(optimizer: Any) -> Stepper:
    made: list[Any] = []

    def step(closure: Callable[[], Tensor]) -> None:
        closure()
        made[:] = made or [torch.optim.lr_scheduler.StepLR(optimizer, 2)]
        optimizer.step()
        made[0].step()

    return Stepper(optimizer, step)


def accelerated(optimizer: Any, scaler: Any = None) -> Any:
    GradientState._reset_state()  # every wrapper has it, with the loaders that another test has left
    Accelerator(cpu=True)
    return AcceleratedOptimizer(optimizer, device_placement=False, scaler=scaler)


def scaled(optimizer: Any) -> Stepper:
    """accelerate with a scaler: it replaces the inner optimizer's `step` at each of its own."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    wrapper = accelerated(optimizer, scaler)

    def step(closure: Callable[[], Tensor]) -> None:
        wrapper.zero_grad()
        scaler.scale(closure.forward()).backward()  # type: ignore[attr-defined]
        wrapper.step()

    return Stepper(wrapper, step)


def of_lightning(optimizer: Any) -> Any:
    wrapper = LightningOptimizer(optimizer)
    wrapper._strategy = SimpleNamespace(optimizer_step=lambda o, c, **_: o.step(c))  # type: ignore[assignment]
    return wrapper


def compiled(optimizer: Any) -> Stepper:
    torch.compiler.reset()

    @torch.compile(backend="eager")
    def step() -> None:
        optimizer.step()

    def call(closure: Callable[[], Tensor]) -> None:
        closure()
        step()

    return Stepper(optimizer, call)


STEPPERS: dict[str, Callable[[nn.Module], Stepper]] = {
    "plain": lambda m: stepping(plain(m)),
    "closure": lambda m: closing(plain(m)),
    "fused": lambda m: stepping(plain(m, torch.optim.Adam, fused=True)),
    "LBFGS": lambda m: closing(plain(m, torch.optim.LBFGS, lr=0.01, max_iter=7)),
    "super().step()": lambda m: stepping(plain(m, Inheriting)),
    "super().step() with a closure": lambda m: closing(plain(m, Inheriting)),
    "super().step() twice": lambda m: stepping(plain(m, InheritingTwice)),
    "super().step() in a loop": lambda m: stepping(plain(m, Looping)),
    "by its class": lambda m: by_class(plain(m)),
    "an inner optimizer": lambda m: stepping(Outer(plain(m))),
    "an inner optimizer in a loop": lambda m: stepping(Outer(plain(m, Inheriting), 3)),
    "without hooks": lambda m: stepping(WithoutHooks(plain(m))),
    "without hooks, in a loop": lambda m: stepping(WithoutHooks(plain(m), 3)),
    "inner of inner": lambda m: stepping(Outer(WithoutHooks(Outer(plain(m, Inheriting), 2), 2), 2)),
    "SAM in halves": lambda m: in_halves(Sharpness(m.parameters(), lr=0.1)),
    "SAM by closure": lambda m: closing(Sharpness(m.parameters(), lr=0.1)),
    "a duck": lambda m: stepping(Duck(plain(m))),
    "a duck in a loop": lambda m: stepping(Duck(plain(m, Inheriting), 3)),
    "a duck in a duck": lambda m: stepping(Duck(Duck(Outer(plain(m))), 2)),
    "accelerate": lambda m: stepping(accelerated(plain(m))),
    "accelerate around a subclass": lambda m: stepping(accelerated(plain(m, Inheriting))),
    "accelerate with a scaler": lambda m: scaled(plain(m)),
    "accelerate with a scaler, fused": lambda m: scaled(plain(m, torch.optim.Adam, fused=True)),
    "Lightning": lambda m: stepping(of_lightning(plain(m))),
    "Lightning around a subclass": lambda m: closing(of_lightning(plain(m, Inheriting))),
    "a scheduler before": lambda m: scheduled(plain(m, Inheriting)),
    "a scheduler after": lambda m: scheduled_later(plain(m, Inheriting)),
    "compiled": lambda m: compiled(plain(m)),
}  # fmt: skip


class Closure:
    """Forward and backward on the same data; fails where it is told to."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.fails = model, False

    def forward(self) -> Tensor:
        loss: Tensor = self.model(torch.ones(4, 3)).square().mean()
        return loss

    def __call__(self) -> Tensor:
        if self.fails:
            raise ZeroDivisionError
        self.model.zero_grad()
        with torch.enable_grad():
            loss = self.forward()
            loss.backward()
        return loss


def mean_of_real_steps(kind: str, fails_at: int | None = None) -> None:
    """Holds the average to the mean of the weights after each real step."""
    torch.manual_seed(0)
    plain(nn.Linear(1, 1))  # SGD's own step is hooked from now on
    model = nn.Linear(3, 2)
    stepper = STEPPERS[kind](model)
    averager = Averager(model, Uniform())
    averager.attach(stepper.attached)
    closure = Closure(model)
    path = []
    for i in range(5):
        if i == fails_at:
            closure.fails = True
            with suppress(ZeroDivisionError):
                stepper.step(closure)
            closure.fails = False
        stepper.step(closure)
        path.append(model.weight.detach().clone())
        assert averager.count == len(path)
    torch.testing.assert_close(averager.average()["weight"], torch.stack(path).mean(0))


def slow_if_compiled(kinds: Iterable[str]) -> list[Any]:
    compiles = pytest.mark.slow
    return [pytest.param(kind, marks=compiles if kind == "compiled" else ()) for kind in kinds]


@pytest.mark.parametrize("kind", slow_if_compiled(STEPPERS))
def test_one_real_step_is_one_update(kind: str) -> None:
    mean_of_real_steps(kind)


FAILING = [kind for kind in STEPPERS if "scaler" not in kind]


@pytest.mark.parametrize("kind", slow_if_compiled(FAILING))
def test_a_step_that_raises_is_none_and_the_next_counts(kind: str) -> None:
    mean_of_real_steps(kind, fails_at=2)


CALLS_OF_SEVERAL = [kind for kind in STEPPERS if "super()" in kind or "loop" in kind]


@pytest.mark.parametrize("kind", CALLS_OF_SEVERAL)
def test_the_law_fails_where_hooks_alone_tell(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: by torch's hooks alone, a step of several calls counts several times."""
    monkeypatch.setattr(attachment._Watch, "_wrap", lambda *_: lambda: None)
    with pytest.raises(AssertionError):
        mean_of_real_steps(kind)


def resumed(model: nn.Module, optimizer: Optimizer) -> None:
    other = nn.Linear(3, 2)
    kind: Any = type(optimizer)
    saved = checkpoint.get_optimizer_state_dict(other, kind(other.parameters(), lr=0.1))
    checkpoint.set_optimizer_state_dict(model, optimizer, saved)


MAKES_STATE: dict[str, Callable[[nn.Module, Optimizer], object]] = {
    "asked for its state": checkpoint.get_optimizer_state_dict,
    "asked for all states": checkpoint.get_state_dict,
    "given a state": resumed,
}
PLAIN: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda p: SGD(p, 0.1),
    "AdamW": lambda p: torch.optim.AdamW(p),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, fused=True),
    "inheriting": lambda p: Inheriting(p, 0.1),
}


@pytest.mark.parametrize("optimizer", PLAIN)
@pytest.mark.parametrize("way", MAKES_STATE)
def test_the_step_by_which_torch_makes_a_state_is_none(way: str, optimizer: str) -> None:
    """Its learning rate is 0. A real step with that rate, the first of a warmup, is one."""
    model = nn.Linear(3, 2)
    stepped = PLAIN[optimizer](model.parameters())
    averager = Averager(model, Uniform())
    averager.attach(stepped)
    MAKES_STATE[way](model, stepped)
    assert averager.count == 0
    stepped.param_groups[0]["lr"] = 0.0
    for count in (1, 2):
        model(torch.ones(1, 3)).sum().backward()
        stepped.step()
        assert averager.count == count
        stepped.param_groups[0]["lr"] = 0.1


def test_accelerate_accumulates_gradients() -> None:
    model = nn.Linear(3, 2)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    prepared: Any = accelerator.prepare(model)
    optimizer = accelerator.prepare(plain(model, Inheriting))
    averager = Averager(model, Uniform())
    averager.attach(optimizer)
    for _ in range(9):
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(torch.ones(4, 3)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
    assert averager.count == 3


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_accelerates_scaler_skips_does_not_count(fused: bool) -> None:
    model = nn.Linear(3, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = accelerated(plain(model, torch.optim.Adam, fused=fused), scaler)
    averager = Averager(model, Uniform())
    averager.attach(optimizer)
    for step in range(8):
        loss = model(torch.ones(4, 3)).square().mean()
        scaler.scale(loss * (torch.inf if step in (0, 3) else 1.0)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert averager.count == 6


def test_several_wrapped_optimizers() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    several = [accelerated(plain(model[0], Inheriting)), Duck(Outer(plain(model[1])), 2)]
    averager = Averager(model, Uniform())
    averager.attach(several)
    for _ in range(3):
        model(torch.ones(4, 3)).sum().backward()
        for optimizer in several:
            optimizer.step()
    assert averager.count == 3


@pytest.mark.parametrize("kind", slow_if_compiled(STEPPERS))
def test_a_detached_optimizer_has_its_own_step_back(kind: str) -> None:
    model = nn.Linear(3, 2)
    stepper = STEPPERS[kind](model)
    closure = Closure(model)
    averager = Averager(model, Uniform())
    for _ in range(2):
        attached = averager.attach(stepper.attached)
        stepper.step(closure)
        attached.remove()
    stepper.step(closure)
    assert averager.count == 2
    for optimizer in optimizers._nested(stepper.attached):
        if "after" not in kind:  # where a scheduler has wrapped it since, it stays inside
            code = getattr(vars(optimizer).get("step"), "__code__", None)
            assert code is None or code.co_filename != attachment.__file__


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
}


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_of_an_attachment_watches_nothing(way: str) -> None:
    """So what holds one can be copied and pickled. The optimizer of the first stays attached."""
    model = nn.Linear(3, 2)
    optimizer = SGD(model.parameters(), lr=0.1)
    averager = Averager(model, Uniform())
    attached = averager.attach(optimizer)
    twin = COPIES[way](attached)
    assert attached.active and not twin.active and not twin.waiting
    twin.require_moved()
    twin.remove()
    optimizer.step()
    assert averager.count == 1
    attached.remove()
    assert not COPIES[way](attached).active


def test_an_attachment_that_was_removed_has_no_power_over_the_next() -> None:
    """Weights that were replaced since, which the optimizer has none of, are refused nevertheless."""
    model = nn.Linear(3, 2)
    optimizer = SGD(model.parameters(), lr=0.1)
    averager = Averager(model, Uniform())
    first = averager.attach(optimizer)
    first.remove()
    averager.attach(optimizer)
    first.remove()
    optimizer.step()
    model.weight, model.bias = (nn.Parameter(p.detach().clone()) for p in model.parameters())
    with pytest.raises(ValueError, match="attach: "):
        optimizer.step()
    assert averager.count == 1


@pytest.mark.parametrize("wrap", [plain, lambda m: accelerated(plain(m)), lambda m: Duck(plain(m))])
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_of_an_attached_optimizer_is_not_watched(way: str, wrap: Any) -> None:
    model = nn.Linear(3, 2)
    optimizer = wrap(model)
    averager = Averager(model, Uniform())
    averager.attach(optimizer)
    twin = COPIES[way](optimizer)
    twin.step()
    assert averager.count == 0
    optimizer.step()
    assert averager.count == 1


@pytest.mark.parametrize("wrong", [None, 3, nn.Linear(1, 1), Duck(None), [Duck(Duck(3))]])
def test_what_has_no_torch_optimizer_is_refused(wrong: Any) -> None:
    averager = Averager(nn.Linear(3, 2), Uniform())
    with pytest.raises(
        TypeError, match=r"attach: \w+ is not a torch.optim.Optimizer, and has none"
    ):
        averager.attach(wrong)


def test_an_optimizer_and_its_wrapper_are_one() -> None:
    model = nn.Linear(3, 2)
    inner = plain(model)
    for several in ([inner, Duck(inner)], [accelerated(inner), Outer(inner)]):
        with pytest.raises(
            ValueError, match="attach: 2 optimizers, wanted one or more, each only once"
        ):
            Averager(model, Uniform()).attach(several)
    assert "step" not in vars(inner)


@pytest.mark.parametrize("wrap", [lambda inner: inner, accelerated], ids=["alone", "accelerate's"])
@pytest.mark.parametrize(
    ("kind", "where"),
    [(AdamWScheduleFree, r"eval\(\) writes"), (torch.optim.ASGD, r"state\[parameter\]")],
)
def test_an_optimizer_that_averages_itself_is_told(
    kind: Any, where: str, wrap: Callable[[Any], Any]
) -> None:
    model = nn.Linear(2, 1)
    inner = kind(model.parameters(), lr=0.1)
    with pytest.warns(
        UserWarning, match=f"{kind.__name__} averages the weights itself, and {where}"
    ):
        attachment = Averager(model, "exponential(0.9)").attach(wrap(inner))
    attachment.remove()


SCHEDULE_FREE = {
    kind.__name__: kind
    for name, kind in vars(schedulefree).items()
    if "ScheduleFree" in name and isinstance(kind, type)
}


@pytest.mark.parametrize("wrap", [lambda inner: inner, accelerated], ids=["alone", "accelerate's"])
@pytest.mark.parametrize("name", sorted(SCHEDULE_FREE))
def test_every_schedule_free_optimizer_is_told_and_followed(
    name: str, wrap: Callable[[Any], Any]
) -> None:
    """Also those that take a closure, and those around another optimizer."""
    torch.manual_seed(0)
    kind: Any = SCHEDULE_FREE[name]
    model, wraps, closed = nn.Linear(2, 1), "Wrapper" in name, name.endswith("Closure")
    inner = kind(plain(model)) if wraps else kind(model.parameters(), lr=0.1)
    where = "the weights after each step are that" if closed else r"eval\(\) writes that"
    averager = Averager(model, Uniform())
    with pytest.warns(
        UserWarning, match=f"{kind.__name__} averages the weights itself, and {where}"
    ):
        averager.attach(optimizer := wrap(inner))
    if not closed:
        inner.train()
    taken = []
    for _ in range(3):

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = model(torch.ones(4, 2)).square().mean()
            loss.backward()
            return loss  # type: ignore[no-any-return]

        if closed:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        taken.append(model.weight.detach().clone())
    assert averager.count == 3
    torch.testing.assert_close(averager.average()["weight"], torch.stack(taken).mean(0))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_that_does_not_average_is_attached_without_a_word(kind: Any) -> None:
    model = nn.Linear(2, 1)
    Averager(model, "exponential(0.9)").attach(accelerated(kind(model.parameters(), lr=0.1)))


def pair() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))


class Masters:
    """Trains copies of the weights, and writes them back at the end of its step, as Megatron's does."""

    def __init__(self, model: nn.Module, form: Callable[[list[Any]], Any]) -> None:
        weights = list(model.parameters())
        self.copies = [weight.detach().clone().requires_grad_() for weight in weights]
        self.optimizer, self.kept = SGD(self.copies, lr=0.1), form(weights)
        self._write = [partial(torch.Tensor.copy_, w) for w in map(torch.Tensor.detach, weights)]
        self._grads = [partial(getattr, weight, "grad") for weight in weights]

    def step(self) -> None:
        for copied, grad in zip(self.copies, self._grads, strict=True):
            copied.grad = grad()
        self.optimizer.step()
        for write, copied in zip(self._write, self.copies, strict=True):
            write(copied)


FORMS: dict[str, Callable[[list[Any]], Any]] = {
    "a list": list,
    "a tuple": tuple,
    "groups, as Megatron's and apex's": lambda weights: [weights[:1], weights[1:]],
    "keys of a map, as torchao's": lambda weights: {w: torch.zeros_like(w) for w in weights},
    "values of a map": lambda weights: {"float16": {str(i): w for i, w in enumerate(weights)}},
}
"""How an optimizer that trains copies of the weights keeps the weights."""


@pytest.mark.parametrize("form", FORMS)
def test_an_optimizer_of_copies_that_it_writes_back_moves_the_weights(form: str) -> None:
    """The average is that of the weights that it has written back."""
    model = pair()
    averager, wanted = Averager(model, Uniform()), Averager(model, Uniform())
    optimizer = Masters(model, FORMS[form])
    averager.attach(optimizer)
    for _ in range(3):
        model.zero_grad()
        model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
        wanted.update()
    assert averager.count == 3
    assert_same(averager.average(), wanted.average())
    assert not torch.equal(averager.average()["0.weight"], model.state_dict()["0.weight"])


STRANGERS: dict[str, Callable[[nn.Module], Any]] = {
    "of another model": lambda _: plain(nn.Linear(3, 2)),
    "of a deep copy": lambda m: plain(copy.deepcopy(m)),
    "of a model made anew": lambda _: plain(pair()),
    "several of a copy": lambda m: list(map(plain, copy.deepcopy(m).children())),
    "accelerate's, of a copy": lambda m: accelerated(plain(copy.deepcopy(m))),
    "a duck of a copy": lambda m: Duck(Outer(plain(copy.deepcopy(m)))),
    "of copies for a copy": lambda m: Masters(copy.deepcopy(m), list),
    "of copies, which hides the weights": lambda m: Masters(m, len),
    "empty": lambda _: SGD([{"params": []}], lr=0.1),
}
"""Optimizers that have none of the averaged weights of a model."""


@pytest.mark.parametrize("kind", STRANGERS)
def test_an_optimizer_with_none_of_the_averaged_parameters_is_refused(kind: str) -> None:
    model = pair()
    optimizer = STRANGERS[kind](model)
    averager = Averager(model, Uniform())
    with pytest.raises(
        ValueError, match=r"has none of the 6 averaged parameters \(0.weight, \.\.\."
    ):
        averager.attach(optimizer)
    for member in optimizer if isinstance(optimizer, list) else [optimizer]:
        assert "step" not in vars(member)
    averager.attach(plain(model))


def flat(model: nn.Module) -> SGD:
    """An optimizer of one tensor, of which the parameters become views."""
    parameters = list(model.parameters())
    whole = torch.cat([p.detach().reshape(-1) for p in parameters])
    for parameter, part in zip(
        parameters, whole.split([p.numel() for p in parameters]), strict=True
    ):
        parameter.data = part.view_as(parameter)
    return SGD([whole], lr=0.1)


def of_copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


def without_rows() -> tuple[Any, Any]:
    """As a rank has it whose shards are all empty."""
    model = nn.ParameterDict({"w": nn.Parameter(torch.empty(0, 3))})
    return model, plain(model)


OWNERS: dict[str, Callable[[nn.Sequential], tuple[Any, Any]]] = {
    "of all": lambda m: (m, plain(m)),
    "of halves": lambda m: (m, [plain(m[0]), plain(m[1:])]),
    "in two groups": lambda m: (m, SGD([{"params": list(c.parameters())} for c in (m[0], m[1:])], 0.1)),
    "of a part, the rest is frozen": lambda m: (m.requires_grad_(False), plain(m[2].requires_grad_())),
    "of a part, the rest is frozen and averaged": lambda m: (m.requires_grad_(False), plain(m[2])),
    "of a mapping": lambda m: (dict(m.named_parameters()), plain(m)),
    "of a mapping's parts": lambda m: (dict(m.named_parameters()), plain(m[0])),
    "of views": lambda m: (of_copies(m), plain(m)),
    "of one flat tensor": lambda m: (m, flat(m)),
    "of a tensor without a row": lambda _: without_rows(),
    "of a wrapped model": lambda m: (torch.compile(m, backend="eager"), plain(m)),
    "accelerate's": lambda m: (m, accelerated(plain(m))),
    "a duck's": lambda m: (m, Duck(plain(m))),
}  # fmt: skip
"""What is averaged, and optimizers that move it, or as much of it as trains."""


@pytest.mark.parametrize("kind", OWNERS)
def test_an_optimizer_of_what_trains_is_attached_without_a_word(kind: str) -> None:
    averaged, optimizer = OWNERS[kind](pair())
    averager = Averager(averaged, Uniform())
    averager.attach(optimizer)
    for member in optimizer if isinstance(optimizer, list) else [optimizer]:
        member.step()
    assert averager.count == 1


def test_parameters_that_train_and_are_in_no_optimizer_are_told() -> None:
    model = pair()
    averager = Averager(model, Uniform())
    with pytest.warns(
        UserWarning, match=r"SGD has 4 of the 6 averaged parameters, and not 2.weight, 2.bias:"
    ) as told:
        averager.attach(plain(model[:2]))
    assert [each.filename for each in told] == [__file__]


def replaced(model: nn.Module, names: str) -> None:
    """Gives a model new tensors in place of some of its own."""
    new = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict({n: t for n, t in new.items() if n.startswith(names)}, False, assign=True)


@pytest.mark.parametrize("looks", [False, True], ids=["", "after a look"])
@pytest.mark.parametrize("steps", [0, 2])
def test_steps_that_no_longer_move_the_averaged_parameters_are_refused(
    steps: int, looks: bool
) -> None:
    """Each of them, before the average has changed; with the optimizer of the new ones it goes on."""
    model = pair()
    optimizer, averager = plain(model), Averager(model, Uniform())
    attached = averager.attach(optimizer)
    for _ in range(steps):
        optimizer.step()
    replaced(model, "")
    before = averager.average() if steps else {}
    if looks:
        averager.summary()
    for _ in range(2):
        with pytest.raises(ValueError, match="has none of the 6 averaged parameters"):
            optimizer.step()
        assert averager.count == steps
    attached.remove()
    after = averager.average() if steps else {}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    optimizer = plain(model)
    averager.attach(optimizer)
    optimizer.step()
    assert averager.count == steps + 1


def test_a_layer_that_was_replaced_after_its_optimizer_was_made_is_told() -> None:
    model = pair()
    optimizer, averager = plain(model), Averager(model, Uniform())
    averager.attach(optimizer)
    optimizer.step()
    replaced(model, "2.")
    with pytest.warns(UserWarning, match=r"SGD has 4 of the 6 averaged .* not 2.weight, 2.bias:"):
        optimizer.step()
    optimizer.step()
    assert averager.count == 3


def test_torchs_state_maker_is_looked_for_at_first_steps_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only an optimizer without a state can be given one; a look walks the stack."""
    looks = iter(range(1))  # one look, and no other
    monkeypatch.setattr(attachment, "_makes_state", lambda: next(looks) > 0)
    model = nn.Linear(3, 2)
    optimizer = plain(model, torch.optim.Adam)
    Averager(model, Uniform()).attach(optimizer)
    for _ in range(4):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    assert next(looks, None) is None
