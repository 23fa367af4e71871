"""Weights that a script replaces, by any of Python's and torch's ways: the averager follows, or raises.

A new way joins a table by one line: `FOLLOWED` where names and shapes stay, `REFUSED` where not.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import polyak
from models import assert_same, snapshot, wander
from polyak import EMA, Averager, Exponential, Uniform
from polyak import _parts as parts
from polyak._engine.live import ModelTensors
from quick import first_quick


def network() -> nn.Sequential:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    return nn.Sequential(nn.Linear(3, 3), inner, nn.ReLU(), nn.Linear(3, 2))


def fresh(tensor: Tensor) -> Any:
    """The same kind of tensor with other values."""
    other = tensor.detach() + 1
    return nn.Parameter(other) if isinstance(tensor, nn.Parameter) else other


def assign(model: Any) -> None:
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def new_table(module: nn.Module, table: str) -> None:
    setattr(module, table, {name: fresh(t) for name, t in getattr(module, table).items()})


def every_table(model: Any) -> None:
    for module in model.modules():
        new_table(module, "_parameters")
        new_table(module, "_buffers")


def ordered(model: Any) -> None:
    for module in model.modules():
        module._parameters = OrderedDict(reversed(copy.deepcopy(module._parameters).items()))


def in_dict(model: Any) -> None:
    model[0].__dict__["_parameters"] = copy.deepcopy(model[0]._parameters)


def data(model: Any) -> None:
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data + 1


def swapped(model: Any) -> None:
    for module in model.modules():
        for name, tensor in module._parameters.items():
            torch.utils.swap_tensors(tensor, fresh(tensor))
            assert module._parameters[name] is tensor


def deleted_and_set(model: Any) -> None:
    weight = fresh(model[3].weight)
    del model[3].weight
    model[3].weight = weight


def buffer_again(model: Any) -> None:
    model[1][1].register_buffer("running_mean", torch.ones(3))
    model[1][1].register_buffer("num_batches_tracked", torch.tensor(70))


def functional(model: Any) -> None:
    """A functional call puts other tensors in for a while, and the old ones back."""
    weights = {name: fresh(p) for name, p in model.named_parameters()}
    torch.func.functional_call(model, weights, (torch.randn(4, 3),))


FOLLOWED: dict[str, Callable[[Any], object]] = {
    "load_state_dict(assign=True)": assign,
    "_parameters replaced": lambda m: new_table(m[1][0], "_parameters"),
    "_parameters replaced, in another order": ordered,
    "_parameters replaced in __dict__": in_dict,
    "_buffers replaced": lambda m: new_table(m[1][1], "_buffers"),
    "every table replaced": every_table,
    "_modules replaced": lambda m: setattr(m, "_modules", copy.deepcopy(m._modules)),
    "_modules of a child replaced": lambda m: setattr(m[1], "_modules", copy.deepcopy(m[1]._modules)),
    "__dict__.update": lambda m: m.__dict__.update(copy.deepcopy(m.__dict__)),
    "__dict__.update of a child": lambda m: m[3].__dict__.update(copy.deepcopy(m[3].__dict__)),
    "__dict__ set": lambda m: setattr(m, "__dict__", copy.deepcopy(m.__dict__)),
    "__dict__ of a child set": lambda m: setattr(m[3], "__dict__", copy.deepcopy(m[3].__dict__)),
    "__setstate__": lambda m: m.__setstate__(copy.deepcopy(m.__dict__)),
    "__setstate__ of a child": lambda m: m[1][1].__setstate__(copy.deepcopy(m[1][1].__dict__)),
    "a module replaced": lambda m: m.__setitem__(3, nn.Linear(3, 2)),
    "a module with children replaced": lambda m: m.__setitem__(1, copy.deepcopy(m[1])),
    "a parameter set": lambda m: setattr(m[0], "weight", fresh(m[0].weight)),
    "a parameter deleted and set": deleted_and_set,
    "a buffer registered again": buffer_again,
    ".data set": data,
    "swap_tensors": swapped,
    "double()": lambda m: m.double(),
    "one layer bfloat16": lambda m: m[3].bfloat16(),
    "to_empty and loaded": lambda m: (s := copy.deepcopy(m.state_dict()), m.to_empty(device="cpu"), m.load_state_dict(s)),
    "functional_call": functional,
}  # fmt: skip


def averaged_over(model: Any, change: Callable[[Any], object]) -> None:
    """Holds the averager to the mean of what the model held at each update, before and after."""
    averager = Averager(model, Uniform())
    path = []
    for step in range(6):
        if step == 3:
            change(model)
        wander(model, step)
        path.append(snapshot(model))
        averager.update()
    average, live = averager.average(), snapshot(model)
    assert average.keys() == live.keys()
    for name, tensor in average.items():
        if name.endswith("num_batches_tracked"):
            assert torch.equal(tensor, live[name]), name
        else:
            mean = torch.stack([state[name].double() for state in path]).mean(0)
            torch.testing.assert_close(tensor.double(), mean, rtol=1e-5, atol=1e-5, msg=name)
    with averager.applied():
        for name, tensor in snapshot(model).items():
            assert torch.equal(tensor, average[name].to(tensor.dtype)), name
    assert_same(snapshot(model), live)


@pytest.mark.parametrize("way", FOLLOWED)
def test_replaced_weights_are_followed(way: str) -> None:
    averaged_over(network(), FOLLOWED[way])


TABLES = [way for way in FOLLOWED if way.startswith("_")]


@pytest.mark.parametrize("way", TABLES)
def test_the_law_fails_where_tables_are_not_looked_at(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: an averager that keeps the tables of the start averages dead weights."""
    monkeypatch.setattr(ModelTensors, "_replaced", lambda _: False)
    with pytest.raises(AssertionError):
        averaged_over(network(), FOLLOWED[way])


