"""The article's class: parity with ema-pytorch, its options and members, its faults absent."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ema_pytorch
import pytest
import torch
from torch import Tensor, nn

import polyak
from models import Everything, assert_same, everything, snapshot, wander
from polyak import EMA, Averager
from polyak._engine import memory, second
from polyak.rules import ArticleEMA
from polyak.theory import coefficients


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).to(dtype)


def run(ema: Any, steps: range) -> None:
    """A random walk of the live model, the same for the same steps, an update after each."""
    for step in steps:
        wander(ema.model, step)
        ema.update()


def averaged(ema: Any) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in ema.ema_model.state_dict().items()}


# ema-pytorch computes its decay in float32.
PEER = 1e-6


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        if name != "1.num_batches_tracked":  # the peer never copies it
            torch.testing.assert_close(tensor, b[name], rtol=0, atol=tolerance, msg=name)


class ArticleScript:
    """The article's update rule, written out: one module, one loop (section 2 of the article)."""

    def __init__(self, model: nn.Module, beta: float, after: int, every: int) -> None:
        self.model, self.ema_model = model, copy.deepcopy(model)
        self.beta, self.after, self.every = beta, after, every
        self.step, self.initted = 0, False

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        state = dict(self.model.state_dict())
        return [
            (a, state[k]) for k, a in self.ema_model.state_dict().items() if a.is_floating_point()
        ]

    @torch.no_grad()
    def update(self) -> None:
        before, self.step = self.step, self.step + 1
        if before % self.every:
            return
        if before <= self.after or not self.initted:
            for average, live in self.pairs():
                average.copy_(live)
            self.initted = before > self.after
        if before > self.after:
            e = self.step - self.after - 1
            decay = min(1 - (1 + e) ** (-2 / 3), self.beta)
            for average, live in self.pairs():
                average.copy_(average * decay + live * (1 - decay))


@pytest.mark.parametrize("every", [1, 3, 10])
@pytest.mark.parametrize("after", [0, 7, 100])
def test_it_is_the_articles_class(every: int, after: int) -> None:
    ema = EMA(network(), beta=0.9, update_after_step=after, update_every=every)
    script = ArticleScript(network(), 0.9, after, every)
    for stop in (1, 2, after + 1, after + 2, after + 3, 150):
        run(ema, range(ema._calls, stop))
        run(script, range(script.step, stop))
        assert_close(averaged(ema), averaged(script))
    assert ema.get_current_decay() == pytest.approx(min(1 - (150 - after) ** (-2 / 3), 0.9))


@pytest.mark.parametrize("every", [1, 3, 10])
def test_a_checkpoint_of_ema_pytorch_goes_on_along_its_path(every: int) -> None:
    options: dict[str, Any] = {"beta": 0.95, "update_after_step": 20, "update_every": every}
    for stop in (1, 5, 21, 22, 40):
        peer = ema_pytorch.EMA(network(), **options)
        run(peer, range(stop))
        ours = EMA(network(), **options)
        ours.load_state_dict(peer.state_dict())
        run(peer, range(stop, 80))
        run(ours, range(stop, 80))
        assert_close(averaged(ours), averaged(peer), PEER)


def test_ema_pytorch_loads_our_checkpoint_and_goes_on_along_our_path() -> None:
    ours = EMA(network(), beta=0.95, update_after_step=5, update_every=2)
    run(ours, range(30))
    peer = ema_pytorch.EMA(network(), beta=0.95, update_after_step=5, update_every=2)
    assert list(ours.state_dict()) == list(peer.state_dict())
    peer.load_state_dict(ours.state_dict())
    run(ours, range(30, 60))
    run(peer, range(30, 60))
    assert_close(averaged(ours), averaged(peer), PEER)


def test_the_class_is_its_rules_profile() -> None:
    ema = EMA(network(), beta=0.9, update_after_step=4, update_every=1)
    path = []
    for step in range(40):
        wander(ema.model, step)
        path.append(ema.model[0].weight.detach().clone())  # type: ignore[index]
        ema.update()
    weights = torch.from_numpy(coefficients(ArticleEMA(0.9, 4), [1.0] * 40))
    expected = torch.tensordot(weights, torch.stack(path), dims=1)
    torch.testing.assert_close(averaged(ema)["0.weight"], expected, rtol=0, atol=1e-12)


