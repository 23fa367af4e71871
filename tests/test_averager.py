"""The averager: the oracle `engine == profile @ trajectory`, and every promise of its docstring."""

from __future__ import annotations

import io
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.nn.utils import prune

import polyak
from models import Everything, assert_same, everything, pointers, snapshot, wander
from patience import HANG
from polyak import Averager, Exponential, Tail, Uniform, Window
from polyak.rules import Rule
from polyak.theory import profile
from quick import first_quick
from rule_examples import RULE_EXAMPLES, each_rule

EXAMPLES = [rule for rules in RULE_EXAMPLES.values() for rule in rules]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64]


def layouts(dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of every layout: dense, transposed, channels last, gappy, scalar, empty."""
    return {
        "dense": torch.randn(3, 4).to(dtype),
        "transposed": torch.randn(4, 3).to(dtype).t(),
        "channels_last": torch.randn(2, 3, 2, 2).to(dtype).to(memory_format=torch.channels_last),
        "gappy": torch.randn(4, 6).to(dtype)[:, ::2],
        "scalar": torch.randn(()).to(dtype),
        "empty": torch.randn(0, 3).to(dtype),
    }


def run(
    weights: dict[str, Tensor], averager: Averager, steps: int, elapsed: float | None = None
) -> dict[str, Tensor]:
    """Moves the weights at random and updates; the trajectory, (steps, ...) by name, in float64."""
    trajectory: dict[str, list[Tensor]] = {name: [] for name in weights}
    for _ in range(steps):
        for name, tensor in weights.items():
            tensor.add_(0.1 * torch.randn(tensor.shape).to(tensor.dtype))
            wide = torch.complex128 if tensor.is_complex() else torch.float64
            trajectory[name].append(tensor.to(wide, copy=True))
        averager.update(elapsed)
    return {name: torch.stack(tensors) for name, tensors in trajectory.items()}


@pytest.mark.parametrize("rule", each_rule(EXAMPLES), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_engine_is_the_profile_times_the_trajectory(rule: Rule, dtype: torch.dtype) -> None:
    weights = layouts(dtype)
    averager = Averager(weights, rule)
    trajectory = run(weights, averager, 37)
    coefficients = torch.from_numpy(profile(rule, 37))
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for name, average in averager.average().items():
        path = trajectory[name]
        expected = torch.tensordot(coefficients.to(path.dtype), path, dims=1)
        torch.testing.assert_close(average.to(path.dtype), expected, rtol=0, atol=10 * tolerance)


@pytest.mark.parametrize("rule", each_rule(EXAMPLES), ids=str)
@pytest.mark.parametrize("every", [2, 5])
def test_a_cadence_is_the_profile_of_that_cadence(rule: Rule, every: int) -> None:
    weights = layouts(torch.float64)
    averager = Averager(weights, rule, every=every)
    trajectory = run(weights, averager, 43)
    coefficients = torch.from_numpy(profile(rule, 43, every=every))
    assert averager.count == -(-43 // every)
    for name, average in averager.average().items():
        expected = torch.tensordot(coefficients, trajectory[name], dims=1)
        torch.testing.assert_close(average, expected, rtol=0, atol=1e-12)


@given(
    elapsed=st.lists(st.floats(0.5, 40), min_size=1, max_size=30),
    rule=st.sampled_from(EXAMPLES),
)
def test_time_may_pass_unevenly(elapsed: list[float], rule: Rule) -> None:
    from polyak.theory import coefficients

    weights = {"w": torch.zeros(len(elapsed), dtype=torch.float64)}
    averager = Averager(weights, rule)
    for i, dt in enumerate(elapsed):
        weights["w"].zero_()[i] = 1.0
        averager.update(dt)
    expected = torch.from_numpy(coefficients(rule, elapsed))
    torch.testing.assert_close(averager.average()["w"], expected, rtol=0, atol=1e-12)


def test_several_averages_in_one_pass_equal_each_alone() -> None:
    model = Everything()
    rules = {str(rule): rule for rule in EXAMPLES}
    together = Averager(model, rules)
    alone = {name: Averager(model, rule) for name, rule in rules.items()}
    for step in range(12):
        wander(model, step)
        for averager in (together, *alone.values()):
            averager.update()
    for name, averager in alone.items():
        assert_same(together.average(name), averager.average())


@pytest.mark.parametrize("rule", each_rule(EXAMPLES), ids=str)
@given(value=st.floats(-(2.0**60), 2.0**60, width=32))
@settings(max_examples=10)
def test_a_constant_input_is_a_fixed_point_bit_for_bit(rule: Rule, value: float) -> None:
    weights = {"w": torch.full((5,), value)}
    averager = Averager(weights, rule)
    for _ in range(23):
        averager.update()
    assert torch.equal(averager.average()["w"], weights["w"])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_copy_forgets_what_the_slot_held(poison: float) -> None:
    weights = {"w": torch.tensor([poison])}
    averager = Averager(weights, Tail(Uniform(), start=1))
    averager.update()
    weights["w"].fill_(2.0)
    averager.update()
    assert averager.average()["w"].item() == 2.0


def test_narrow_weights_are_averaged_in_float32_and_move() -> None:
    weights = {"w": torch.full((1,), 1.0, dtype=torch.bfloat16)}
    averager = Averager(weights, Exponential(0.999))
    averager.update()
    weights["w"].fill_(1.5)
    for _ in range(2000):
        averager.update()
    average = averager.average()["w"]
    assert average.dtype == torch.float32
    assert average.item() == pytest.approx(1.5 - 0.5 * 0.999**2000, rel=1e-4)


def test_the_dtype_of_the_slots_is_as_asked() -> None:
    weights = {"w": torch.ones(2), "z": torch.ones(2, dtype=torch.complex64)}
    averager = Averager(weights, Exponential(0.9), dtype=torch.float64)
    averager.update()
    dtypes = {name: tensor.dtype for name, tensor in averager.average().items()}
    assert dtypes == {"w": torch.float64, "z": torch.complex128}


# Models


def test_every_kind_of_tensor_gets_its_policy() -> None:
    averager = Averager(Everything(), Exponential(0.9))
    policies = {row.name: row.policy for row in averager.summary().rows}
    copied = {"counter", "mask", "spectral_u", "norm.num_batches_tracked"}
    assert {name for name, policy in policies.items() if policy == "copy"} == copied
    assert {name for name, policy in policies.items() if policy == "skip"} == {"cache"}
    assert policies["norm.running_mean"] == policies["norm.running_var"] == "average"
    assert policies["scale"] == policies["phase"] == "average"
    assert policies["frozen"] == "frozen"


def test_buffers_are_averaged_or_copied_by_kind() -> None:
    model = Everything()
    averager = Averager(model, Uniform())
    path = []
    for step in range(4):
        wander(model, step)
        path.append(snapshot(model))
        averager.update()
    average = averager.average()
    mean = torch.stack([state["norm.running_mean"] for state in path]).mean(0)
    torch.testing.assert_close(average["norm.running_mean"], mean)
    for name in ("counter", "mask", "spectral_u", "norm.num_batches_tracked"):
        assert torch.equal(average[name], path[-1][name])


def test_the_average_has_the_keys_of_the_models_state() -> None:
    model = Everything()
    averager = Averager(model, Exponential(0.9))
    averager.update()
    assert averager.average().keys() == model.state_dict().keys()
    other = Everything()
    other.load_state_dict(averager.average())


def test_tied_weights_are_averaged_once() -> None:
    model = Everything()
    averager = Averager(model, Exponential(0.9))
    averager.update()
    with torch.no_grad():
        model.embedding.weight.add_(1.0)
    averager.update()
    average = averager.average()
    assert average["head.weight"] is average["embedding.weight"]
    moved = average["head.weight"] - (model.head.weight - 1)
    torch.testing.assert_close(moved, torch.full_like(moved, 0.1))
    assert (
        list(averager.state_dict()["averages"]["average"]["slots"]["average"]).count("head.weight")
        == 0
    )


@pytest.mark.parametrize(
    ("buffers", "policy"),
    [("copy", "copy"), ("average", "average"), ({"norm.*": "copy"}, "copy")],
)
def test_buffers_as_asked(buffers: Any, policy: str) -> None:
    averager = Averager(Everything(), Exponential(0.9), buffers=buffers)
    policies = {row.name: row.policy for row in averager.summary().rows}
    assert policies["norm.running_mean"] == policy
    assert policies["counter"] == "copy"


def test_a_pattern_may_name_parameters() -> None:
    averager = Averager(Everything(), Exponential(0.9), buffers={"body.*": "copy"})
    assert {r.policy for r in averager.summary().rows if r.name.startswith("body")} == {"copy"}


@pytest.mark.parametrize(
    "select", ["body.*", ["body.weight", "body.bias"], lambda name: name.startswith("body")]
)
def test_select_leaves_the_rest_alone(select: Any) -> None:
    model = Everything()
    averager = Averager(model, Exponential(0.5), select=select)
    averager.update()
    assert list(averager.average()) == ["body.weight", "body.bias"]
    wander(model, 0)
    live = snapshot(model)
    with averager.applied():
        assert torch.equal(model.scale, live["scale"])
        assert not torch.equal(model.body.weight, live["body.weight"])


class Uncopyable(nn.Linear):
    def __deepcopy__(self, memo: object) -> Uncopyable:
        raise TypeError("cannot be copied")


def test_a_model_that_cannot_be_copied_is_averaged() -> None:
    averager = Averager(Uncopyable(2, 2), Exponential(0.9))
    averager.update()
    assert list(averager.average()) == ["weight", "bias"]


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_modules_after_materialisation() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"0.weight is not materialised yet.*one forward pass"):
        Averager(model, Exponential(0.9))
    model(torch.randn(2, 5))
    averager = Averager(model, Exponential(0.9))
    averager.update()
    assert averager.average()["0.weight"].shape == (3, 5)


def test_names_are_canonical_under_compile_and_checkpoint_wrappers() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    plain = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    names = list(Averager(plain, Exponential(0.9)).summary().rows)
    compiled: Any = torch.compile(plain[1])
    wrapped = nn.Sequential(checkpoint_wrapper(plain[0]), compiled)
    for model in (torch.compile(plain), wrapped, nn.DataParallel(plain)):
        rows = Averager(model, Exponential(0.9)).summary().rows  # type: ignore[arg-type]
        assert [row.name for row in rows] == [row.name for row in names]


UNDER_DDP = """
import os, sys
import torch, torch.distributed as dist
from torch import nn
from polyak import Averager, Uniform

dist.init_process_group("gloo", "file://" + sys.argv[1], rank=0, world_size=1)
plain = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
model = nn.parallel.DistributedDataParallel(plain)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
averager = Averager(model, Uniform())
averager.attach(optimizer)
path = []
for _ in range(3):
    model(torch.randn(4, 3)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    path.append(plain[0].weight.detach().clone())
average = averager.average()
assert average.keys() == plain.state_dict().keys(), average.keys()
torch.testing.assert_close(average["0.weight"], torch.stack(path).mean(0))
with averager.applied():
    assert torch.equal(plain[0].weight, average["0.weight"])
averager.copy_to(plain)
os._exit(0)  # without gloo's clean-up, which may wait for the interpreter's lock for ever
"""


@pytest.mark.slow
def test_a_model_under_ddp_trains_and_is_averaged_by_its_plain_names(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", UNDER_DDP, str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr


def test_a_submodule_that_is_called_module_keeps_its_name() -> None:
    model = nn.ModuleDict({"module": nn.Linear(1, 1)})
    names = [row.name for row in Averager(model, Exponential(0.9)).summary().rows]
    assert names == ["module.weight", "module.bias"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_parameters_that_to_moved_are_followed(dtype: torch.dtype) -> None:
    model = nn.Linear(3, 2)
    averager = Averager(model, Exponential(0.5))
    averager.update()
    before = averager.average()["weight"].double()
    model.to(dtype)
    with torch.no_grad():
        model.weight.add_(1.0)
    averager.update()
    average = averager.average()["weight"]
    assert average.dtype == torch.float32
    torch.testing.assert_close(
        average.double(), (before + model.weight.double()) / 2, rtol=1e-6, atol=1e-6
    )


def test_part_of_a_model_that_moved_is_followed() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    averager = Averager(model, Uniform())
    averager.update()
    first = averager.average()
    model[1].double()
    wander(model, 0)
    averager.update()
    for name, tensor in averager.average().items():
        live = model.state_dict()[name].double()
        torch.testing.assert_close(tensor.double(), (first[name] + live) / 2, rtol=0, atol=1e-6)


def test_replaced_parameters_are_followed() -> None:
    model = nn.Linear(3, 2)
    averager = Averager(model, Exponential(0.5))
    averager.update()
    model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}, assign=True)
    averager.update()
    torch.testing.assert_close(averager.average()["bias"], model.bias.detach() - 0.5)


def test_a_mapping_follows_what_it_holds() -> None:
    weights = {"w": torch.zeros(2), "step": torch.tensor(3)}
    averager = Averager(weights, Exponential(0.5))
    averager.update()
    weights["w"] = torch.ones(2)
    averager.update()
    assert averager.average()["w"].tolist() == [0.5, 0.5]
    assert averager.average()["step"].item() == 3


def test_slots_on_another_dtype_and_device_as_asked() -> None:
    averager = Averager({"w": torch.ones(2)}, Exponential(0.5), device="cpu")
    averager.update()
    assert averager.average()["w"].device == torch.device("cpu")


# State


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("dtype", first_quick([torch.bfloat16, torch.float32, torch.float64]))
@pytest.mark.parametrize("stop", [0, 1, 7, 12])
def test_a_resumed_average_is_the_undisturbed_one_bit_for_bit(
    dtype: torch.dtype, stop: int
) -> None:
    rules = {str(rule): rule for rule in EXAMPLES}
    model = everything(dtype)
    state = snapshot(model)
    undisturbed = Averager(model, rules, every=3)
    for step in range(20):
        wander(model, step)
        undisturbed.update(0.5)

    model.load_state_dict({k: state[k] for k in model.state_dict()})
    model.cache.copy_(state["cache"])
    averager = Averager(model, rules, every=3)
    for step in range(20):
        if step == stop:
            saved = through_a_file(averager.state_dict())
            averager = Averager(model, rules, every=3)
            averager.load_state_dict(saved)
        wander(model, step)
        averager.update(0.5)
    for name in rules:
        assert_same(averager.average(name), undisturbed.average(name))


def test_loading_copies_the_tensors() -> None:
    weights = {"w": torch.zeros(2)}
    first, second = (Averager(weights, Exponential(0.5)) for _ in range(2))
    first.update()
    second.load_state_dict(first.state_dict())
    weights["w"].fill_(1.0)
    second.update()
    assert first.average()["w"].tolist() == [0.0, 0.0]


def changed(state: dict[str, Any], **tensors: Tensor | None) -> dict[str, Any]:
    """The state with other tensors in the only slot; None takes one away."""
    average = state["averages"]["average"]
    slot = {**average["slots"]["average"], **tensors}
    slot = {name: tensor for name, tensor in slot.items() if tensor is not None}
    return {**state, "averages": {"average": {**average, "slots": {"average": slot}}}}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": None}, "missing: weight"),
        ({"gain": torch.ones(1)}, "extra: gain"),
        ({"weight": torch.ones(7, 7)}, r"different: weight: \(\(7, 7\), torch.float32\), wanted"),
        ({"weight": torch.ones(2, 3).double()}, r"weight: \(\(2, 3\), torch.float64\), wanted"),
    ],
)
def test_a_state_of_other_tensors_is_refused_and_nothing_changes(
    tensors: dict[str, Tensor | None], message: str
) -> None:
    model = nn.Linear(3, 2)
    averager = Averager(model, Exponential(0.5))
    averager.update()
    before = averager.average()
    with pytest.raises(ValueError, match=message):
        averager.load_state_dict(changed(averager.state_dict(), **tensors))
    assert_same(averager.average(), before)
    assert averager.count == 1


def test_a_state_of_another_rule_says_so() -> None:
    weights = {"w": torch.zeros(2)}
    state = Averager(weights, Exponential(0.9)).state_dict()
    with pytest.raises(ValueError, match=r"average: exponential\(0.9\), wanted exponential\(0.5\)"):
        Averager(weights, Exponential(0.5)).load_state_dict(state)
    with pytest.raises(ValueError, match="missing: fast\n  extra: average"):
        Averager(weights, {"fast": Exponential(0.9)}).load_state_dict(state)
    with pytest.raises(ValueError, match="format is 7, wanted 1"):
        Averager(weights, Exponential(0.9)).load_state_dict({**state, "format": 7})


def test_a_state_with_other_slots_or_copies_is_refused() -> None:
    model = nn.BatchNorm1d(2)
    averager = Averager(model, Window(2))
    averager.update()
    state = averager.state_dict()
    with pytest.raises(
        ValueError, match="copies: the tensors differ\n  missing: num_batches_tracked"
    ):
        averager.load_state_dict({**state, "copies": {"x": torch.ones(1)}})
    slots = {"window.9": state["averages"]["average"]["slots"]["window.0"]}
    average = {**state["averages"]["average"], "slots": slots}
    with pytest.raises(ValueError, match=r"has slots \['window.9'\], wanted \['window.0'\]"):
        averager.load_state_dict({**state, "averages": {"average": average}})


BROKEN_STATES: list[tuple[str, Any, str]] = [
    ("calls", None, "calls is None, wanted an integer >= 0"),
    ("calls", -5, "calls is -5, wanted an integer >= 0"),
    ("elapsed", float("nan"), "elapsed is nan, wanted a finite number >= 0"),
    ("skipped", "x", "skipped is 'x', wanted an integer >= 0"),
    ("copies", {}, "copies: the tensors differ\n  missing: 1.num_batches_tracked"),
    ("copies", {"1.num_batches_tracked": torch.tensor(1.0)}, "different: 1.num_batches_tracked"),
    ("averages", [], "averages is list, wanted a mapping"),
    ("averages", {"average": 3}, "average 'average' is int, wanted a mapping"),
    ("averages.average.tick", [1, 1.0], r"tick is \[1, 1.0\], wanted \[n, t, elapsed, inner\]"),
    ("averages.average.tick", [-1, 1.0, 1.0, None], "tick, n is -1, wanted an integer >= 0"),
    ("averages.average.tick", [3, float("nan"), 1.0, None], "tick, t is nan, wanted a finite"),
    ("averages.average.tick", [3, 3.0, 0.0, None], "wanted 0 < elapsed <= t"),
    ("averages.average.tick", [3, 3.0, 1.0, [1, 1.0, 1.0, None]], "which is not this rule's clock"),
    (
        "averages.average.slots",
        {},
        r"has slots \[\], wanted \['window.0', 'window.1', 'window.2'\]",
    ),
    ("averages.average.slots.window.2", None, "slot window.2 is NoneType, wanted a mapping"),
    ("averages.average.slots.window.1.0.bias", 3.0, "different: 0.bias: float, wanted"),
    ("averages.average.slots.window.1.0.bias", torch.ones(2, device="meta"), "a tensor on meta"),
]


def replaced(state: Any, path: str, value: Any) -> Any:
    """The state with another value at a path of keys, some of which have dots."""
    key = next(key for key in state if path == key or path.startswith(f"{key}."))
    rest = path[len(key) + 1 :]
    return {**state, key: replaced(state[key], rest, value) if rest else value}


@pytest.mark.parametrize(("path", "value", "message"), BROKEN_STATES)
def test_a_broken_state_is_refused_and_nothing_changes(path: str, value: Any, message: str) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    full = Averager(model, Window(3))
    for step in range(3):
        wander(model, step)
        full.update()
    before = full.average()
    with pytest.raises(ValueError, match=f"(?s)load_state_dict: .*{message}"):
        full.load_state_dict(replaced(full.state_dict(), path, value))
    assert_same(full.average(), before)
    assert full.count == 3


@pytest.mark.parametrize("state", [None, [], {}, {"format": 1}])
def test_what_is_no_state_is_refused(state: Any) -> None:
    with pytest.raises(ValueError, match=r"load_state_dict: the state (is|lacks)"):
        Averager(nn.Linear(2, 2), Uniform()).load_state_dict(state)


def test_a_tail_without_its_inner_clock_is_refused() -> None:
    weights = {"w": torch.zeros(2)}
    tail = Averager(weights, Tail(Uniform(), 1))
    tail.update()
    state = tail.state_dict()
    with pytest.raises(ValueError, match="which is not this rule's clock"):
        tail.load_state_dict(replaced(state, "averages.average.tick", [1, 1.0, 1.0, None]))


def test_a_moved_models_state_loads_again() -> None:
    model = nn.Linear(2, 2)
    averager = Averager(model, Uniform())
    averager.update()
    model.double()
    averager.load_state_dict(averager.state_dict())
    assert {row.slot_dtype for row in averager.summary().rows} == {torch.float32}


# Failures on the way


def test_an_update_that_fails_is_no_update(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    model = nn.Linear(2, 2)
    averager = Averager(model, Exponential(0.5))
    monkeypatch.setattr(torch, "_foreach_copy_", fails)
    with pytest.raises(torch.OutOfMemoryError):
        averager.update()
    monkeypatch.undo()
    assert averager.count == 0
    averager.update()
    assert_same(averager.average(), snapshot(model))


def test_a_rule_whose_first_move_is_no_copy_is_refused() -> None:
    class Impatient(Uniform):
        def fractions(self, tick: Any) -> dict[str, float]:  # noqa: ARG002
            return {"average": 0.1}

    with pytest.raises(ValueError, match=r"first moves slot 'average' by 0.1, wanted 1"):
        Averager({"w": torch.ones(2)}, Impatient()).update()


def test_slots_made_in_inference_mode_are_ordinary() -> None:
    model = nn.Linear(2, 2)
    averager = Averager(model, Window(2))
    with torch.inference_mode():
        averager.update()
        averager.load_state_dict(averager.state_dict())
    averager.update()
    with torch.inference_mode():
        made = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"weight was made under torch.inference_mode\(\)"):
        Averager(made, Uniform())


# Changes of the model


def test_the_order_of_a_model_may_change() -> None:
    model = nn.ParameterDict({"a": torch.zeros(2), "b": torch.full((2,), 10.0)})
    weights = {"a": torch.zeros(2), "b": torch.full((2,), 10.0)}
    ordered, mapped = Averager(model, Exponential(0.9)), Averager(weights, Exponential(0.9))
    for averaged in (ordered, mapped):
        averaged.update()
    first = model["a"]
    del model["a"]
    model["a"] = first
    weights["a"] = weights.pop("a") + 1
    for averaged in (ordered, mapped):
        averaged.update()
    assert ordered.average()["a"].tolist() == [0.0, 0.0]
    assert ordered.average()["b"].tolist() == [10.0, 10.0]
    torch.testing.assert_close(mapped.average()["a"], torch.full((2,), 0.1))
    with ordered.applied():
        assert model["b"].tolist() == [10.0, 10.0]


def test_a_replaced_module_is_followed() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    averager = Averager(model, Exponential(0.5))
    averager.update()
    fresh = model[1] = nn.Linear(2, 2, bias=False)
    nn.init.constant_(fresh.weight, 100.0)
    for _ in range(40):
        averager.update()
    torch.testing.assert_close(averager.average()["1.weight"], torch.full((2, 2), 100.0))


def test_a_parameter_that_became_integer_is_refused() -> None:
    model = nn.Linear(2, 2)
    averager = Averager(model, Uniform())
    averager.update()
    model.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(RuntimeError, match=r"weight: \(\(2, 2\), 'copy'\), wanted .* 'average'"):
        averager.update()


def test_a_copied_buffer_of_another_shape_is_refused_and_the_clock_stays() -> None:
    model = nn.BatchNorm1d(2)
    averager = Averager(model, Uniform())
    averager.update()
    model.num_batches_tracked = torch.zeros(3, dtype=torch.int64)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"num_batches_tracked: \(\(3,\), 'copy'\)"):
            averager.update()
    model.num_batches_tracked = torch.tensor(5)
    averager.update()
    assert averager.count == 2
    assert averager._averages["average"].tick.t == 2.0


def test_unsaved_integer_buffers_stay_the_models() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("positions", torch.arange(4), persistent=False)
    averager = Averager(model, Uniform())
    averager.update()
    model.load_state_dict(averager.average())


def test_copy_to_a_state_dict_of_tied_weights() -> None:
    model = Everything()
    averager = Averager(model, Uniform())
    averager.update()
    wander(model, 0)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    averager.copy_to(state)
    assert_same(state, averager.average())


# copy_to


def test_copy_to_another_model_rounds_to_its_dtype() -> None:
    model = nn.Linear(3, 2)
    averager = Averager(model, Exponential(0.5))
    averager.update()
    target: Any = torch.compile(nn.Linear(3, 2).to(torch.bfloat16))
    averager.copy_to(target)
    expected = averager.average()["weight"].to(torch.bfloat16)
    assert torch.equal(target.weight, expected)


def test_copy_to_the_live_model_is_switch_ema() -> None:
    model = nn.Linear(3, 2)
    averager = Averager(model, Exponential(0.5))
    averager.update()
    where = pointers(model)
    wander(model, 0)
    averager.update()
    averager.copy_to(model)
    assert_same(averager.average(), snapshot(model))
    assert pointers(model) == where


def test_copy_to_a_model_of_other_names_or_shapes_is_refused() -> None:
    averager = Averager(nn.Linear(3, 2), Exponential(0.5))
    averager.update()
    with pytest.raises(ValueError, match=r"missing: bias\n  different: weight: \(4, 4\), wanted"):
        averager.copy_to(nn.Linear(4, 4, bias=False))


# Errors


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Averager({}, Exponential(0.5)), ValueError, "nothing to average among 0 tensors"),
        (lambda: anything([1]), TypeError, "model is list, wanted a torch.nn"),
        (lambda: anything({"w": 1}), TypeError, r"model\['w'\] is int, wanted"),
        (lambda: averager(0.999), TypeError, r"a rule is 0.999, wanted .* Exponential\(0.999\)"),
        (lambda: averager({}), ValueError, "rule is an empty mapping"),
        (lambda: averager({1: Uniform()}), TypeError, "an average's name is 1, wanted a string"),
        (lambda: averager(every=0), ValueError, "every is 0, wanted an integer >= 1"),
        (lambda: averager(every=2.5), ValueError, "every is 2.5, wanted an integer >= 1"),
        (lambda: averager(dtype=torch.int8), ValueError, "dtype is torch.int8, wanted one of"),
        (
            lambda: averager(dtype="float32"),
            ValueError,
            "dtype is 'float32', wanted one of torch.flo",
        ),
        (lambda: averager(buffers="all"), ValueError, "buffers is 'all', wanted \"auto\""),
        (lambda: averager(buffers={"x*": "copy"}), ValueError, "'x\\*' matches no tensor; .* w"),
        (lambda: averager(buffers={"w": "mean"}), ValueError, "buffers\\['w'\\] is 'mean', wanted"),
        (
            lambda: averager(buffers={"n": "average"}),
            ValueError,
            'n is torch.int64, which has no average; wanted "copy"',
        ),
        (lambda: averager(select="v"), ValueError, "select pattern 'v' matches no tensor"),
        (lambda: averager(select=lambda _: False), ValueError, "nothing to average among 2"),
        (
            lambda: Averager(nn.Linear(1, 1, device="meta"), Uniform()),
            ValueError,
            "weight is on the meta device and has no content: materialise",
        ),
        (
            lambda: Averager(partitioned(), Uniform()),
            ValueError,
            "weight is partitioned by DeepSpeed ZeRO-3 and is empty .* use ZeRO 1 or 2",
        ),
        (
            lambda: Averager({"w": torch.eye(2).to_sparse()}, Uniform()),
            ValueError,
            r"w has layout torch.sparse_coo, wanted torch.strided: give the model its .to_dense\(\)",
        ),
        (
            lambda: averager_of(lambda: torch.nested.nested_tensor([torch.ones(2)] * 2)),
            ValueError,
            r"w is nested, wanted torch.strided: give the model its .unbind\(\) parts",
        ),
    ],
)
def test_bad_arguments_say_what_was_wanted(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


class Scripted(nn.Module):
    """A weight and a scripted part, as e3nn's layers: its tensors do not train, if it has any."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.weight, part = nn.Parameter(torch.ones(2)), nn.Identity()
        if kind == "a frozen weight":
            part.register_parameter("v", nn.Parameter(torch.ones(2), requires_grad=False))
        elif kind != "no tensor":
            part.register_buffer("v", torch.ones(2), persistent=kind == "a buffer")
        self.part = torch.jit.script(part)


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
@pytest.mark.parametrize(
    "kind", ["no tensor", "a frozen weight", "a buffer", "a buffer that it does not save"]
)
def test_a_scripted_part_without_averaged_weights_harms_nothing(kind: str) -> None:
    model = Scripted(kind)
    averager = Averager(model, Uniform())
    for value in (1.0, 3.0):
        with torch.no_grad():
            model.weight.fill_(value)
            model.state_dict().get("part.v", torch.ones(2)).fill_(value)
        averager.update()
    with averager.applied():
        assert model.weight.tolist() == [2, 2]
    assert model.weight.tolist() == [3, 3]
    if kind == "no tensor":  # EMA averages the others, too
        polyak.EMA(model).update()
    average = averager.average()
    assert {name: t.tolist() for name, t in average.items()} == {
        name: [2, 2] if name == "weight" else [3, 3] for name in model.state_dict()
    }


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
def test_averaged_weights_of_scripted_and_traced_modules_are_refused_with_what_works() -> None:
    traced = torch.jit.trace(nn.Linear(2, 1), torch.ones(1, 2))
    scripted = torch.jit.script(nn.Sequential(nn.Linear(2, 1)))
    for model, name in (
        (scripted, "0.weight"),
        (nn.Sequential(nn.Linear(2, 2), traced), "1.weight"),
    ):
        with pytest.raises(ValueError, match=f"^{name} belongs to a scripted or traced module"):
            Averager(model, Uniform())
        with pytest.raises(ValueError, match=f"^{name} belongs to a scripted or traced module"):
            polyak.EMA(model)
    averager = Averager(dict(scripted.named_parameters()), Uniform())
    for value in (1.0, 3.0):
        with torch.no_grad():
            for weight in scripted.parameters():
                weight.fill_(value)
        averager.update()
    with averager.applied():
        assert scripted(torch.ones(1, 2)).item() == 6
    assert scripted(torch.ones(1, 2)).item() == 9
    part = Averager(nn.Sequential(nn.Linear(2, 2), traced), Uniform(), select="0.*")
    part.update()
    assert list(part.average()) == ["0.weight", "0.bias"]


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
def test_an_average_is_copied_to_a_scripted_model_also_in_a_block() -> None:
    model, target = nn.Linear(2, 1), torch.jit.script(nn.Linear(2, 1))
    averager = Averager(model, Uniform())
    averager.update()
    other = Averager(nn.Linear(2, 1), Uniform())
    other.update()
    with other.applied():
        averager.copy_to(target)
    assert torch.equal(target.weight, model.weight)


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="since torch 2.8")
@pytest.mark.parametrize("select", ["trainable", "*"])
def test_weights_of_which_a_byte_holds_two_are_copied(select: str) -> None:
    packed = torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    averager = Averager({"w": torch.ones(2), "packed": packed}, Uniform(), select=select)
    packed.view(torch.uint8).fill_(7)
    averager.update()
    assert averager.average()["packed"].view(torch.uint8).tolist() == [7] * 4
    assert "float4_e2m1fn_x2 is copied, not averaged" in str(averager.summary())


def averager_of(make: Callable[[], Tensor]) -> Averager:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of tensors that it deprecates
        return Averager({"w": make(), "v": torch.ones(1)}, Uniform())


QUANTIZED: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "a frozen parameter": lambda m, q: setattr(m, "q", nn.Parameter(q, requires_grad=False)),
    "a buffer": lambda m, q: m.register_buffer("q", q),
    "an unsaved buffer": lambda m, q: m.register_buffer("q", q, persistent=False),
}


