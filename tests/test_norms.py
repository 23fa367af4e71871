"""Norms: running statistics are the means over batches of what the batches have, or as before."""

from __future__ import annotations

import copy
import signal
import subprocess
import sys
from collections import UserDict, namedtuple
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import sklearn.datasets
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.functional import batch_norm, cross_entropy
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.data import DataLoader, TensorDataset

from models import assert_same, pointers, snapshot
from patience import HANG
from polyak import EMA, Averager, Uniform
from polyak.norms import names, recalibrate, statistics

Modes = tuple[list[bool], list[object], int]
Some = TypeVar("Some", bound=nn.Module)


def mean_and_variance(samples: Tensor, instances: bool = False) -> tuple[Tensor, Tensor]:
    """What a norm sees in a batch (N, C, ...): of all samples at once, or the mean over samples."""
    wide = samples.double()
    if instances:
        flat = wide.flatten(2)
        return flat.mean(2).mean(0), flat.var(2).mean(0)
    channels = wide.transpose(0, 1).flatten(1)
    return channels.mean(1), channels.var(1)


def closed_form(batches: Iterable[Tensor], instances: bool = False) -> list[Tensor]:
    """The means over batches of means and of unbiased variances, in float64."""
    found = [mean_and_variance(batch, instances) for batch in batches]
    return [torch.stack(kind).mean(0) for kind in zip(*found, strict=True)]


def assert_statistics(norm: nn.Module, batches: Iterable[Tensor], tolerance: float = 1e-6) -> None:
    batches = list(batches)
    instances = "InstanceNorm" in type(norm).__name__
    for leaf, wanted in zip(
        ("running_mean", "running_var"), closed_form(batches, instances), strict=True
    ):
        got = norm.get_buffer(leaf).double()
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
    assert norm.num_batches_tracked == len(batches)


def modes(model: nn.Module) -> Modes:
    """Flags, momenta and the number of hooks of all modules."""
    modules = list(model.modules())
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)
    momenta = [getattr(module, "momentum", "none") for module in modules]
    return [module.training for module in modules], momenta, hooks


def worn(model: Some) -> Some:
    """A model with statistics of its own, and modes and momenta that are all different."""
    torch.manual_seed(1)
    module: Any
    for i, module in enumerate(model.modules()):
        module.training = i % 3 == 0
        if hasattr(module, "momentum"):
            module.momentum = None if i % 2 else 0.01 * i
        if getattr(module, "num_batches_tracked", None) is not None:
            module.get_buffer("running_mean").normal_()
            module.get_buffer("running_var").uniform_(0.5, 2.0)
            module.get_buffer("num_batches_tracked").fill_(7 + i)
    return model


