"""The module of an average: its tensors are the slots, so it is the average at every moment."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import re
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import polyak
from models import Everything, assert_same, pointers, wander
from polyak import Averager, Bema, Exponential, Power, Tail, Window
from polyak._engine.live import ModelTensors
from rule_examples import RULE_EXAMPLES, each_rule
from since import since

EXAMPLES = [rule for rules in RULE_EXAMPLES.values() for rule in rules]
TOKENS = torch.tensor([0, 1, 2, 4])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.cells = nn.LSTM(8, 8)
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.cells(self.body(x))[0])
        return y


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 6)
        self.head = nn.Linear(6, 5, bias=False)
        self.head.weight = nn.Parameter(self.embedding.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(x)
        return y


class Adapted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, 6).requires_grad_(False)
        self.up = nn.Linear(6, 6)
        self.register_buffer("seen", torch.zeros(6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + self.up(x)
        return y


MODELS: dict[str, Callable[[], Any]] = {
    "a linear layer": lambda: nn.Linear(6, 2),
    "norms, cells and a parametrization": Net,
    "tied weights": Tied,
    "a frozen base": Adapted,
    "a compiled model": lambda: torch.compile(nn.Linear(6, 2), backend="eager"),
    "a model compiled in place": lambda: compiled_in_place(Net()),
    "a compiled layer": lambda: beside(torch.compile(nn.Linear(6, 6), backend="eager")),
    "a checkpointed layer": lambda: beside(checkpoint_wrapper(nn.Linear(6, 6))),
    "float64": lambda: Net().double(),
}


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def beside(layer: Any) -> nn.Module:
    return nn.Sequential(layer, nn.Linear(6, 2))


def begun(model: nn.Module, rule: Any = "exponential(0.5)", **options: Any) -> Averager:
    averager = Averager(model, rule, **options)
    averager.update()
    return averager


def inputs(model: nn.Module) -> Tensor:
    return torch.randn(4, 6, dtype=next(model.parameters()).dtype)


@torch.no_grad()
def train(model: nn.Module, averager: Averager, steps: int) -> None:
    for _ in range(steps):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.train()(inputs(model))
        averager.update()


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_it_is_the_average_after_every_update(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make()
    averager = begun(model)
    teacher = averager.module()
    before = pointers(teacher)
    for _ in range(4):
        train(model, averager, 1)
        assert_same(dict(teacher.state_dict()), averager.average())
        x = inputs(model)
        with averager.applied():
            wanted = model.eval()(x)
        assert torch.equal(teacher(x), wanted)
    assert pointers(teacher) == before
    assert averager.module() is teacher


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_it_is_in_eval_mode_without_gradients_and_beside_the_model(
    make: Callable[[], nn.Module],
) -> None:
    model = make()
    averager = begun(model)
    teacher = averager.module()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher(inputs(model)).requires_grad
    tracked = {item.name: item for item in averager.tracked}
    live, mine = pointers(model), pointers(teacher)
    for name, pointer in mine.items():
        shared = tracked[name].policy == "frozen" if name in tracked else False
        own = next((key for key in live if key.endswith(name)), name)
        assert (pointer == live.get(own)) == shared, name


SHARED = [rule for rule in EXAMPLES if len(rule.slots) == 1]


@pytest.mark.parametrize("rule", each_rule(SHARED), ids=str)
def test_every_rule_of_one_slot_has_one(rule: polyak.Rule) -> None:
    model = Everything()
    averager = begun(model, rule)
    teacher = averager.module()
    for step in range(14):
        wander(model, step)
        averager.update()
        assert_same(dict(teacher.state_dict()), averager.average())


REFUSED: dict[str, tuple[Callable[[], Averager], str]] = {
    "a window": (lambda: begun(Net(), Window(3)), r"window\(3\) reads its average from window.0"),
    "bema": (lambda: begun(Net(), Bema()), r"reads its average from average, live, anchor"),
    "a tail of bema": (lambda: begun(Net(), Tail(Bema(), 3)), "reads its average from"),
    "a wide slot": (
        lambda: begun(Net().bfloat16()),
        "body.0.weight is torch.float32 on cpu, and the weight torch.bfloat16 on cpu",
    ),
    "a narrow slot": (
        lambda: begun(Net(), dtype=torch.bfloat16, rounding="stochastic"),
        "is torch.bfloat16 on cpu, and the weight torch.float32",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_others_say_why_and_give_a_copy(kind: str) -> None:
    make, words = REFUSED[kind]
    averager = make()
    with pytest.raises(ValueError, match=rf"module\('average'\).*{words}.*copy=True"):
        averager.module()
    teacher = averager.module(copy=True)
    averager.copy_to(teacher)
    dtype = next(teacher.parameters()).dtype
    for name, tensor in averager.average().items():
        assert torch.equal(teacher.state_dict()[name], tensor.to(teacher.state_dict()[name].dtype))
    assert not teacher.training and dtype == next(iter(averager.tracked)).local().dtype


def test_several_averages_have_a_module_each() -> None:
    model = Net()
    averager = begun(model, {"fast": Exponential(0.5), "slow": Exponential(0.9), "w": Window(2)})
    modules = {name: averager.module(name) for name in ("fast", "slow")}
    train(model, averager, 3)
    for name, module in modules.items():
        assert_same(dict(module.state_dict()), averager.average(name))
    with pytest.raises(KeyError, match="average None is unknown"):
        averager.module()


def test_it_is_the_average_inside_a_block_too() -> None:
    """There slots hold the live weights, unless a module has them."""
    model = Net()
    averager = begun(model)
    with averager.applied():  # notes slots that exchange
        pass
    teacher = averager.module()
    train(model, averager, 2)
    x, average = inputs(model), averager.average()
    live = copy.deepcopy(model.state_dict())
    with averager.applied():
        assert_same(dict(teacher.state_dict()), average)
        assert torch.equal(teacher(x), model.eval()(x))
        with pytest.raises(RuntimeError, match=r"module inside applied"):
            averager.module()
    assert_same(dict(model.state_dict()), live)
    assert_same(averager.average(), average)
    del teacher
    gc.collect()
    held = averager.summary().memory
    with averager.applied():
        assert averager.summary is not None
    assert averager.summary().memory == held


def test_there_is_none_before_the_first_update_or_of_a_mapping() -> None:
    with pytest.raises(RuntimeError, match="module: there is no average before the first update"):
        Averager(Net(), "uniform()").module()
    averager = Averager({"w": torch.zeros(2)}, "uniform()")
    averager.update()
    with pytest.raises(TypeError, match="module: the averager is of a dict, wanted a module"):
        averager.module()


class Keyed(nn.Linear):
    def __deepcopy__(self, memo: object) -> Keyed:
        raise TypeError("no copies")


def test_a_model_that_cannot_be_copied_says_so() -> None:
    averager = begun(Keyed(2, 2))
    for share in (False, True):
        with pytest.raises(RuntimeError, match=r"module: Keyed cannot be copied \(no copies\)"):
            averager.module(copy=share)


# Writes to it


def test_batchnorm_in_train_mode_uses_the_batch_and_writes_nothing() -> None:
    """As teachers in train mode do; the slots stay, and so does what an update makes of them."""
    model = Net()
    averager, alone = begun(model), begun(model)
    teacher = averager.module().train()
    x = inputs(model)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    wanted: Any = copy.deepcopy(teacher)
    wanted.body[1].track_running_stats = True
    assert torch.equal(teacher(x), wanted(x))
    assert_same(dict(teacher.state_dict()), before)
    train(model, averager, 1)
    alone.update()
    assert_same(averager.average(), alone.average())


class Counting(nn.Module):
    """A layer that writes to an averaged buffer in train mode."""

    running_mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))
        self.register_buffer("running_mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.running_mean.lerp_(x.detach().mean(0), 0.1)
        return x * self.weight - self.running_mean


@torch.no_grad()
def by_hand(teacher: nn.Module) -> None:
    next(teacher.parameters()).add_(1)


def by_an_optimizer(teacher: nn.Module) -> None:
    optimizer = torch.optim.SGD(teacher.requires_grad_(True).parameters(), lr=0.1)
    teacher(torch.randn(4, 6)).square().mean().backward()
    optimizer.step()


def by_a_layer(teacher: nn.Module) -> None:
    teacher.train()(torch.randn(4, 6))


WRITES: dict[str, Callable[[nn.Module], None]] = {
    "by hand": by_hand,
    "by an optimizer": by_an_optimizer,
    "by a layer in train mode": by_a_layer,
    "by a load": lambda teacher: teacher.load_state_dict(Counting().state_dict()) and None,
}
READS: dict[str, Callable[[Averager], object]] = {
    "update": Averager.update,
    "average": Averager.average,
    "state_dict": Averager.state_dict,
    "module": Averager.module,
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("write", WRITES)
def test_a_write_to_it_is_noticed_and_spoils_the_average(write: str, read: str) -> None:
    averager = begun(Counting())
    state = copy.deepcopy(averager.state_dict())
    teacher = averager.module()
    WRITES[write](teacher)
    with pytest.raises(RuntimeError, match=r"of module\('average'\) was written to"):
        READS[read](averager)
    averager.update()
    with pytest.raises(RuntimeError, match="load a saved state first"):
        averager.average()
    averager.load_state_dict(state)
    assert_same(dict(teacher.state_dict()), averager.average())
    averager.update()


def test_an_optimizer_that_was_given_its_parameters_does_nothing() -> None:
    model = Net()
    averager = begun(model)
    teacher = averager.module()
    every = [*model.parameters(), *teacher.parameters()]
    optimizer = torch.optim.AdamW(every, lr=0.1, weight_decay=0.5)
    for _ in range(3):
        (model(inputs(model)) - teacher(inputs(model))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        averager.update()
    assert_same(dict(teacher.state_dict()), averager.average())


MOVES: dict[str, Callable[[Any], object]] = {
    "half": lambda teacher: teacher.half(),
    "double": lambda teacher: teacher.to(torch.float64),
    "meta": lambda teacher: teacher.to("meta"),
    "assign": lambda teacher: teacher.load_state_dict(Net().state_dict(), assign=True),
    "other tables": lambda teacher: teacher.body[0].__setstate__(Net().body[0].__dict__),
}


@pytest.mark.parametrize("move", MOVES)
def test_a_module_that_was_converted_is_noticed_once(move: str) -> None:
    model = Net()
    averager = begun(model)
    teacher = averager.module()
    MOVES[move](teacher)
    with pytest.raises(
        RuntimeError, match=r"no longer shares the average's memory.*moved or converted"
    ):
        averager.update()
    averager.update()
    again = averager.module()
    assert again is not teacher
    assert_same(dict(again.state_dict()), averager.average())


def test_what_moves_nothing_is_no_move() -> None:
    model = Net()
    averager = begun(model)
    teacher = averager.module().to("cpu").float()
    train(model, averager, 2)
    assert_same(dict(teacher.state_dict()), averager.average())


def test_empty_tensors_are_on_no_memory_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them have the address 0; an update looks the model up again only where it must."""
    model = nn.Linear(3, 2)
    model.empty = nn.Parameter(torch.empty(0))
    averager, alone = begun(model), Averager(model, "exponential(0.5)")
    alone.begin(averager.average(), averager.count)
    module = averager.module()
    wander(model, 9)
    alone.update()
    monkeypatch.setattr(ModelTensors, "check", None)
    averager.update()
    monkeypatch.undo()
    assert_same(dict(module.state_dict()), alone.average())