@pytest.mark.filterwarnings("ignore:torch.*deprecated")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"select": "*"},
        {"select": "weight"},
        {"buffers": {"q": "copy"}},
        {"buffers": {"q": "skip"}},
    ],
    ids=str,
)
@pytest.mark.parametrize("held", QUANTIZED)
def test_quantized_tensors_beside_the_weights_are_kept(held: str, options: dict[str, Any]) -> None:
    """None of them is averaged; a copied one is that of the last update."""
    first, second, live = (
        torch.quantize_per_tensor(t, 0.1, 0, torch.quint8) for t in torch.eye(3)[[0, 1, 0]]
    )
    model = nn.Linear(2, 1)
    QUANTIZED[held](model, live)
    averager = Averager(model, Uniform(), **options)
    averager.update()
    policy = next(item.policy for item in averager.tracked if item.name == "q")
    model.q.copy_(second)  # type: ignore[operator]
    with averager.applied():
        seen = model.q.dequantize()  # type: ignore[operator]
    assert torch.equal(seen, (first if policy == "copy" else second).dequantize())
    assert torch.equal(model.q.dequantize(), second.dequantize())  # type: ignore[operator]


def partitioned() -> nn.Module:
    """As DeepSpeed leaves a model between its passes: no content, and a number of its own."""
    model = nn.Linear(2, 1)
    for number, parameter in enumerate(model.parameters()):
        parameter.data = torch.empty(0)
        parameter.ds_id = number  # type: ignore[attr-defined]
    return model