class Net(nn.Module):
    """Two kinds of norms, dropout, and a norm that keeps no statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.instances = nn.InstanceNorm2d(4, track_running_stats=True)
        self.plain = nn.BatchNorm2d(4, track_running_stats=False)
        self.layer = nn.LayerNorm(4)
        self.drop = nn.Dropout(0.5)
        self.last = nn.BatchNorm1d(4)

    def forward(self, images: Tensor, scale: float = 1.0) -> Tensor:
        hidden = self.instances(self.norm(scale * self.first(images)).relu())
        pooled = self.layer(self.plain(hidden).amax((2, 3)))
        out: Tensor = self.last(self.drop(pooled))
        return out


def images(count: int = 3, size: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [1 + 2 * torch.randn(size, 3, 6, 6, generator=generator) for _ in range(count)]


KINDS: list[tuple[Callable[[], nn.Module], int]] = [
    (lambda: nn.BatchNorm1d(3), 0),
    (lambda: nn.BatchNorm1d(3, momentum=None, affine=False), 1),
    (lambda: nn.BatchNorm2d(3, dtype=torch.float64), 2),
    (lambda: nn.BatchNorm3d(3, momentum=0.0), 3),
    (lambda: nn.SyncBatchNorm(3), 2),
    (lambda: nn.InstanceNorm1d(3, track_running_stats=True), 1),
    (lambda: nn.InstanceNorm2d(3, momentum=None, track_running_stats=True), 2),  # type: ignore[arg-type]
    (lambda: nn.InstanceNorm3d(3, affine=True, track_running_stats=True), 3),
]


@given(
    kind=st.integers(0, len(KINDS) - 1),
    sizes=st.lists(st.integers(2, 6), min_size=1, max_size=6),
    seed=st.integers(0, 99),
)
def test_the_statistics_are_the_means_over_batches(kind: int, sizes: list[int], seed: int) -> None:
    make, dimensions = KINDS[kind]
    torch.manual_seed(seed)
    norm = worn(make())
    dtype = norm.get_buffer("running_mean").dtype
    scale = torch.rand(3, *[1] * dimensions, dtype=dtype) + 0.5
    batches = [scale * torch.randn(n, 3, *[3] * dimensions, dtype=dtype) + 0.5 for n in sizes]
    assert names(norm) == [""]
    recalibrate(norm, batches)
    assert_statistics(norm, batches)


def test_parity_with_torch_where_torch_can() -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
    )
    ours.append(ours[1])  # once more in the same pass: each call counts
    theirs = copy.deepcopy(ours)
    loader = DataLoader(TensorDataset(torch.randn(50, 3, 6, 6), torch.arange(50)), batch_size=8)
    recalibrate(ours, loader)
    update_bn(loader, theirs)
    for name, wanted in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], wanted, rtol=1e-6, atol=1e-6)
    assert ours[1].num_batches_tracked == 14


def test_lazy_norms_once_they_have_content() -> None:
    norm = nn.LazyBatchNorm1d()
    with pytest.raises(ValueError, match=r"^the model \(LazyBatchNorm1d\) has no content"):
        recalibrate(norm, [torch.randn(4, 2)])
    norm(torch.randn(4, 2))
    batches = [torch.randn(4, 2), torch.randn(4, 2)]
    recalibrate(norm, batches)
    assert_statistics(norm, batches)


def test_a_norm_on_the_meta_device_has_nothing_to_estimate_into() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2, device="meta"))
    with pytest.raises(ValueError, match=r"^0 \(BatchNorm1d\) has no content yet .* meta"):
        recalibrate(model, [torch.randn(4, 2)])


def test_the_last_of_many_batches_count_in_bfloat16_too() -> None:
    centred = torch.tensor([[-1.0], [1.0]], dtype=torch.bfloat16)
    batches = [centred + 1] * 500 + [centred + 2] * 500
    ours, theirs = nn.BatchNorm1d(1).bfloat16(), nn.BatchNorm1d(1).bfloat16()
    recalibrate(ours, batches)
    update_bn(batches, theirs)
    assert_statistics(ours, batches)
    assert theirs.running_mean is not None and theirs.running_mean.item() == 1.0  # it got stuck


def test_only_the_norms_train_and_nothing_else_moves() -> None:
    model = worn(Net())
    inside, gradients = [], []
    model.register_forward_hook(lambda *_: inside.append(modes(model)[0]))
    model.register_forward_hook(lambda *_: gradients.append(torch.is_grad_enabled()))
    before, flags, where = snapshot(model), modes(model), pointers(model)
    random = torch.get_rng_state()
    recalibrate(model, images())
    assert torch.equal(torch.get_rng_state(), random)
    assert modes(model) == flags
    assert pointers(model) == where
    training = [name for name, on in zip(dict(model.named_modules()), inside[0], strict=True) if on]
    assert training == ["norm", "instances", "last"] == names(model)
    changed = {n for n, t in snapshot(model).items() if not torch.equal(t, before[n])}
    leaves = ("running_mean", "running_var", "num_batches_tracked")
    assert changed == {f"{norm}.{leaf}" for norm in names(model) for leaf in leaves}
    assert gradients == [False] * 3
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert_statistics(model.norm, [model.first(batch).detach() for batch in images()])


Pair = namedtuple("Pair", ["inputs", "targets"])


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, packed: nn.utils.rnn.PackedSequence) -> Tensor:
        rows, lengths = nn.utils.rnn.pad_packed_sequence(packed)
        out: Tensor = self.norm(rows[: lengths.min()].flatten(0, 1))
        return out


@pytest.mark.parametrize(
    ("batch_of", "call"),
    [
        (lambda x: x, None),
        (lambda x: (x, torch.zeros(5)), None),
        (lambda x: [x], None),
        (lambda x: Pair(x, None), None),
        (lambda x: {"images": x, "scale": 1.0}, None),
        (lambda x: UserDict({"images": x}), None),
        (lambda x: (x, 1.0), lambda model, batch: model(*batch)),
        (lambda x: {"image": x.numpy()}, lambda model, b: model(torch.from_numpy(b["image"]))),
        (lambda x: x.numpy(), lambda model, batch: model(torch.tensor(batch))),
        (lambda x: Pair(None, {"x": [x]}), lambda model, batch: model(batch.targets["x"][0])),
    ],
)
def test_batches_of_any_structure(batch_of: Callable[[Tensor], Any], call: Any) -> None:
    model, other = worn(Net()), worn(Net())
    recalibrate(model, (batch_of(x) for x in images()), call=call)
    other.load_state_dict(model.state_dict())
    recalibrate(other, images())
    assert_same(snapshot(model), snapshot(other))


def test_a_packed_sequence_is_an_input() -> None:
    model, rows = Packed(), [torch.randn(3, 2), torch.randn(2, 2)]
    recalibrate(model, [nn.utils.rnn.pack_sequence(rows)])
    assert_statistics(model.norm, [torch.cat([row[:2] for row in rows])])


@pytest.mark.parametrize(
    ("batch", "kind"), [(3.0, "float"), ("text", "str"), ((), "tuple"), (None, "NoneType")]
)
def test_a_batch_of_another_kind_is_refused(batch: object, kind: str) -> None:
    model = worn(Net())
    before = snapshot(model)
    wanted = f"a batch is {kind}, wanted a tensor, a mapping .* give call=lambda model, batch"
    with pytest.raises(TypeError, match=wanted) as raised:
        recalibrate(model, [images()[0], batch])
    assert "in batch 2" in raised.value.__notes__[0]
    assert_same(snapshot(model), before)


class Graph:
    """A batch of a library that has its own `to`."""

    device = torch.device("cpu")

    def to(self, device: torch.device) -> Graph:
        moved = Graph()
        moved.device = device
        return moved


def test_batches_are_moved_where_one_says() -> None:
    model, seen = worn(Net()), []

    def call(model: nn.Module, batch: Any) -> None:
        seen.append(batch)
        model(images()[0])

    batch = Pair(torch.zeros(2), {"x": [torch.zeros(1), (torch.ones(1), "text")], "g": Graph()})
    recalibrate(model, [batch], call=call, device="meta")
    (inputs, targets) = seen[0]
    assert isinstance(seen[0], Pair)
    assert inputs.is_meta and targets["x"][0].is_meta and targets["x"][1][0].is_meta
    assert targets["x"][1][1] == "text" and targets["g"].device == torch.device("meta")
    assert not batch.inputs.is_meta and not batch.targets["x"][0].is_meta


def test_batches_are_moved_to_the_first_parameter() -> None:
    model, seen = worn(nn.Module()), []
    model.first = nn.Parameter(torch.zeros(1, device="meta"))
    model.norm = worn(nn.BatchNorm1d(2))

    def call(_: nn.Module, batch: Tensor) -> None:
        seen.append(batch.device)
        model.norm(torch.randn(4, 2))  # type: ignore[operator]

    recalibrate(model, [torch.zeros(1)], call=call)
    assert seen == [torch.device("meta")]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_of_the_cpu_go_to_the_models_device() -> None:
    model = worn(Net())
    on_device = copy.deepcopy(model).cuda()
    recalibrate(model, images())
    recalibrate(on_device, [(x, None) for x in images()])
    for name, wanted in model.state_dict().items():
        torch.testing.assert_close(on_device.state_dict()[name].cpu(), wanted, rtol=1e-4, atol=1e-5)


def fails(error: BaseException) -> Iterator[Tensor]:
    yield from images(2)
    raise error


class Failing(Net):
    """Raises in its third forward pass, behind the first norm."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error, self.passes = error, 0

    def forward(self, images: Tensor, scale: float = 1.0) -> Tensor:
        self.passes += 1
        if self.passes == 3:
            self.norm(self.first(images))
            raise self.error
        return super().forward(images, scale)