# What becomes of the slots


def _own_slots(averager: Averager) -> dict[str, Tensor]:
    return dict(averager.state_dict()["averages"]["average"]["slots"]["average"])


TAKEN: dict[str, Callable[[nn.Linear, dict[str, Tensor]], object]] = {
    "by loading": lambda m, t: m.load_state_dict(t, assign=True),
    "a Parameter": lambda m, t: setattr(m, "weight", nn.Parameter(t["weight"].detach())),
    ".data": lambda m, t: setattr(m.weight, "data", t["weight"]),
    "set_": lambda m, t: torch.no_grad()(cast(Any, m.weight).set_)(t["weight"].detach()),
    ".data of a row": lambda m, t: setattr(m.bias, "data", t["weight"][:, 0]),
}
"""Ways in which a model gets the memory of slots, given by name."""

READ: dict[str, Callable[[Averager], object]] = {
    "begin": lambda a: a.begin(),
    "change_rule": lambda a: a.change_rule("exponential(0.9)"),
    "to": lambda a: a.to(torch.float64),
    "average": lambda a: a.average(),
    "applied('average')": lambda a: a.applied().__enter__(),
    "copy_to": lambda a: a.copy_to(copy.deepcopy(a.model)),
    "pull": lambda a: a.pull(0.5),
    "state_dict": lambda a: a.state_dict(),
    "load_state_dict": lambda a: a.load_state_dict(STATE),
    "module": lambda a: a.module(),
    "summary": lambda a: a.summary(),
    "update": lambda a: a.update(),
}