def anything(model: Any) -> Averager:
    return Averager(model, Uniform())


def averager(rule: Any = Uniform(), **options: Any) -> Averager:  # noqa: B008  # frozen
    return Averager({"w": torch.zeros(2), "n": torch.tensor(1)}, rule, **options)


@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize(
    ("first", "due"),
    [
        ("update", [1, 4, 7]),
        ("skipped", [2, 5]),
        ("begin", [3, 6]),
        ("begin one", [1, 4, 7]),
        ("load", [1, 4, 7]),
    ],
)
def test_the_first_call_is_due_and_then_every_third(
    first: str, due: list[int], guarded: bool
) -> None:
    """An average exists after one call that counts; from there on, updates are `every` calls apart."""
    weights = {"w": torch.ones(2)}
    nonfinite: Any = "skip" if guarded or first == "skipped" else "allow"
    rules = {"a": "uniform()", "b": "exponential(0.9)"}
    averager = Averager(weights, rules, every=3, nonfinite=nonfinite)
    if first == "load":
        averager.load_state_dict(Averager(weights, rules, every=3).state_dict())
    if first.startswith("begin"):
        averager.begin(name="b" if first == "begin one" else None)
    updated, live = [], []
    for call in range(1, 8):
        weights["w"].fill_(float("nan") if call == 1 and first == "skipped" else call)
        before = averager.clock
        averager.update()
        if averager.clock != before:
            updated.append(call)
            live.append(call)
    assert updated == due
    assert averager.clock.t == due[-1] + (first == "begin")
    mean = [1, *live] if first == "begin" else live
    torch.testing.assert_close(averager.average("a")["w"], torch.full((2,), sum(mean) / len(mean)))