ERRORS = [ValueError("mine"), KeyboardInterrupt(), SystemExit(3), StopIteration()]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
@pytest.mark.parametrize("place", ["loader", "forward"])
def test_whatever_is_raised_all_is_as_it_was(error: BaseException, place: str) -> None:
    inside = place == "forward" or isinstance(error, StopIteration)  # a generator cannot raise it
    model = worn(Failing(error) if inside else Net())
    before, flags, where = snapshot(model), modes(model), pointers(model)
    with pytest.raises(type(error)) as raised:
        recalibrate(model, images(4) if inside else fails(error))
    assert raised.value is error
    assert_same(snapshot(model), before)
    assert modes(model) == flags
    assert pointers(model) == where


class Interrupted(nn.BatchNorm1d):
    """An exception falls, once, into the moment when its momentum is put back."""

    times = 0
    error: type[BaseException] = KeyboardInterrupt

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "momentum":
            object.__setattr__(self, "times", self.times + 1)
            if self.times == 3:  # after its own making and the 1 of the pass
                raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt, TimeoutError, SystemExit])
def test_an_exception_while_the_modes_come_back(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a handler of SIGINT, SIGALRM or SIGTERM raises it."""
    monkeypatch.setattr(Interrupted, "error", error)
    model = nn.Sequential(nn.BatchNorm1d(2), Interrupted(2), nn.BatchNorm1d(2), nn.Dropout())
    before, flags = snapshot(model), modes(model)
    with pytest.raises(error):
        recalibrate(model, [torch.randn(4, 2)])
    assert modes(model) == flags
    assert_same(snapshot(model), before)


SIGNALS = """
import os, signal, sys, threading, time
import torch, polyak.norms
from torch import nn
torch.set_num_threads(1)
number = int(sys.argv[1])
class Stop(Exception):
    pass
def handler(*_):
    raise Stop
signal.signal(number, handler)
model = nn.Sequential(*[nn.BatchNorm1d(4) for _ in range(100)], nn.Dropout())
batches = [torch.randn(8, 4) for _ in range(2)]
old = {name: tensor.clone() for name, tensor in model.state_dict().items()}
polyak.norms.recalibrate(model, batches)
began = time.perf_counter()
polyak.norms.recalibrate(model, batches)
span = time.perf_counter() - began
new = {name: tensor.clone() for name, tensor in model.state_dict().items()}
hits = 0
for trial in range(200):
    model.load_state_dict(old)
    def interrupt():
        time.sleep(1.1 * span * trial / 200)
        os.kill(os.getpid(), number)
    thread = threading.Thread(target=interrupt)
    returned = False
    try:
        thread.start()
        polyak.norms.recalibrate(model, batches)
        returned = True
        thread.join()
        time.sleep(0.01)
    except Stop:
        hits += 1
    thread.join()
    wanted = new if returned else old
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, wanted[name]), (trial, name)
    assert all(module.training for module in model.modules()), trial
    assert all(norm.momentum == 0.1 for norm in list(model)[:-1]), trial
    assert not any(module._forward_hooks for module in model.modules()), trial