STATE: dict[str, Any] = {}
"""The state of a scene, for the call that loads one."""


def _scene() -> tuple[nn.Linear, Averager]:
    model = nn.Linear(2, 2)
    averager = Averager(model, "exponential(0.5)")
    for step in range(3):
        wander(model, step)
        averager.update()
    STATE.clear()
    STATE.update(copy.deepcopy(averager.state_dict()))
    return model, averager


@pytest.mark.parametrize("shared", [False, True], ids=["slots", "module"])
@pytest.mark.parametrize("way", TAKEN)
def test_a_model_on_the_memory_of_slots_is_refused_by_name(way: str, shared: bool) -> None:
    for read, call in READ.items():
        if read == "update" and not shared and way not in ("by loading", "a Parameter"):
            continue  # an update looks at no address; every other call does
        model, averager = _scene()
        module = averager.module() if shared else None
        kept = copy.deepcopy(averager.average())
        TAKEN[way](model, dict(module.named_parameters()) if module else _own_slots(averager))
        wanted = rf"^{re.escape(read)}: .*of the model (is a slot|was one of its slots)"
        for _ in range(2):
            with pytest.raises(RuntimeError, match=wanted):
                call(averager)
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
        live = copy.deepcopy(model.state_dict())
        averager.load_state_dict(STATE)
        assert_same(averager.average(), kept)
        assert_same(dict(model.state_dict()), live)