@pytest.mark.parametrize("way", FOLLOWED)
def test_the_articles_class_follows(way: str) -> None:
    ema = EMA(network(), beta=0.5, update_after_step=0, update_every=1, min_value=0.5)
    for step in range(3):
        wander(ema.model, step)
        ema.update()
    FOLLOWED[way](ema.model)
    for _ in range(60):
        ema.update()
    live = snapshot(ema.model)
    for name, tensor in snapshot(ema.ema_model).items():
        torch.testing.assert_close(tensor.double(), live[name].double(), rtol=1e-6, atol=1e-6)


def adapted(model: Any) -> None:
    parametrize.register_parametrization(model[0], "weight", nn.Identity())


def buffer_instead(model: Any) -> None:
    del model[0].bias
    model[0].register_buffer("bias", torch.ones(3))


REFUSED: dict[str, tuple[Callable[[Any], object], str]] = {
    "a parametrization": (adapted, "missing: 0.weight\n  extra: 0.parametrizations.weight.original"),
    "weight_norm": (lambda m: parametrizations.weight_norm(m[3]), "missing: 3.weight\n  extra: 3.para"),
    "spectral_norm": (lambda m: parametrizations.spectral_norm(m[3]), "missing: 3.weight"),
    "pruning": (lambda m: prune.l1_unstructured(m[3], "weight", 1), "missing: 3.weight\n  extra: 3.weight_orig"),
    "a parameter removed": (lambda m: delattr(m[0], "bias"), "missing: 0.bias"),
    "a parameter set to None": (lambda m: setattr(m[0], "bias", None), "missing: 0.bias"),
    "a module removed": (lambda m: m.__delitem__(3), "missing: 3.weight, 3.bias"),
    "a module set to None": (lambda m: m._modules.__setitem__("3", None), "missing: 3.weight, 3.bias"),
    "a module added": (lambda m: m.append(nn.Linear(1, 1)), "extra: 4.weight, 4.bias"),
    "a module with other names": (lambda m: m.__setitem__(3, nn.BatchNorm1d(2)), "extra: 3.running_mean"),
    "a parameter added": (lambda m: setattr(m[3], "scale", nn.Parameter(torch.ones(1))), "extra: 3.scale"),
    "a copied buffer removed": (lambda m: delattr(m[1][1], "num_batches_tracked"), "missing: 1.1.num_"),
    "a copied buffer set to None": (lambda m: setattr(m[1][1], "num_batches_tracked", None), "missing: 1.1.num_"),
    "a buffer instead of a parameter": (
        buffer_instead,
        r"0.bias: \(\(3,\), 'copy'\), wanted",
    ),
    "on the meta device": (lambda m: m[3].to("meta"), "3.weight is on the meta device"),
    "a mixture": (lambda m: setattr(m, "_modules", {"0": nn.Linear(3, 3)}), "missing: 1.0.weight"),
}  # fmt: skip