assert hits == 200, hits
assert signal.getsignal(number) is handler
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGALRM, signal.SIGTERM])
def test_a_handler_that_raises_at_any_moment_loses_nothing(number: int) -> None:
    command = [sys.executable, "-c", SIGNALS, str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_statistics_that_are_not_finite_name_norm_and_batch(bad: float) -> None:
    model = worn(nn.ModuleDict({"late": nn.BatchNorm1d(2), "early": nn.BatchNorm1d(2)}))
    before, flags = snapshot(model), modes(model)
    batches = [torch.randn(4, 2) for _ in range(3)]
    batches[1][0, 0] = bad
    with pytest.raises(
        FloatingPointError, match=r"of early \(BatchNorm1d\) in batch 2 are not fin"
    ):
        recalibrate(model, batches, call=lambda model, x: model["late"](model["early"](x)))  # type: ignore[index]
    assert_same(snapshot(model), before)
    assert modes(model) == flags


def test_a_former_statistic_that_is_not_finite_is_forgotten() -> None:
    norm, batches = nn.BatchNorm1d(2), [torch.randn(4, 2)]
    norm.get_buffer("running_var").fill_(float("nan"))
    recalibrate(norm, batches)
    assert_statistics(norm, batches)


def test_without_a_batch_nothing_is_lost() -> None:
    model = worn(Net())
    before, flags = snapshot(model), modes(model)
    spent = iter(images())
    list(spent)
    empty: list[Iterable[Tensor]] = [[], spent]
    for batches in empty:
        with pytest.raises(ValueError, match="batches has no batch, wanted at least one"):
            recalibrate(model, batches)
    assert_same(snapshot(model), before)
    assert modes(model) == flags


def test_without_norms_no_batch_is_read() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False))
    recalibrate(model, fails(AssertionError("read")))
    assert names(model) == []