WRITTEN: dict[str, tuple[bool, bool]] = {
    "never": (False, False),
    "before it is noticed": (True, False),
    "after it is noticed": (False, True),
}
"""When training writes to slots that the model has: before the first refusal, after it."""


@pytest.mark.parametrize("shared", [False, True], ids=["slots", "module"])
@pytest.mark.parametrize("way", TAKEN)
@pytest.mark.parametrize("when", WRITTEN)
def test_an_average_that_a_model_had_is_usable_unless_training_changed_it(
    when: str, way: str, shared: bool
) -> None:
    """Autograd counts no writes to memory that `.data` or `set_` has given: such an average is suspect."""
    model, averager = _scene()
    module = averager.module() if shared else None
    kept = averager.average()
    TAKEN[way](model, dict(module.named_parameters()) if module else _own_slots(averager))
    for writes in WRITTEN[when]:
        if writes:
            _step(model)
        with pytest.raises(RuntimeError, match="of the model is a slot"):
            averager.average()
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    _step(model)
    if when == "never" and way in ("by loading", "a Parameter"):
        assert_same(averager.average(), kept)
        averager.update()
    else:
        with pytest.raises(RuntimeError, match="load a saved state first"):
            averager.average()
    averager.load_state_dict(STATE)
    assert_same(averager.average(), kept)