def test_the_slots_are_the_tensors_of_ema_model() -> None:
    ema = EMA(network(torch.float32))
    slots = {id(slot) for slot in ema._average.slots["average"]}
    carried = [*ema.ema_model.parameters(), ema.ema_model[1].running_mean]  # type: ignore[index]
    assert {id(tensor) for tensor in carried} <= slots


# The faults of the article's class


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_models_of_every_dtype_are_averaged(dtype: torch.dtype) -> None:
    ema = EMA(network(dtype), beta=0.999, update_after_step=0, update_every=1, min_value=0.999)
    ema.update()
    ema.update()
    with torch.no_grad():
        for parameter in ema.model.parameters():
            parameter.fill_(2.0)
    start = averaged(ema)["0.weight"].double()
    for _ in range(700):
        ema.update()
    expected = 2 - (2 - start) * 0.999**700
    average = averaged(ema)["0.weight"]
    assert average.dtype == dtype
    torch.testing.assert_close(average.double(), expected, rtol=0.01, atol=0.01)


def test_integer_and_boolean_buffers_are_copied() -> None:
    ema = EMA(Everything(), beta=0.9, update_after_step=0, update_every=1)
    run(ema, range(9))
    assert torch.equal(ema.ema_model.counter, ema.model.counter)  # type: ignore[arg-type]
    assert torch.equal(ema.ema_model.mask, ema.model.mask)  # type: ignore[arg-type]
    assert not torch.equal(ema.ema_model.spectral_u, ema.model.spectral_u)  # type: ignore[arg-type]


class Uncopyable(nn.Linear):
    def __deepcopy__(self, memo: object) -> Uncopyable:
        raise TypeError("held open")


def test_a_model_that_cannot_be_copied_is_an_error_and_may_be_given() -> None:
    with pytest.raises(
        RuntimeError, match=r"Uncopyable cannot be copied \(held open\).*ema_model="
    ):
        EMA(Uncopyable(2, 2))
    for given in (nn.Linear(2, 2), lambda: nn.Linear(2, 2)):
        ema = EMA(Uncopyable(2, 2), given, update_every=1)
        run(ema, range(3))
        assert torch.equal(ema.ema_model.weight, ema.model.weight)  # type: ignore[arg-type]


def test_the_average_is_in_eval_mode_whatever_the_models() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).train()
    ema = EMA(model)
    assert not ema.ema_model.training
    ema.train()
    assert model.training
    assert not ema.ema_model[1].training  # type: ignore[index]
    assert not any(p.requires_grad for p in ema.ema_model.parameters())
    inputs = torch.ones(5, 2)
    assert torch.equal(ema(inputs), ema(inputs))


def test_the_documented_defaults_are_the_real_ones() -> None:
    assert EMA(network()).rule == ArticleEMA(0.9999, 100, 1.0, 2 / 3, 0.0)


# Options and members