def test_arguments_in_the_wrong_places_are_refused() -> None:
    with pytest.raises(TypeError, match=r"model is list, wanted a torch\.nn\.Module"):
        recalibrate([torch.zeros(2, 2)], nn.BatchNorm1d(2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"batches is Tensor, wanted an iterable .* \[batch\]"):
        recalibrate(nn.BatchNorm1d(2), torch.zeros(2, 2))


class Auxiliary(nn.Module):
    """A head that runs in train mode only, as in Inception."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.frozen = (nn.BatchNorm1d(2) for _ in range(3))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.drop(self.body(x))
        return self.head(hidden) + hidden if self.training else hidden


def test_norms_that_no_batch_reached_are_named() -> None:
    model = worn(Auxiliary())
    before, flags = snapshot(model), modes(model)
    batches = [torch.randn(4, 2) for _ in range(3)]
    with pytest.raises(ValueError, match=r"(?s)no batch reached .*head \(Batch.*frozen \(Batch"):
        recalibrate(model, batches)
    assert_same(snapshot(model), before)

    def call(model: nn.Module, batch: Tensor) -> None:
        model.training = True
        model(batch)

    model.frozen.track_running_stats = False
    recalibrate(model, batches, call=call)
    assert modes(model) == flags
    normal = [batch_norm(x, None, None, model.body.weight, model.body.bias, True) for x in batches]
    assert_statistics(model.head, [x.detach() for x in normal])
    assert torch.equal(model.frozen.get_buffer("running_mean"), before["frozen.running_mean"])


class Foreign(nn.Module):
    """A norm of another library; it assigns new tensors to its buffers."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, momentum: float | None = 0.1, decay: bool = False) -> None:
        super().__init__()
        self.momentum, self.decay = momentum, decay
        self.register_buffer("running_mean", torch.zeros(2))
        self.register_buffer("running_var", torch.ones(2))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            assert self.momentum is not None
            new = 1 - self.momentum if self.decay else self.momentum
            self.running_mean = (1 - new) * self.running_mean + new * x.mean(0)
            self.running_var = (1 - new) * self.running_var + new * x.var(0)
            self.num_batches_tracked = self.num_batches_tracked + 1
        return (x - self.running_mean) / self.running_var.sqrt()


def test_foreign_norms_with_torchs_momentum_are_estimated_too() -> None:
    model = worn(nn.Sequential(Foreign(), nn.Dropout(), Foreign(None)))
    where, batches = pointers(model), [torch.randn(4, 2) for _ in range(5)]
    recalibrate(model, batches)
    assert_statistics(model[0], batches)
    assert pointers(model) == where
    before = snapshot(model)
    with pytest.raises(ValueError, match="mine"):
        recalibrate(model, fails(ValueError("mine")), call=lambda model, x: model(x[:, :2, 0, 0]))
    assert pointers(model) == where
    assert_same(snapshot(model), before)


class FrozenByForward(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


@pytest.mark.parametrize("norm", [Foreign(decay=True), FrozenByForward(2)], ids=["decay", "frozen"])
def test_norms_that_do_not_take_a_batch_are_named(norm: nn.Module) -> None:
    model = worn(nn.Sequential(nn.BatchNorm1d(2), norm))
    before, flags = snapshot(model), modes(model)
    with pytest.raises(ValueError, match=r"1 \(F\w+\) kept its running statistics in batch 1, wa"):
        recalibrate(model, [torch.randn(4, 2)])
    assert_same(snapshot(model), before)
    assert modes(model) == flags
    norm.track_running_stats = False  # type: ignore[assignment]
    recalibrate(model, [torch.randn(4, 2)])
    assert torch.equal(norm.get_buffer("running_var"), before["1.running_var"])


class Frozen(nn.Module):
    """As in detection libraries: statistics that are constants, without a momentum."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.randn(2))
        self.register_buffer("running_var", torch.rand(2))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.get_buffer("running_mean")) * self.get_buffer("running_var").rsqrt()


def test_frozen_norms_are_left_alone() -> None:
    switched = nn.BatchNorm1d(2)
    switched.track_running_stats = False  # its buffers stay, and serve in eval mode
    model = worn(nn.Sequential(Frozen(), switched, nn.BatchNorm1d(2)))
    before = snapshot(model)
    recalibrate(model, [torch.randn(4, 2)])
    changed = {n for n, t in snapshot(model).items() if not torch.equal(t, before[n])}
    assert changed == {"2.running_mean", "2.running_var", "2.num_batches_tracked"}


def test_statistics_that_look_like_new_ones_are_no_error() -> None:
    norm, batches = nn.BatchNorm1d(1), [torch.tensor([[-1.0], [0.0], [1.0]])]
    for _ in range(2):
        recalibrate(norm, batches)
        assert_statistics(norm, batches)


def values(model: nn.Module) -> dict[str, Tensor]:
    """A model's state without the names that wrappers give."""
    return {str(i): tensor.clone() for i, tensor in enumerate(model.state_dict().values())}


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager", fullgraph=True)


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, nn.DataParallel, AveragedModel, compiled])
def test_wrapped_models(wrap: Callable[[nn.Module], nn.Module]) -> None:
    torch.compiler.reset()
    plain = worn(Net())
    wrapped = wrap(copy.deepcopy(plain))
    recalibrate(plain, images())
    recalibrate(wrapped, images())
    assert_same(values(wrapped), values(wrap(plain)))
    assert [name.removeprefix("module.") for name in names(wrapped)] == names(Net())