@pytest.mark.parametrize("elapsed", [0, -1, float("nan"), float("inf"), "x", torch.ones(1)])
def test_elapsed_time_is_positive_and_finite(elapsed: Any) -> None:
    with pytest.raises(ValueError, match=r"elapsed is .*, wanted a finite number > 0"):
        averager().update(elapsed)


@pytest.mark.parametrize("rule", each_rule(EXAMPLES), ids=str)
@pytest.mark.parametrize("every", [1, 3])
def test_a_clock_that_would_overflow_is_refused_at_the_update(rule: Rule, every: int) -> None:
    weights = {"w": torch.tensor([1.0])}
    timed = Averager(weights, rule, every=every)
    timed.update(1e308)
    average = timed.average()
    for elapsed in (1e308, sys.float_info.max):
        with pytest.raises(ValueError, match="a float cannot hold their sum: use a larger unit"):
            timed.update(elapsed)
    assert_same(timed.average(), average)
    for _ in range(every):
        timed.update(1.0)
    assert timed.count == 2
    assert timed.average()["w"].isfinite().all()


@pytest.mark.parametrize(
    "call",
    [
        lambda a: a.average(),
        lambda a: a.applied().__enter__(),
        lambda a: a.copy_to({"w": torch.zeros(2), "n": torch.tensor(1)}),
    ],
)
def test_there_is_no_average_before_the_first_update(call: Any) -> None:
    with pytest.raises(RuntimeError, match="no average before the first update"):
        call(averager())