def _step(model: nn.Module) -> None:
    model(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


@pytest.mark.parametrize("read", READ)
def test_in_a_block_on_its_module_calls_are_refused_and_it_is_unhurt(read: str) -> None:
    model, averager = _scene()
    module = averager.module()
    of_module = Averager(module, "exponential(0.5)")
    of_module.update()
    wander(model, 3)
    averager.update()
    before, inside = averager.average(), of_module.average()
    with of_module.applied():
        wanted = rf"^{re.escape(read)}: module\('average'\) has an average, in a block"
        with pytest.raises(RuntimeError, match=wanted):
            READ[read](averager)
        assert_same(dict(module.state_dict()), inside)
    assert_same(averager.average(), before)
    assert_same(dict(module.state_dict()), before)


def test_a_loaded_state_is_in_the_module_at_the_same_place() -> None:
    model = Net()
    averager = begun(model)
    state = copy.deepcopy(averager.state_dict())
    wanted = averager.average()
    teacher = averager.module()
    train(model, averager, 3)
    before = pointers(teacher)
    averager.load_state_dict(state)
    assert_same(dict(teacher.state_dict()), wanted)
    assert pointers(teacher) == before
    train(model, averager, 1)
    assert_same(dict(teacher.state_dict()), averager.average())


def test_a_state_without_an_average_is_refused_while_a_module_has_the_slots() -> None:
    model = Net()
    empty = Averager(model, "exponential(0.5)").state_dict()
    averager = begun(model)
    teacher = averager.module()
    with pytest.raises(ValueError, match="has no update yet"):
        averager.load_state_dict(empty)
    assert_same(dict(teacher.state_dict()), averager.average())
    del teacher
    averager.load_state_dict(empty)


def test_it_goes_on_while_the_model_is_moved() -> None:
    model = Net()
    averager = begun(model)
    teacher = averager.module()
    model.double()
    train(model, averager, 2)
    average = {name: tensor.float() for name, tensor in averager.average().items()}
    assert all(torch.equal(t.float(), average[n]) for n, t in teacher.state_dict().items())


def test_unselected_weights_are_the_models_as_they_are() -> None:
    model: Any = Net()
    averager = begun(model, select="body.*")
    teacher: Any = averager.module()
    train(model, averager, 2)
    assert torch.equal(teacher.cells.weight_hh_l0, model.cells.weight_hh_l0)
    model.cells.weight_hh_l0 = nn.Parameter(torch.zeros(32, 8))
    train(model, averager, 1)
    assert torch.equal(teacher.cells.weight_hh_l0, model.cells.weight_hh_l0)


@pytest.mark.parametrize("make", [Net, Counting], ids=["of layers", "of tensors of its own"])
def test_it_is_let_go_with_the_last_who_holds_it(make: Callable[[], nn.Module]) -> None:
    model = make()
    averager = begun(model)
    first = weakref.ref(averager.module())
    gc.collect()
    assert first() is None
    train(model, averager, 1)
    assert_same(dict(averager.module().state_dict()), averager.average())


# Copies and pickles


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_deep_copy_is_a_plain_module(make: Callable[[], nn.Module]) -> None:
    model = make()
    averager = begun(model)
    copied = copy.deepcopy(averager.module())
    before = {name: tensor.clone() for name, tensor in copied.state_dict().items()}
    train(model, averager, 2)
    assert_same(dict(copied.state_dict()), before)
    assert not set(pointers(copied).values()) & set(pointers(averager.module()).values())


@pytest.mark.slow
def test_a_pickle_is_a_plain_module(tmp_path: Path) -> None:
    averager = begun(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    torch.save(averager.module(), tmp_path / "module.pt")
    pickle.dumps(averager.module())
    code = (
        "import sys, torch; m = torch.load('module.pt', weights_only=False); "
        "m(torch.ones(2, 3)); assert 'polyak' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_it_compiles_and_follows() -> None:
    model = nn.Linear(6, 2)
    averager = begun(model)
    teacher = averager.module()
    compiled = torch.compile(teacher, backend="eager")
    for _ in range(3):
        train(model, averager, 1)
        x = inputs(model)
        assert torch.equal(compiled(x), teacher(x))


# Beside others


@pytest.mark.parametrize("decay", [0.9, 0.999])
def test_it_is_torchs_averaged_model(decay: float) -> None:
    torch.manual_seed(0)
    model = Net()
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    averager = Averager(model, Exponential(decay))
    theirs.update_parameters(model)
    averager.update()
    teacher = averager.module()
    for _ in range(20):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.train()(inputs(model))
        theirs.update_parameters(model)
        averager.update()
    x = inputs(model)
    for name, tensor in teacher.named_parameters():
        torch.testing.assert_close(tensor, theirs.module.get_parameter(name))
    torch.testing.assert_close(teacher(x), theirs.eval()(x))


class Head(nn.Module):
    """A small vision model with a projection head, as DINO trains."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten())
        self.last = nn.utils.parametrizations.weight_norm(nn.Linear(4 * 36, 8, bias=False))
        self.last.parametrizations.weight.original0.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.body(x))
        return y


def self_distillation(make: Callable[[Head], tuple[nn.Module, Callable[[], None]]]) -> list[Any]:
    """Ten steps of a student that follows its teacher; the losses, and the teacher at the end."""
    torch.manual_seed(0)
    student = Head()
    teacher, follow = make(student)
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.5)
    center, losses = torch.zeros(8), []
    for _ in range(10):
        first, second = torch.randn(16, 1, 8, 8), torch.randn(16, 1, 8, 8)
        with torch.no_grad():
            targets = ((teacher(first) - center) / 0.04).softmax(-1)
            center = 0.9 * center + 0.1 * teacher(first).mean(0)
        loss = -(targets * (student(second) / 0.1).log_softmax(-1)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        follow()
        losses.append(loss.item())
    return [losses, {n: t.clone() for n, t in teacher.state_dict().items()}]


def with_polyak(student: Head) -> tuple[nn.Module, Callable[[], None]]:
    averager = Averager(student, Exponential(0.9))
    averager.update()
    return averager.module(), averager.update


def with_torch(student: Head) -> tuple[nn.Module, Callable[[], None]]:
    averaged = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    averaged.update_parameters(student)
    return averaged.module.eval(), lambda: averaged.update_parameters(student)


def test_a_self_distillation_loop_is_that_of_torch() -> None:
    (ours, teacher), (theirs, wanted) = map(self_distillation, (with_polyak, with_torch))
    assert ours == pytest.approx(theirs, rel=1e-4)
    for name, tensor in teacher.items():
        if tensor.is_floating_point():  # torch counts the batches of the first model alone
            torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=1e-5)


def test_a_target_network_loop_is_the_plain_formula() -> None:
    """Soft actor-critic's two critics in one module, with tau = .005, by hand beside."""
    torch.manual_seed(0)
    critic = nn.ModuleList(
        nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 1)) for _ in range(2)
    )
    by_hand = copy.deepcopy(critic)
    averager = Averager(critic, Exponential(1 - 0.005))
    averager.update()
    target = averager.module()
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-2)
    for _ in range(10):
        seen, then, reward = torch.randn(16, 5), torch.randn(16, 5), torch.randn(16, 1)
        with torch.no_grad():
            value = torch.min(*(q(then) for q in target.children()))
            wanted = torch.min(*(q(then) for q in by_hand))
        torch.testing.assert_close(value, wanted)
        loss = sum((q(seen) - reward - 0.99 * value).square().mean() for q in critic)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        averager.update()
        with torch.no_grad():
            for mine, live in zip(by_hand.parameters(), critic.parameters(), strict=True):
                mine.mul_(0.995).add_(live, alpha=0.005)
    for mine, held in zip(by_hand.parameters(), target.parameters(), strict=True):
        torch.testing.assert_close(held, mine)