def test_compiled_code_sees_the_statistics_without_a_recompile() -> None:
    calls = 0

    def count(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        nonlocal calls
        calls += 1
        return graph.forward

    torch.compiler.reset()
    model = worn(Net()).eval()
    code: Any = torch.compile(model, backend=count)
    before = code(images()[0])
    recalibrate(code, [2 * x for x in images()])
    after = code(images()[0])
    assert calls == 1
    assert not torch.allclose(before, after, atol=0.1)
    torch.testing.assert_close(after, model(images()[0]))


UNDER_DDP = """
import os, sys
import torch, torch.distributed as dist
from torch import nn
from polyak.norms import names, recalibrate

rank = int(sys.argv[2])
dist.init_process_group("gloo", "file://" + sys.argv[1], rank=rank, world_size=2)
model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)))
assert names(model) == ["0"], names(model)
torch.manual_seed(rank)
batches = [torch.randn(4, 3) for _ in range(5)]
recalibrate(model, batches)
wanted = torch.stack([batch.mean(0) for batch in batches]).mean(0)
torch.testing.assert_close(model.module[0].running_mean, wanted)
model(batches[0]).sum().backward()

group = dist.group.WORLD
everyones = [None, None]
mine = batches[: 5 - 2 * rank]  # five of one, three of the other
dist.all_gather_object(everyones, mine)
recalibrate(model, mine, group=group)
both = [batch for each in everyones for batch in each]
norm = model.module[0]
torch.testing.assert_close(norm.running_mean, torch.stack([b.mean(0) for b in both]).mean(0))
torch.testing.assert_close(norm.running_var, torch.stack([b.var(0) for b in both]).mean(0))
assert int(norm.num_batches_tracked) == 8
before = {name: each.clone() for name, each in norm.state_dict().items()}
for given, on_one, on_the_other in (
    ([batches, []][rank], ValueError, "rank 1: ValueError: batches has no batch"),
    ([batches, torch.ones(4, 3)][rank], TypeError, "rank 1: TypeError: batches is Tensor"),
):
    try:
        recalibrate(model, given, group=group)
    except (ValueError, TypeError) as error:
        assert rank == 1 and type(error) is on_one, error
    except RuntimeError as error:
        assert rank == 0 and on_the_other in str(error), error
    else:
        raise AssertionError
    assert all(torch.equal(each, before[name]) for name, each in norm.state_dict().items())
others = nn.Sequential(nn.BatchNorm1d(3), *[nn.BatchNorm1d(3)] * rank)
try:
    recalibrate(others, batches, group=group)
except ValueError as error:
    assert "ranks do not agree" in str(error) and "rank 1: extra: 1 (BatchNorm1d)" in str(error), error
else:
    raise AssertionError
dist.barrier()
os._exit(0)  # without gloo's clean-up, which may wait for the interpreter's lock for ever
"""


@pytest.mark.slow
def test_processes_under_ddp_estimate_from_their_own_batches_or_from_all(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", UNDER_DDP, str(tmp_path / "store")]
    ranks = [subprocess.Popen([*command, r], stderr=subprocess.PIPE, text=True) for r in "01"]
    for rank in ranks:
        _, errors = rank.communicate(timeout=HANG)
        assert rank.returncode == 0, errors


def test_copies_that_a_forward_pass_makes_are_refused() -> None:
    model = worn(nn.Sequential(nn.BatchNorm1d(2)))
    before = snapshot(model)

    def call(model: nn.Module, batch: Tensor) -> None:
        copy.copy(model[0])(batch)  # type: ignore[index]

    with pytest.raises(
        ValueError, match=r"a copy of 0 \(BatchNorm1d\) was called, as DataParallel"
    ):
        recalibrate(model, [torch.randn(4, 2)], call=call)
    assert_same(snapshot(model), before)


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
def test_scripted_models_are_refused() -> None:
    model = nn.Sequential(torch.jit.script(nn.BatchNorm1d(2)))
    with pytest.raises(TypeError, match="model has norms in a scripted or traced part"):
        recalibrate(model, [torch.randn(4, 2)])


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
def test_a_scripted_part_without_norms_harms_nothing() -> None:
    model, batches = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2)), [torch.randn(4, 2)]
    model[1] = torch.jit.script(model[1])
    recalibrate(model, batches)
    assert_statistics(model[0], batches)