def test_an_average_is_asked_for_by_name() -> None:
    several = averager({"fast": Exponential(0.5), "slow": Exponential(0.9)})
    several.update()
    for name in (None, "medium"):
        with pytest.raises(KeyError, match=r"is unknown, wanted one of \['fast', 'slow'\]"):
            several.average(name)


def _new_name(layer: Any) -> Any:
    """As torch's functions do it: the same parameter with another name."""
    weight = layer.weight
    del layer.weight
    layer.register_parameter("mine", weight)
    return weight


RENAMES: dict[str, Callable[[Any], object]] = {
    "weight_mask": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "weight_g": nn.utils.weight_norm,
    "weight_u": nn.utils.spectral_norm,
    "parametrizations.weight.original1": nn.utils.parametrizations.weight_norm,
    "parametrizations.weight.0._u": nn.utils.parametrizations.spectral_norm,
    "parametrizations.weight.0.base": nn.utils.parametrizations.orthogonal,
    "mine": _new_name,
}
CALLS: dict[str, Callable[[Averager, Path], object]] = {
    "update": lambda a, _: a.update(),
    r"applied\('average'\)": lambda a, _: a.applied().__enter__(),
    "average": lambda a, _: a.average(),
    "state_dict": lambda a, path: polyak.save(path / "a.safetensors", a),
    "tracked": lambda a, _: a.tracked,
}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_distributed_checkpoint_loads_an_averager_that_has_begun(tmp_path: Path) -> None:
    """As torchtitan's checkpoints hold it: by its `state_dict` and `load_state_dict`."""
    weights = {"w": torch.zeros(3)}
    saved, fresh = (Averager(weights, "exponential(0.5)", every=2) for _ in range(2))
    for _ in range(4):
        weights["w"] += 1
        saved.update()
    dcp_save({"averager": saved}, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(
        ValueError, match=r"wanted .*; torch.* fills slots that exist, so begin\(\) first"
    ):
        dcp_load({"averager": fresh}, checkpoint_id=tmp_path, no_dist=True)
    fresh.begin()
    dcp_load({"averager": fresh}, checkpoint_id=tmp_path, no_dist=True)
    assert (fresh.count, fresh.clock) == (saved.count, saved.clock)
    assert torch.equal(fresh.average()["w"], saved.average()["w"])


def test_a_state_of_another_cadence_is_refused() -> None:
    state = averager(every=2).state_dict()
    with pytest.raises(ValueError, match=r"saved with every=2, this averager has every=1: make it"):
        averager().load_state_dict(state)
    averager(every=2).load_state_dict(state)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("new", RENAMES)
def test_a_weight_that_got_another_name_is_an_error_with_its_cure(
    new: str, call: str, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    changing = Averager(model, Uniform())
    changing.update()
    RENAMES[new](model[0])
    words = rf"(?s){call}: .*missing: 0\.weight.*extra: .*0\.{new}.*prune.* before you make the averager"
    with pytest.raises(RuntimeError, match=words):
        CALLS[call](changing, tmp_path)


def test_a_weight_can_be_pruned_in_the_course_if_it_had_its_name_before() -> None:
    """The cure that the error names: the average keeps the mask that the model has."""
    model: Any = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    prune.identity(model[0], "weight")
    averager = Averager(model, "exponential(0.5)")
    averager.update()
    prune.l1_unstructured(model[0], "weight", 0.5)
    with torch.no_grad():
        model[0].weight_orig.add_(1)
    averager.update()
    with averager.applied():
        model(torch.zeros(1, 3))
        found = model[0].weight
    assert torch.equal(found == 0, model[0].weight_mask == 0)
    wanted = (model[0].weight_orig - 0.5) * model[0].weight_mask
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("call", ["update", "average", "state_dict"])
def test_a_model_that_changed_is_refused(call: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    changing = Averager(model, Uniform())
    changing.update()
    del model[0].bias
    model[1] = nn.Linear(2, 3)
    model.append(nn.Linear(1, 1))
    with pytest.raises(
        RuntimeError,
        match=f"{call}: not the tensors that the averager was made with\n"
        r"  missing: 0.bias\n  extra: 2.weight, 2.bias\n"
        r"  different: 1.weight: \(\(3, 2\), 'average'\), wanted \(\(2, 2\), 'average'\)",
    ):
        getattr(changing, call)()


def test_summary_prints_as_a_table() -> None:
    text = str(Averager(Everything(), Exponential(0.9)).summary())
    assert "average: exponential(0.9)" in text
    assert "embedding.weight" in text
    assert "(tied: head.weight)" in text


def test_the_rule_is_as_given() -> None:
    assert averager("window(3)").rule == Window(3)
    assert averager({"a": Uniform()}).rule == {"a": Uniform()}
    assert polyak.Averager is Averager