def test_a_narrow_model_has_a_module_in_its_own_dtype() -> None:
    for rounding in ("stochastic", "compensated"):
        model = Net().bfloat16()
        averager = begun(model, Power(3.0), dtype=torch.bfloat16, rounding=rounding)
        teacher = averager.module()
        train(model, averager, 3)
        assert_same(dict(teacher.state_dict()), averager.average())


def test_a_saved_run_goes_on_in_the_module(tmp_path: Path) -> None:
    model = Net()
    averager = begun(model)
    train(model, averager, 2)
    polyak.save(tmp_path / "it", averager)
    teacher = averager.module()
    wanted = io.BytesIO()
    torch.save(teacher.state_dict(), wanted)
    train(model, averager, 2)
    polyak.load(tmp_path / "it", averager)
    wanted.seek(0)
    assert_same(dict(teacher.state_dict()), torch.load(wanted))


@pytest.mark.usefixtures("lone_rank")
def test_it_is_the_plain_model_of_one_in_ddp() -> None:
    model = nn.parallel.DistributedDataParallel(Net())
    averager = begun(model)
    teacher = averager.module()
    assert type(teacher) is Net
    train(model, averager, 2)
    assert_same(dict(teacher.state_dict()), averager.average())


@since("2.7", "FSDP2 on the CPU")
@pytest.mark.usefixtures("lone_rank")
@pytest.mark.filterwarnings("ignore:.torch.distributed.all_gather_into_tensor. is deprecated")
def test_a_sharded_model_is_refused_by_name() -> None:
    mesh = init_device_mesh("cpu", (1,))
    sharded: Any = nn.Linear(6, 2)
    fully_shard(sharded, mesh=mesh)
    averager = begun(sharded)
    for share in (False, True):
        with pytest.raises(ValueError, match=r"module: weight is sharded \(fully_shard"):
            averager.module(copy=share)
    model = nn.Linear(6, 2)
    rows = begun(model, shard=mesh)
    with pytest.raises(TypeError, match=r"with shard= has a process group"):
        copy.deepcopy(rows)
    with pytest.raises(ValueError, match=r"each rank has a shard of weight \(shard=\)"):
        rows.module()
    assert_same(dict(rows.module(copy=True).state_dict()), dict(model.state_dict()))