def test_names_that_are_copied_or_ignored() -> None:
    ema = EMA(
        network(),
        beta=0.9,
        update_after_step=2,
        update_every=1,
        param_or_buffer_names_no_ema={"0.weight"},
        ignore_names={"0.bias"},
        ignore_startswith_names={"1."},
    )
    run(ema, range(4))  # the fourth call is the first that averages, and copies once more
    last_copy = averaged(ema)
    run(ema, range(4, 9))
    live, average = ema.model.state_dict(), averaged(ema)
    assert torch.equal(average["0.weight"], live["0.weight"])
    for name in ("0.bias", "1.weight", "1.running_mean"):
        assert torch.equal(average[name], last_copy[name])
    assert not torch.equal(average["2.weight"], live["2.weight"])
    assert not torch.equal(average["2.weight"], last_copy["2.weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ignore_names": {"9.weight"}}, r"EMA ignore_names, .*: \['9.weight'\] match no tensor"),
        ({"ignore_startswith_names": {"x."}}, r"ignore_startswith_names: \['x.'\] match no tensor"),
        (
            {"param_or_buffer_names_no_ema": {"y"}},
            r"names_no_ema has \['y'\], which match no tensor",
        ),
        ({"update_every": 0}, "EMA update_every is 0, wanted an integer >= 1"),
        ({"beta": 1.5}, r"EMA beta is 1.5, wanted a decay in \[0, 1\]"),
        ({"min_value": 0.9, "beta": 0.5}, "wanted min_value <= beta"),
        ({"update_after_step": -1}, "EMA update_after_step is -1, wanted an integer >= 0"),
        ({"power": 0}, "EMA power is 0, wanted a finite number > 0"),
        (
            {"ema_model": nn.Linear(9, 9)},
            "EMA: ema_model and the model have different tensors\n  missing: 0.weight",
        ),
    ],
)
def test_bad_options_say_what_was_wanted(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EMA(network(), **options)


def test_the_model_is_a_module_and_not_its_own_average() -> None:
    with pytest.raises(TypeError, match=r"model is dict, wanted a torch.nn.Module"):
        EMA({"w": torch.ones(1)})  # type: ignore[arg-type]
    model = network()
    with pytest.raises(ValueError, match=r"ema_model shares 0.weight with the model"):
        EMA(model, model)
    with pytest.raises(ValueError, match=r"ema_model shares 0.weight with the model"):
        EMA(torch.nn.Sequential(*model), ema_model=lambda: model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="takes this EMA's own two models only"):
        EMA(model).update_moving_average(network(), model)


WRITES: dict[str, Any] = {
    "update": EMA.update,
    "update_moving_average": EMA.update_moving_average,
    "copy_params_from_model_to_ema": EMA.copy_params_from_model_to_ema,
    "load_state_dict": lambda ema: ema.load_state_dict(EMA(ema.model).state_dict()),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("write", WRITES)
def test_autograd_refuses_a_graph_of_weights_that_were_written_to(
    write: str, dtype: torch.dtype
) -> None:
    ema = EMA(network(dtype), beta=0.5, update_after_step=1, update_every=1)
    inputs = torch.ones(2, 4, dtype=dtype, requires_grad=True)
    run(ema, range(3))
    loss = ema(inputs).square().sum()
    wander(ema.model, 3)
    WRITES[write](ema)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


PLACED: dict[str, tuple[str, Any]] = {
    "a copy of the live model": ("online_model", copy.deepcopy),
    "a wrapper of the live model": ("online_model", nn.DataParallel),
    "a copy of the module with the average": ("ema_model", copy.deepcopy),
    "a wrapper of the module with the average": ("ema_model", nn.DataParallel),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("place", PLACED)
def test_a_module_in_the_place_of_another_is_followed(place: str, dtype: torch.dtype) -> None:
    name, put = PLACED[place]
    options: dict[str, Any] = {"beta": 0.9, "update_after_step": 1, "update_every": 1}
    ema, undisturbed = EMA(network(dtype), **options), EMA(network(dtype), **options)
    for each in (ema, undisturbed):
        run(each, range(4))
    setattr(ema, name, put(getattr(ema, name)))
    for each in (ema, undisturbed):
        run(each, range(4, 8))
    wanted = undisturbed.state_dict()
    assert_same({k.replace("module.", ""): t for k, t in ema.state_dict().items()}, wanted)
    kept = getattr(ema, name)
    setattr(ema, name, nn.Linear(4, 3))
    for _ in range(2):
        with pytest.raises(ValueError, match="ema_model and the model have different tensors"):
            ema.update()
    setattr(ema, name, kept)
    ema.update()
    ema.ema_model = ema.model
    with pytest.raises(ValueError, match=r"shares 0.weight with the model"):
        ema.update()


def each(ema: EMA, do: Callable[[Any, Any], object]) -> None:
    """Does something with the tensors, or the modules, of the model and of `ema_model`, pair by pair."""
    for live, carried in zip(ema.model.parameters(), ema.ema_model.parameters(), strict=True):
        do(live, carried)


def tables(do: Callable[[nn.Module, nn.Module], object]) -> Callable[[EMA], object]:
    return lambda ema: [
        do(*pair) for pair in zip(ema.model.modules(), ema.ema_model.modules(), strict=True)
    ]


def give(name: str, *, swap: bool = False) -> Callable[[Any, Any], object]:
    """`a.name = b.name`, and the reverse."""

    def do(a: Any, b: Any) -> None:
        here, there = getattr(a, name), getattr(b, name)
        setattr(a, name, there)
        if swap:
            setattr(b, name, here)

    return do


def doubled(tensor: Any) -> None:
    tensor.data = tensor.data * 2


def one_vector(*models: nn.Module) -> None:
    """Makes the parameters of the models views of the first one's, in one vector."""
    vector = nn.utils.parameters_to_vector(models[0].parameters())
    for model in models:
        nn.utils.vector_to_parameters(vector, model.parameters())


SHARED: dict[str, Callable[[EMA], object]] = {
    "the model loads the average": lambda e: e.model.load_state_dict(
        e.ema_model.state_dict(), assign=True
    ),
    "the average loads the model": lambda e: e.ema_model.load_state_dict(
        e.model.state_dict(), assign=True
    ),
    "live .data": lambda e: each(e, give("data")),
    "averaged .data": lambda e: each(e, lambda live, carried: give("data")(carried, live)),
    "one .data": lambda e: give("data")(e.model[0].weight, e.ema_model[0].weight),  # type: ignore[index]
    "set_": lambda e: each(e, lambda live, carried: carried.set_(live.detach())),
    "a row": lambda e: setattr(e.model[0].bias, "data", e.ema_model[0].weight.data[:, 0]),  # type: ignore[index]
    "live tables": tables(give("_parameters")),
    "averaged tables": tables(lambda live, carried: give("_parameters")(carried, live)),
    "a layer": lambda e: setattr(e.model, "0", e.ema_model[0]),  # type: ignore[index]
    "a Parameter": lambda e: setattr(e.model[0], "bias", nn.Parameter(e.ema_model[0].bias.data)),  # type: ignore[index]
    "one vector": lambda e: one_vector(e.model, e.ema_model),
}
"""Ways in which the two models come to share memory."""

FOLLOWED: dict[str, Callable[[EMA], object]] = {
    "nothing": lambda _: None,
    "averaged .data": lambda e: each(e, lambda _, carried: doubled(carried)),
    "live .data": lambda e: each(e, lambda live, _: doubled(live)),
    ".data change places": lambda e: each(e, give("data", swap=True)),
    "tables change places": tables(give("_parameters", swap=True)),
    "in place": lambda e: e.ema_model.load_state_dict({k: v + 2 for k, v in averaged(e).items()}),
    "by assigning": lambda e: e.ema_model.load_state_dict(
        {k: v + 2 for k, v in averaged(e).items()}, assign=True
    ),
    "a whole state in inference mode": lambda e: torch.inference_mode()(e.load_state_dict)(
        {k: v.clone() for k, v in e.state_dict().items()}, assign=True
    ),
    "one vector each": lambda e: list(map(one_vector, (e.model, e.ema_model))),
}
"""Changes of tensors of either model, from which the average goes on."""


def changed(change: Callable[[Any], object], dtype: torch.dtype) -> EMA:
    """An average of some updates, of which one of the two models was changed then."""
    ema = EMA(network(dtype), beta=0.5, update_after_step=0, update_every=1, min_value=0.5)
    run(ema, range(3))
    with torch.no_grad():
        change(ema)
    return ema


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", SHARED)
def test_models_that_come_to_share_memory_are_refused(way: str, dtype: torch.dtype) -> None:
    ema = changed(SHARED[way], dtype)
    live = snapshot(ema.model)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"EMA ema_model shares 0\.\w+ with the model"):
            ema.update()
    assert_same(snapshot(ema.model), live)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", FOLLOWED)
def test_changed_tensors_of_either_model_are_followed(way: str, dtype: torch.dtype) -> None:
    ema = changed(FOLLOWED[way], dtype)
    stored = {k: ema.state_dict()[f"ema_model.{k}"] for k in averaged(ema)}
    assert_same({k: v.to(averaged(ema)[k].dtype) for k, v in stored.items()}, averaged(ema))
    wander(ema.model, 4)
    live = snapshot(ema.model)
    wanted = {k: (v + live[k]) / 2 for k, v in stored.items() if v.is_floating_point()}
    ema.update()
    state = ema.state_dict()
    for name, tensor in wanted.items():
        torch.testing.assert_close(state[f"ema_model.{name}"], tensor, msg=name)
    assert_same(snapshot(ema.model), live)


@pytest.mark.parametrize("at", [0, 299, 599])
def test_of_many_tiny_tensors_an_update_looks_at_some_in_turn(
    at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(300)))
    ema = EMA(model, update_after_step=0, update_every=1)
    run(ema, range(2))

    def noting(tensors: Any) -> list[int | None]:
        looked.append(len(tensors))
        return memory.addresses(tensors)

    monkeypatch.setattr(second, "addresses", noting)
    ema.update()
    assert sum(looked) <= second.LEAST_ADDRESSES
    list(ema.ema_model.parameters())[at].data = list(model.parameters())[at].data
    turns = -(-2 * 600 // second.LEAST_ADDRESSES)
    with pytest.raises(ValueError, match="EMA ema_model shares"):
        for _ in range(turns):
            ema.update()


def test_the_online_model_may_stay_outside() -> None:
    model = network()
    ema = EMA(model, include_online_model=False)
    assert ema.model is model
    assert not [key for key in ema.state_dict() if key.startswith("online_model")]
    assert all(p is not q for p in ema.parameters() for q in model.parameters())
    peer = ema_pytorch.EMA(network(), include_online_model=False)
    assert list(ema.state_dict()) == list(peer.state_dict())


def test_counters_have_the_articles_shapes() -> None:
    ema = EMA(network(), update_after_step=0, update_every=1)
    run(ema, range(3))
    assert (ema.step.tolist(), ema.step.dtype) == ([3], torch.int64)
    assert (ema.initted.tolist(), ema.initted.dtype) == ([1.0], torch.float32)


def test_copy_and_one_averaging_by_hand() -> None:
    ema = EMA(network(), beta=0.5, update_after_step=0, update_every=1, min_value=0.5)
    run(ema, range(3))
    wander(ema.model, 9)
    before, live = averaged(ema)["0.weight"], ema.model.state_dict()["0.weight"]
    ema.update_moving_average(ema.ema_model, ema.model)
    torch.testing.assert_close(averaged(ema)["0.weight"], (before + live) / 2)
    ema.copy_params_from_model_to_ema()
    assert torch.equal(averaged(ema)["0.weight"], live)
    names = [name for name, _ in ema.get_params_iter(ema.model)]
    assert names == [name for name, _ in ema.model.named_parameters()]
    buffers = [name for name, _ in ema.get_buffers_iter(ema.ema_model)]
    assert buffers == ["1.running_mean", "1.running_var"]


def test_moving_the_average_is_followed() -> None:
    ema = EMA(network(torch.float32), beta=0.5, update_after_step=0, update_every=1, min_value=0.5)
    run(ema, range(3))
    ema.double()
    run(ema, range(3, 5))
    before = averaged(ema)["1.running_mean"]
    ema.ema_model.to(torch.float64)
    ema.restore_ema_model_device()
    run(ema, range(5, 6))
    live = ema.model.state_dict()["1.running_mean"]
    torch.testing.assert_close(averaged(ema)["1.running_mean"], (before + live) / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop", [0, 3, 17])
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(dtype: torch.dtype, stop: int) -> None:
    def make() -> EMA:
        torch.manual_seed(0)
        return EMA(everything(dtype), beta=0.99, update_after_step=5, update_every=2)

    undisturbed = make()
    run(undisturbed, range(40))
    first, second = make(), make()
    run(first, range(stop))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    run(second, range(stop, 40))
    assert_same(dict(second.state_dict()), dict(undisturbed.state_dict()))


COUNTERS: list[tuple[str, object, str]] = [
    ("step", torch.tensor([-5]), "EMA: step is -5, wanted a tensor of one integer"),
    ("step", torch.tensor(-1), "step is -1"),
    ("step", torch.tensor([2.5]), "step is 2.5"),
    ("step", torch.tensor([torch.nan]), "step is nan"),
    ("step", torch.tensor([torch.inf]), "step is inf"),
    ("step", torch.tensor([1e30]), "step is 1.0"),
    ("step", torch.tensor([1j]), "step is 1j"),
    ("step", torch.tensor([3, 4]), r"step is tensor\(\[3, 4\]\)"),
    ("step", torch.tensor([]), r"step is tensor\(\[\]\)"),
    ("step", torch.tensor([True]), "step is True"),
    ("step", torch.tensor([300.0]).bfloat16(), "step is 300.0, wanted a tensor of one integer, 0 to 256 of torch.bfloat16"),
    ("step", torch.tensor([4096.0]).half(), "step is 4096.0"),
    ("step", torch.empty(1, device="meta"), r"step is tensor\(..., device='meta'"),
    ("step", torch.tensor([3]).to_sparse(), r"step is tensor\(indices"),
    ("initted", torch.empty(1, device="meta"), r"initted is tensor\(..., device='meta'"),
    ("step", 7, "step is 7"),
    ("step", "x", "step is 'x'"),
    ("initted", torch.tensor([-1.0]), "EMA: initted is -1.0, wanted a tensor of one integer, 0 to 1"),
    ("initted", torch.tensor([2.0]), "initted is 2.0"),
    ("initted", torch.tensor([torch.nan]), "initted is nan"),
]  # fmt: skip


@pytest.mark.parametrize(("counter", "value", "message"), COUNTERS)
def test_a_state_with_a_broken_counter_is_refused_and_nothing_changes(
    counter: str, value: Any, message: str
) -> None:
    ema = EMA(network(), update_after_step=1, update_every=1)
    run(ema, range(5))
    before = {name: tensor.clone() for name, tensor in ema.state_dict().items()}
    other = {name: tensor * 2 for name, tensor in before.items() if "." in name}
    with pytest.raises(ValueError, match=message):
        ema.load_state_dict({**before, **other, counter: value})
    assert_same(dict(ema.state_dict()), before)
    assert ema._calls == 5
    for name, good in (("step", torch.tensor(9)), ("initted", torch.tensor(True))):
        ema.load_state_dict({**before, name: good})


class Crossed(nn.Module):
    """The same two layers as its mirror image, registered in the other order."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__()
        for name in (first, second):
            setattr(self, name, nn.Linear(2, 2, bias=False))


def test_the_models_are_paired_by_name_whatever_their_order() -> None:
    model, carrier = Crossed("x", "y"), Crossed("y", "x")
    ema = EMA(model, carrier, update_every=1)
    run(ema, range(3))
    assert torch.equal(carrier.x.weight, model.x.weight)  # type: ignore[union-attr,arg-type]
    assert torch.equal(carrier.y.weight, model.y.weight)  # type: ignore[union-attr,arg-type]


@pytest.mark.parametrize("move", [lambda e: e.to("cpu"), lambda e: e.restore_ema_model_device()])
def test_moving_keeps_the_wide_average_of_narrow_weights(move: Any) -> None:
    def stepped(moves: bool) -> Tensor:
        ema = EMA(network(torch.bfloat16), beta=0.999, min_value=0.999, update_every=1)
        for step in range(200):
            wander(ema.model, step)
            ema.update()
            if moves:
                move(ema)
        return ema.state_dict()["ema_model.0.weight"]  # type: ignore[no-any-return]

    assert torch.equal(stepped(moves=True), stepped(moves=False))


REFUSED: dict[str, Callable[[EMA, Path], object]] = {
    "EMA.state_dict": lambda ema, _: nn.ModuleList([ema]).state_dict(),
    "save": lambda ema, path: polyak.save(path / "a", ema),
    "update": lambda ema, _: ema.update(),
    "update_moving_average": lambda ema, _: ema.update_moving_average(),
    "copy_params_from_model_to_ema": lambda ema, _: ema.copy_params_from_model_to_ema(),
}
"""Calls that a block on `ema_model` refuses, by the name that the error says."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("call", REFUSED)
def test_a_block_on_the_second_module_is_refused_by_the_call_s_name(
    call: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    ema = EMA(network(dtype), update_after_step=0, update_every=1)
    averager = Averager(ema.ema_model, "uniform()")
    run(ema, range(2))
    averager.update()
    before = averaged(ema)
    with averager.applied(), pytest.raises(RuntimeError, match=rf"^{call}: .* in a block applied"):
        REFUSED[call](ema, tmp_path)
    assert_same(averaged(ema), before)


AFTER: dict[str, Callable[[EMA], object]] = {
    "to": lambda ema: ema.to("cpu"),
    "update": EMA.update,
    "every update until the next that is due": lambda ema: [
        ema.update() for _ in range(ema.update_every - 1)
    ],
    "every update, and one that is due": lambda ema: run(ema, range(9, 9 + ema.update_every)),
    "update_moving_average": EMA.update_moving_average,
    "nothing": lambda _: None,
}
"""Calls after a write to `ema_model`."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("every", [2, 3, 10])
@pytest.mark.parametrize("call", AFTER)
def test_weights_loaded_into_an_ema_model_count(call: str, every: int, dtype: torch.dtype) -> None:
    """With decay 1 - 1e-6 no call moves them visibly."""
    slow = 1 - 1e-6
    ema = EMA(network(dtype), beta=slow, min_value=slow, update_after_step=0, update_every=every)
    run(ema, range(2 * every + 1))
    ema.ema_model.load_state_dict({k: v + 2 for k, v in averaged(ema).items()})
    wanted = averaged(ema)
    AFTER[call](ema)
    state = {k: ema.state_dict()[f"ema_model.{k}"] for k in wanted}
    for name in ("0.weight", "1.running_var", "2.bias"):
        torch.testing.assert_close(averaged(ema)[name], wanted[name], atol=0.02, rtol=0.01)
        torch.testing.assert_close(state[name].to(dtype), wanted[name], atol=0.02, rtol=0.01)


def test_a_bfloat16_checkpoint_of_ema_pytorch_loads() -> None:
    peer = ema_pytorch.EMA(network(torch.bfloat16), update_every=1, update_after_step=0)
    run(peer, range(5))
    ema = EMA(network(torch.bfloat16), update_every=1, update_after_step=0)
    ema.load_state_dict(peer.state_dict())
    assert_close(averaged(ema), averaged(peer))
    assert ema.state_dict()["ema_model.0.weight"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_goes_on_by_itself(dtype: torch.dtype) -> None:
    ema = EMA(network(dtype), beta=0.9, update_after_step=1, update_every=1)
    run(ema, range(5))
    file = io.BytesIO()
    torch.save(ema, file)
    file.seek(0)
    before = averaged(ema)
    for twin in (copy.deepcopy(ema), torch.load(file, weights_only=False)):
        run(twin, range(5, 9))
        assert_same(averaged(ema), before)
        again = EMA(network(dtype), beta=0.9, update_after_step=1, update_every=1)
        run(again, range(9))
        assert_same(averaged(twin), averaged(again))


def test_a_compiled_model_is_averaged_by_its_plain_names() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ema = EMA(torch.compile(network()), ignore_names={"0.weight"}, update_every=1)  # type: ignore[arg-type]
    run(ema, range(3))
    assert next(name for name, _ in ema.get_params_iter(ema.model)) == "0.weight"


def test_the_averager_gives_the_same_numbers() -> None:
    model = network()
    ema = EMA(model, beta=0.9, update_after_step=3, update_every=1)
    averager = Averager(model, ema.rule, buffers="average")
    for step in range(20):
        wander(model, step)
        ema.update()
        averager.update()
    assert_same(averager.average(), averaged(ema))


@pytest.mark.parametrize("every", [1, 2])
def test_ignored_names_are_copied_up_to_the_first_averaging_call(every: int) -> None:
    """Copying calls are those up to update_after_step + 1; the first call behind them copies once more."""
    model = nn.Linear(3, 2)
    ema = EMA(model, update_after_step=2, update_every=every, ignore_names={"bias"})
    kept = model.bias.detach().clone()
    copied = []
    for call in range(1, 9):
        wander(model, call)
        ema.update()
        if torch.equal(ema.ema_model.get_parameter("bias"), model.bias):
            copied.append(call)
            kept = model.bias.detach().clone()
        assert torch.equal(ema.ema_model.get_parameter("bias"), kept)
    assert copied == ([1, 2, 3, 4] if every == 1 else [1, 3, 5])