class Overridden(nn.Sequential):
    """As backbones do that keep their norms in eval mode."""

    def train(self, mode: bool = True) -> Overridden:
        raise AssertionError(mode)


def test_train_and_eval_are_not_called() -> None:
    model, batches = Overridden(nn.BatchNorm1d(2)), [torch.randn(4, 2)]
    recalibrate(model, batches)
    assert_statistics(model[0], batches)


def test_names_are_those_that_tensors_have() -> None:
    shared = nn.BatchNorm1d(2)
    model = nn.ModuleDict({"a": Net(), "b": nn.ModuleList([shared]), "again": shared})
    averager = Averager(model, Uniform())
    averager.update()
    assert names(model) == ["a.norm", "a.instances", "a.last", "b.0"]
    assert statistics(averager.average()) == [*names(model), "again"]
    assert statistics(n for n in nn.BatchNorm1d(2).state_dict()) == [""] == names(nn.BatchNorm1d(2))
    odd = ["a.running_mean", "b.running_var", "running_variable", "xrunning_mean", "xrunning_var"]
    assert statistics(odd) == []


def test_an_applied_average_is_recalibrated_for_a_while() -> None:
    model = worn(Net())
    averager = Averager(model, Uniform())
    for _ in range(2):
        averager.update()
        with torch.no_grad():
            model.first.weight.mul_(2.0)
    live, flags, average = snapshot(model), modes(model), averager.average()
    other = copy.deepcopy(model)
    averager.copy_to(other)
    recalibrate(other, images())
    with averager.applied():
        recalibrate(model, images())
        assert_same(snapshot(model), snapshot(other))
    assert_same(snapshot(model), live)
    assert_same(averager.average(), average)
    assert modes(model) == flags