@pytest.mark.parametrize("way", REFUSED)
def test_other_names_are_refused_at_the_update_and_nothing_moves(way: str) -> None:
    change, message = REFUSED[way]
    model = network()
    averager = Averager(model, Uniform())
    averager.update()
    before = averager.state_dict()["averages"]["average"]["slots"]["average"]
    before = {name: tensor.clone() for name, tensor in before.items()}
    tables = [dict(module.__dict__) for module in model.modules()]
    kept = [{k: copy.copy(v) if isinstance(v, dict) else v for k, v in t.items()} for t in tables]
    modules = list(model.modules())
    classes = [type(module) for module in modules]
    change(model)
    with pytest.raises(RuntimeError, match=message):
        averager.update()
    for module, state, its_class in zip(modules, kept, classes, strict=True):
        module.__class__ = its_class
        module.__dict__.clear()
        module.__dict__.update(state)
    assert averager.count == 1
    assert_same(averager.average(), {**averager.average(), **before})


@pytest.mark.parametrize("key", [1, None, ("a", "b"), b"w", 0.5])
def test_a_key_that_is_not_a_name_is_refused(key: Any, tmp_path: Any) -> None:
    with pytest.raises(TypeError, match=r"model has the key .*, wanted names"):
        Averager({key: torch.ones(2), "w": torch.ones(2)}, Uniform())
    averager = Averager({"w": torch.ones(2)}, Uniform())
    averager.update()
    with pytest.raises(TypeError, match=r"model has the key .*, wanted names"):
        averager.copy_to({key: torch.ones(2)})
    for options in ({"buffers": {key: "copy"}}, {"select": [key]}):
        with pytest.raises(
            TypeError, match=r"has the pattern .*, wanted a string: a name or a glob"
        ):
            Averager({"w": torch.ones(2)}, Uniform(), **options)
    for option in ("ignore_names", "ignore_startswith_names", "param_or_buffer_names_no_ema"):
        with pytest.raises(TypeError, match=f"EMA {option} is .*, wanted a collection of names"):
            EMA(nn.Linear(1, 1), **{option: {key}})  # type: ignore[arg-type]
    polyak.save(tmp_path / "average.safetensors", averager)


def test_a_lone_string_is_not_a_collection_of_names() -> None:
    with pytest.raises(TypeError, match="EMA ignore_names is 'bias', wanted a collection of names"):
        EMA(nn.Linear(1, 1), ignore_names="bias")


def test_the_articles_class_walks_each_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    walked: list[Any] = []
    from polyak._engine import tracking

    walk = tracking.walk

    def counted(module: nn.Module, prefix: str) -> Any:
        if not prefix:
            walked.append(module)
        return walk(module, prefix)

    monkeypatch.setattr(tracking, "walk", counted)
    ema = EMA(network())
    assert [id(module) for module in walked] == [id(ema.model), id(ema.ema_model)]


LAZY: dict[str, Callable[[Tensor], Tensor]] = {
    "negative": lambda data: torch._neg_view(-data),
    "conjugate": lambda data: data.conj().resolve_conj().conj(),
}
"""Views of which torch stores the opposite sign; each reads as the data itself."""


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
@pytest.mark.parametrize(
    "slots", first_quick([None, torch.bfloat16, torch.float64, torch.float32, torch.float16], 2)
)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64]
)
@pytest.mark.parametrize("nonfinite", ["allow", "skip"])
def test_a_view_that_torch_stores_with_the_opposite_sign_is_averaged_as_it_reads(
    dtype: torch.dtype, slots: Any, rounding: Any, nonfinite: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a tensor is converted part by part."""
    if rounding == "stochastic" and (
        slots not in (torch.bfloat16, torch.float16) or dtype.is_complex
    ):
        return
    monkeypatch.setattr(parts, "CHUNK_BYTES", 256)
    options: Any = {"dtype": slots, "rounding": rounding, "nonfinite": nonfinite}
    data = [
        torch.randn(n, 7, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (1, 40)
    ]
    averages = []
    for view in (None, LAZY["conjugate" if dtype.is_complex else "negative"]):
        weights = {str(i): torch.zeros_like(each) for i, each in enumerate(data)}
        averager = Averager(weights, Exponential(0.5), **options)
        for _ in range(2):
            averager.update()
            for i, each in enumerate(data):
                weights[str(i)].data = each.clone() if view is None else view(each)
        averager.update()
        # Without a call, which would refuse the view.
        averages.append(averager._averages["average"].slots["average"])
    for plain, lazy in zip(*averages, strict=True):
        assert torch.equal(plain, lazy)