def test_the_articles_class_is_recalibrated_by_its_own_model() -> None:
    live = Net()
    ema = EMA(live, update_after_step=0, update_every=1)
    with pytest.raises(ValueError, match=r"no batch reached (?s:.*)online_model\.norm"):
        recalibrate(ema, images())
    before = snapshot(live)
    recalibrate(ema.ema_model, images())
    assert_same(snapshot(live), before)
    assert_statistics(ema.ema_model.norm, [live.first(x).detach() for x in images()])  # type: ignore


class Digits(nn.Sequential):
    """A small convolutional network for images of 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        for channels in ((1, 16), (16, 32)):
            self.append(nn.Conv2d(*channels, 3, padding=1))
            self.append(nn.BatchNorm2d(channels[1])).append(nn.ReLU())
        self.append(nn.AdaptiveAvgPool2d(1)).append(nn.Flatten())
        self.append(nn.Dropout(0.1)).append(nn.Linear(32, 10))


def digits(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Real images of handwritten digits and their labels: 1000 to train on, 797 to test on."""
    inputs, targets = sklearn.datasets.load_digits(return_X_y=True)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    images = torch.tensor(inputs, dtype=torch.float32).view(-1, 1, 8, 8)[order] / 16
    labels = torch.tensor(targets)[order]
    return (images[:1000], labels[:1000]), (images[1000:], labels[1000:])


def trained(averagers: list[str], train: tuple[Tensor, Tensor]) -> list[Averager]:
    """Averages of all steps of 200 of SGD with a constant learning rate, by policies for buffers."""
    model = Digits()
    found = [Averager(model, Uniform(), buffers=policy) for policy in averagers]  # type: ignore
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(200):
        picked = torch.randint(len(train[0]), (32,))
        cross_entropy(model(train[0][picked]), train[1][picked]).backward()
        optimizer.step()
        optimizer.zero_grad()
        for averager in found:
            averager.update()
    return found


@torch.no_grad()
def loss(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    return cross_entropy(model.eval()(data[0]), data[1]).item()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_long_average_of_a_real_network_gains(seed: int) -> None:
    torch.manual_seed(seed)
    train, test = digits(seed)
    model, losses = Digits(), []
    for averager in trained(["auto", "copy"], train):
        averager.copy_to(model)
        losses.append(loss(model, test))
    recalibrate(model, DataLoader(TensorDataset(*train), batch_size=100))
    averaged_statistics, latest_statistics = losses
    assert loss(model, test) < 0.8 * averaged_statistics
    assert loss(model, test) < 0.5 * latest_statistics
