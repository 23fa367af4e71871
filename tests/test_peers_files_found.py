"""Where state dicts lie in a file, and what each is: one table, a new layout is one entry.

A state is filled with one number, so a value says where a tensor came from: 1 in live weights, 2 in an
average, 9 in anything else.
"""

from __future__ import annotations

import argparse
import ast
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import accelerate  # type: ignore[import-untyped]
import diffusers
import ema_pytorch
import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import swa_utils

import polyak
from cli_runs import run
from polyak import checkpoints, offline
from polyak.checkpoints import Clock, read
from polyak.checkpoints._peers import FORMATS
from polyak.decays import Ratio
from polyak.rules import Exponential, Rule
from test_peers_files import saved_distributed

State = dict[str, Tensor]


class Net(nn.Module):
    """Weights, running statistics and a counter, all but the counter of one value."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.enc = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)
        for tensor in self.state_dict().values():
            tensor.fill_(value)


def state(value: float, front: str = "") -> State:
    return {front + name: tensor for name, tensor in Net(value).state_dict().items()}


def parameters(value: float) -> State:
    return {name: p.detach() for name, p in Net(value).named_parameters()}


def averaged(front: str = "") -> State:
    """The state of torch's `AveragedModel` after 50 updates."""
    average = swa_utils.AveragedModel(Net(2))
    average.n_averaged.fill_(50)
    return {front + name: tensor for name, tensor in average.state_dict().items()}


def without_dots(front: str, names: Mapping[str, Tensor], **more: Tensor) -> State:
    """An average under names without dots, as of `LitEma`."""
    flat = {front + name.replace(".", ""): tensor for name, tensor in names.items()}
    return flat | {front + name: tensor for name, tensor in more.items()}


def beside_as(form: str, names: Mapping[str, Tensor]) -> State:
    """Buffers at the top, whose names may have no dots."""
    return {form.format(name.replace(".", "_")): tensor for name, tensor in names.items()}


def with_article_ema() -> State:
    """The state of a module that keeps ema-pytorch's `EMA` of a part, which holds that part too."""
    module: Any = nn.Module()
    module.net = Net(1)
    module.ema = ema_pytorch.EMA(module.net, beta=0.9, update_every=1)
    module.ema.update()
    for tensor in module.ema.ema_model.state_dict().values():
        tensor.fill_(2)
    saved: State = module.state_dict()
    return saved


def optimizer_state() -> dict[str, Any]:
    net = Net(9)
    optimizer = torch.optim.Adam(net.parameters())
    net.enc.weight.grad = torch.ones_like(net.enc.weight)
    optimizer.step()
    return optimizer.state_dict()


def lightning(states: State, **more: Any) -> dict[str, Any]:
    beside = {"epoch": 1, "global_step": 100, "callbacks": {}, "optimizer_states": []}
    return {"pytorch-lightning_version": "2.6.6", "state_dict": states, **beside, **more}


def averager_state() -> dict[str, Any]:
    """The state of an `Averager` whose two averages are 2 and 3."""
    averager = polyak.Averager(Net(2), {"fast": "exponential(0.5)", "slow": "uniform()"})
    averager.update()
    saved = averager.state_dict()
    for tensor in saved["averages"]["slow"]["slots"]["average"].values():
        tensor.fill_(3)
    return saved


class Laid(NamedTuple):
    """A file's content, and what must be found: the value of each state by name, clock, rule, the rest."""

    content: Any
    live: float | None = 1.0
    averages: dict[str, float] = {"average": 2.0}  # noqa: RUF012
    clock: Clock | None = None
    rule: Rule | None = None
    left: dict[str, int] = {}  # noqa: RUF012
    format: str = "state-dict"
    inner: str = ""
    """What the model's names begin with."""


ALL = len(state(1))
LIT = {"decay": torch.tensor(0.9999), "num_updates": torch.tensor(100, dtype=torch.int32)}
LAYOUTS: dict[str, Laid] = {
    "torchvision": Laid(
        {"model": state(1), "model_ema": averaged(), "args": argparse.Namespace(a=1)},
        clock=Clock(50),
        format="averaged-model",
    ),
    "an AveragedModel that counts by a number": Laid(
        {"model": {"n_averaged": 50, **state(2, "module.")}}, None, clock=Clock(50),
        format="averaged-model",
    ),
    "Megatron, in parts": Laid(
        {"model": {"lm": {"embedding": {"word": {"weight": torch.ones(4, 2)}}, "net": state(1)}},
         "optimizer": optimizer_state()},
        averages={}, left={"optimizer": 3}, inner="lm.net.",
    ),
    "a model in parts and its average": Laid(
        {"model": {"a": state(1), "b": state(1)}, "ema": {"a": state(2), "b": state(2)}}, inner="a.",
    ),
    "averages of two models": Laid(
        {"unet": state(1), "unet_ema": state(2), "text": state(1), "text_ema": state(3)}, None,
        {"unet_ema": 2.0, "text_ema": 3.0}, left={"unet": ALL, "text": ALL},
    ),
    "averages by decay below one key": Laid(
        {"model": state(1), "ema": {"0.99": state(2), "0.999": state(3)}},
        averages={"ema.0.99": 2.0, "ema.0.999": 3.0},
    ),
    "averages by decay that is a number": Laid(
        {"model": state(1), "ema": {0.99: state(2), 0.999: state(3)}},
        averages={"ema.0.99": 2.0, "ema.0.999": 3.0},
    ),
    "weights that were kept while the model had the average": Laid(
        {"model": state(1), "ema": {"shadow": state(2), "backup": state(9)}}, left={"ema.backup": ALL},
    ),
    "the same, without a model beside": Laid({"ema": {"shadow": state(2), "backup": state(1)}}),
    "a model and an optimizer in a tuple": Laid(
        (state(1), optimizer_state()), averages={}, left={"1": 3}
    ),
    "one state dict among others in a tuple": Laid(
        {"ckpt": (state(1), optimizer_state(), 3)}, averages={}, left={"ckpt.1": 3}
    ),
    "an AveragedModel under the key of live weights": Laid(
        {"model_state_dict": averaged()}, None, clock=Clock(50), format="averaged-model"
    ),
    "OpenNMT": Laid(
        {"model": state(1), "generator": {"0.weight": torch.ones(5, 2)}},
        averages={},
        left={"generator": 1},
    ),
    "OpenNMT 3": Laid(
        {
            "model": state(1),
            "generator": {"weight": torch.ones(5, 2)},  # the model's own, under `generator.`
            "vocab": {},
            "opt": argparse.Namespace(a=1),
        },
        averages={},
    ),
    "RT-DETR": Laid(
        {"model": state(1), "ema": {"module": state(2), "updates": 70, "warmups": 1000}},
        clock=Clock(70),
    ),
    "YOLO": Laid({"model": state(1), "ema": state(2), "updates": 70}, clock=Clock(70)),
    "fairseq": Laid(
        {
            "model": state(1),
            "extra_state": {"epoch": 1, "ema": state(2)},
            "optimizer_history": [{"num_updates": 3}],
        }
    ),
    "fairseq in float16": Laid(
        {
            "model": state(1),
            "extra_state": {
                "ema": {n: t.half() if t.is_floating_point() else t for n, t in state(9).items()},
                "ema_fp32_params": state(2),
            },
        },
        left={"extra_state.ema": ALL},
    ),
    "icefall": Laid({"model": state(1), "model_avg": state(2), "batch_idx_train": 100}),
    "StyleGAN": Laid(
        {"g": state(1), "d": state(9), "g_ema": state(2), "g_optim": optimizer_state()},
        left={"d": ALL, "g_optim": 3},
    ),
    "by capitals": Laid({"netG": state(1), "netG_EMA": state(2)}),
    "several decays": Laid(
        {"model": state(1), "ema_0.99": state(2), "ema_0.999": state(3)},
        averages={"ema_0.99": 2.0, "ema_0.999": 3.0},
    ),
    "in lists": Laid({"models": [{"state": state(1)}], "emas": [state(2), state(3)]}, averages={
        "emas.0": 2.0, "emas.1": 3.0}),
    "deep": Laid({"run": {"trainer": {"net": state(1), "swa": {"weights": state(2)}}}}),
    "one state dict under a key of one's own": Laid({"net_a": state(1), "epoch": 3}, averages={}),
    "an average alone": Laid({"ema_model_state_dict": state(2), "step": 3}, None),
    "numbers beside the tensors": Laid({**state(1), "epoch": 3}, averages={}),
    "arrays of numpy beside the tensors": Laid(
        {"model": {**state(1), "mean": numpy.ones(3)}}, averages={}, left={"model.mean (numpy.ndarray)": 1}
    ),
    "the same at the top": Laid(
        {**state(1), "mean": numpy.ones(3), "epoch": 3}, averages={}, left={"mean (numpy.ndarray)": 1}
    ),
    "optimizers": Laid(
        {"model": state(1), "opt": optimizer_state(), "sgd": optimizer_state(), "rng": torch.ones(8)},
        averages={},
        left={"opt": 3, "sgd": 3, "rng": 1},
    ),
    "latent diffusion": Laid(
        lightning(
            state(1, "model.diffusion_model.")
            | {"first_stage_model.w": torch.ones(2)}
            | without_dots("model_ema.diffusion_model", parameters(2), )
            | {f"model_ema.{name}": tensor for name, tensor in LIT.items()}
        ),
        clock=Clock(100, ahead=1),
        rule=Exponential(Ratio(0.9999)),
        format="lightning",
        inner="model.diffusion_model.",
    ),
    "latent diffusion without a ramp": Laid(
        state(1, "net.")
        | without_dots("net_ema.", parameters(2), **{**LIT, "num_updates": torch.tensor(-1)}),
        rule=Exponential(0.9999),
        inner="net.",
    ),
    "a copy in a LightningModule": Laid(
        lightning(state(1, "net.") | state(2, "ema.model.")), format="lightning", inner="net."
    ),
    "a copy of a part": Laid(
        lightning({"head.w": torch.ones(2), **state(1, "net."), **state(2, "net_ema.")}),
        format="lightning",
        inner="net.",
    ),
    "an AveragedModel in a LightningModule": Laid(
        lightning(state(1, "net.") | averaged("swa_model.")),
        clock=Clock(50),
        format="lightning",
        inner="net.",
    ),
    "ema-pytorch in a LightningModule": Laid(
        lightning(with_article_ema()),
        clock=Clock(1, "calls"),
        format="lightning",
        inner="net.",
    ),
    "a callback of Lightning": Laid(
        lightning(state(1), callbacks={"EMACallback{'decay': 0.9}": {"ema_state_dict": state(2)}}),
        format="lightning",
    ),
    "an average of the one of two models that its key names": Laid(
        {"state_dict": {**state(1, "net."), **state(1, "netD."), **state(2, "net_ema.")}}, inner="net."
    ),
    "a list of ema-pytorch's, as imagen-pytorch has": Laid(
        {"ema": {f"{i}.{name}": tensor for i, value in enumerate((2, 3)) for name, tensor in
                 {"initted": torch.tensor(True), "step": torch.tensor(5), **state(value, "ema_model.")}.items()}},
        None, {"0": 2.0, "1": 3.0}, Clock(5, "calls"), format="ema-pytorch",
    ),
    "mmcv 1": Laid({"meta": {"epoch": 3}, "state_dict": {**state(1, "net."), **beside_as("ema_{}", state(2, "net."))}},
                   inner="net."),
    "mmcv 1, parameters only": Laid(
        {"state_dict": {**state(1), **beside_as("ema_{}", parameters(2))}}
    ),
    "an average in front of the last names": Laid(
        {**state(1), **{".swa_".join(n.rsplit(".", 1)): t for n, t in parameters(2).items()}}
    ),
    "an average behind the names": Laid({**state(1), **{f"{n}_ema": t for n, t in state(2).items()}}),
    "an average below the names": Laid({**state(1), **{f"{n}.shadow": t for n, t in parameters(2).items()}}),
    "without dots and without counters": Laid(
        lightning(state(1, "net.") | without_dots("net_ema.", parameters(2))), format="lightning", inner="net."
    ),
    "a layer that averages one tensor": Laid(
        {**state(1), "vq.embed": torch.ones(2, 3), "vq.embed_avg": torch.ones(2, 3), "ema_scale": torch.ones(2),
         "scale": torch.ones(2)}, averages={},
    ),
    "a submodule that is no copy": Laid(
        {**state(1), "avg.weight": torch.ones(7), "quantize.embed_avg": torch.ones(2, 3)}, averages={}
    ),
    "an Averager beside the model": Laid(
        {"model": state(1), "optimizer": optimizer_state(), "average": averager_state()},
        averages={"fast": 2.0, "slow": 3.0},
        clock=Clock(1),
        left={"optimizer": 3},
        format="polyak",
    ),
    "an Averager alone": Laid(
        averager_state(), None, {"fast": 2.0, "slow": 3.0}, Clock(1), format="polyak"
    ),
    "an Averager in a Lightning checkpoint": Laid(
        lightning(state(1), callbacks={"Average": averager_state()}),
        averages={"fast": 2.0, "slow": 3.0},
        clock=Clock(1),
        format="polyak",
    ),
}  # fmt: skip


def done(*arguments: object) -> str:
    """What a command prints, which must succeed."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return str(result.output)


def assert_value(weights: Mapping[str, Tensor], front: str, value: float) -> None:
    for name in parameters(0):
        assert torch.equal(weights[front + name], torch.full_like(parameters(0)[name], value)), name


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_state_dict_is_found_and_accounted_for(tmp_path: Path, layout: Laid) -> None:
    torch.save(layout.content, tmp_path / "it.pt")
    found = read(tmp_path / "it.pt")
    assert (found.format, found.clock, found.left) == (layout.format, layout.clock, layout.left)
    assert list(found.averages) == list(layout.averages) and found.refused == {}
    assert (found.live is None) == (layout.live is None)
    if found.live is not None and layout.live is not None:
        assert_value(found.live, layout.inner, layout.live)
    for name, value in layout.averages.items():
        assert_value(found.averages[name], layout.inner, value)
        if layout.inner and found.live is not None:  # what is not averaged is the live weights'
            assert set(found.averages[name]) == set(found.live)
    if layout.rule is not None:
        assert found.rules == {"average": layout.rule}


def test_every_format_is_in_the_list() -> None:
    """What `polyak inspect` says of a file that it does not know names them all."""
    files = Path(checkpoints.__file__).parent.rglob("*.py")
    calls = [
        n for f in files for n in ast.walk(ast.parse(f.read_text())) if isinstance(n, ast.Call)
    ]
    made = [n.args[1] for n in calls if getattr(n.func, "id", "") == "Checkpoint" and n.args[1:]]
    said = {node.value for node in made if isinstance(node, ast.Constant)}
    assert "mmengine" in said
    assert said <= set(FORMATS), "add the name to FORMATS in checkpoints/_peers/__init__.py"


def test_every_format_is_read_in_a_test() -> None:
    tests = "".join(file.read_text() for file in Path(__file__).parent.glob("test_*.py"))
    missing = [name for name in FORMATS if f'"{name}"' not in tests]
    assert not missing, "add an entry to LAYOUTS, in this file, or a file of the real library"
    page = (Path(__file__).parent.parent / "docs/files.md").read_text()
    table = page.partition("| format | written by |\n")[2].partition("\n\n")[0]
    untold = [name for name in FORMATS if f"`{name}`" not in table]
    assert not untold, "add the format to its table in docs/files.md"


FLAT = [
    name
    for name, layout in LAYOUTS.items()
    if isinstance(layout.content, dict) and all(map(torch.is_tensor, layout.content.values()))
]


@pytest.mark.parametrize("name", FLAT)
def test_what_is_flat_may_be_safetensors(tmp_path: Path, name: str) -> None:
    """Tied tensors, which safetensors does not hold, are copied."""
    layout = LAYOUTS[name]
    save_file({n: t.clone() for n, t in layout.content.items()}, tmp_path / "it.safetensors")
    found = read(tmp_path / "it.safetensors")
    for average, value in layout.averages.items():
        assert_value(found.averages[average], layout.inner, value)


AMBIGUOUS: dict[str, tuple[State, str]] = {
    "one name of mmcv for two": (
        {"a.b_c": torch.ones(2), "a_b.c": torch.ones(2), "ema_a_b_c": torch.ones(2)},
        r"'ema_a_b_c' may be the average of 'a\.b_c' or of 'a_b\.c'",
    ),
    "one name for two": (
        {"net.a.b": torch.ones(2), "net.ab": torch.ones(2)}
        | without_dots("ema.", {"a.b": torch.ones(2)}, **LIT),
        r"'ema\.ab' may be the average of 'net\.a\.b' or of 'net\.ab'",
    ),
    "two parts of one form": (
        state(1, "student.") | state(1, "other.") | state(2, "ema."),
        r"the tensors under 'ema\.' may be the average of 'student\.' or of 'other\.'",
    ),
    "no counterpart": (
        {"net.w": torch.ones(2)} | without_dots("ema.", {"a.b": torch.ones(2)}, **LIT),
        r"the names under 'ema\.' have no dots, and fit no part of the model",
    ),
}


@pytest.mark.parametrize(("content", "message"), AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_an_average_that_may_be_of_several_parts_is_refused(
    tmp_path: Path, content: State, message: str
) -> None:
    """Its live weights are read all the same."""
    torch.save(content, tmp_path / "it.pt")
    found = read(tmp_path / "it.pt")
    assert found.live is not None and not any(name.startswith("ema") for name in found.live)
    with pytest.raises(ValueError, match=rf"it\.pt: .*{message}"):
        found.average()
    assert "ema was not read: " in done("inspect", tmp_path / "it.pt")


def test_several_state_dicts_and_no_sign_are_refused_with_their_keys(tmp_path: Path) -> None:
    torch.save({"actor": state(1), "critic": state(9)}, tmp_path / "it.pt")
    with pytest.raises(ValueError, match=r"actor \(7 tensors\), critic .* such as key='actor'"):
        read(tmp_path / "it.pt")
    live = read(tmp_path / "it.pt", key="critic").live
    assert live is not None
    assert_value(live, "", 9)


class TestNamingThePart:
    """`key`, `prefix`, `names`, `role`: for what no rule can know."""

    def test_a_key_may_have_dots_and_lead_through_lists(self, tmp_path: Path) -> None:
        torch.save({"a.b": [{"c": state(1), "d": state(3)}]}, tmp_path / "it.pt")
        found = read(tmp_path / "it.pt", key="a.b.0.d", role="average")
        assert found.live is None
        assert_value(found.averages["average"], "", 3)

    def test_a_key_that_names_an_average(self, tmp_path: Path) -> None:
        torch.save({"x": {"swa": {**state(2), "loss": 0.5}}}, tmp_path / "it.pt")
        assert list(read(tmp_path / "it.pt", key="x.swa").averages) == ["average"]

    def test_a_key_that_is_not_there_is_answered_with_those_that_are(self, tmp_path: Path) -> None:
        torch.save({"a": {"b": state(1)}, "c": 1}, tmp_path / "it.pt")
        with pytest.raises(ValueError, match=r"it\.pt: key='a\.x': there is no 'x'; it holds 'b'"):
            read(tmp_path / "it.pt", key="a.x")
        with pytest.raises(ValueError, match=r"key='c' is a int, wanted a state dict"):
            read(tmp_path / "it.pt", key="c")

    def test_a_prefix_is_taken_and_stripped(self, tmp_path: Path) -> None:
        torch.save(state(1, "student.") | state(2, "teacher."), tmp_path / "it.pt")
        found = read(tmp_path / "it.pt", prefix="teacher.", role="average")
        assert found.live is None and list(found.averages["average"]) == list(state(2))
        assert_value(found.averages["average"], "", 2)
        with pytest.raises(ValueError, match=r"'head\.'; names begin with 'student', 'teacher'"):
            read(tmp_path / "it.pt", prefix="head.")

    def test_a_prefix_reaches_an_average_within_a_state_dict(self, tmp_path: Path) -> None:
        torch.save(state(1, "net.") | state(2, "ema.model."), tmp_path / "it.pt")
        live = read(tmp_path / "it.pt", prefix="ema.model.").live
        assert live is not None
        assert_value(live, "", 2)

    def test_a_list_without_names(self, tmp_path: Path) -> None:
        tensors = list(parameters(2).values())
        torch.save({"model": state(1), "ema_params": tensors}, tmp_path / "it.pt")
        found = read(tmp_path / "it.pt")
        assert found.live is not None and list(found.refused) == ["average"]
        with pytest.raises(ValueError, match=r"it\.pt: ema_params: it has 4 tensors in the order"):
            found.average()
        named = read(tmp_path / "it.pt", list(parameters(2)))
        assert_value(named.average(), "", 2)
        assert_value(
            read(tmp_path / "it.pt", list(parameters(2)), key="ema_params").average(), "", 2
        )

    @pytest.mark.parametrize("front", ["ema.", "net_ema.shadow_params."])
    def test_a_list_of_parameters_in_the_model(self, tmp_path: Path, front: str) -> None:
        listed = {f"{front}{i}": tensor for i, tensor in enumerate(parameters(2).values())}
        torch.save({"state_dict": {**state(1), **listed}}, tmp_path / "it.pt")
        found = read(tmp_path / "it.pt")
        assert found.live is not None and list(found.live) == list(state(1))
        with pytest.raises(ValueError, match=r"it\.pt: \w+: it has 4 tensors in the order"):
            found.average()
        named = read(tmp_path / "it.pt", list(parameters(2)))
        assert_value(named.average(), "", 2)
        assert named.left == {} and found.left == {"state_dict": 4}

    def test_a_trainer_that_keeps_the_average_in_its_optimizer(self, tmp_path: Path) -> None:
        """NeMo: without names the live weights are read, and averaged."""
        ema = {
            "ema": list(parameters(2).values()),
            "current_step": 3,
            "decay": 0.9,
            "every_n_steps": 1,
        }
        torch.save(lightning(state(1), optimizer_states=[ema]), tmp_path / "it.ckpt")
        assert_value(offline.average([tmp_path / "it.ckpt"] * 2), "", 1)
        with pytest.raises(ValueError, match=r"it\.ckpt: it has 4 tensors in the order"):
            read(tmp_path / "it.ckpt").average()
        assert_value(read(tmp_path / "it.ckpt", list(parameters(2))).average(), "", 2)

    def test_live_weights_beside_tensors_without_names_are_averaged(self, tmp_path: Path) -> None:
        for value in (1, 3):
            inner = {"decay": 0.9, "num_updates": 5, "shadow_params": [torch.ones(2)]}
            torch.save({"model": state(value), "ema": inner}, tmp_path / f"{value}.pt")
        assert_value(offline.average([tmp_path / "1.pt", tmp_path / "3.pt"]), "", 2)

    def test_a_bare_file_that_is_an_average_goes_on(self, tmp_path: Path) -> None:
        torch.save(state(2), tmp_path / "ema_0.999_050000.pt")
        averager = polyak.Averager(Net(1), "exponential(0.999)")
        polyak.load(tmp_path / "ema_0.999_050000.pt", averager, count=50_000)
        assert averager.count == 50_000
        assert_value(averager.average(), "", 2)
        other = polyak.Averager(Net(1), "exponential(0.999)")
        polyak.load(read(tmp_path / "ema_0.999_050000.pt", role="average"), other, count=7)
        assert other.count == 7
        assert_value(other.average(), "", 2)

    def test_a_role_is_for_one_set_of_weights(self, tmp_path: Path) -> None:
        torch.save({"model": state(1), "ema": state(2)}, tmp_path / "it.pt")
        with pytest.raises(ValueError, match=r"one set of weights, and this one has live, average"):
            read(tmp_path / "it.pt", role="average")

    def test_the_commands_take_the_same_options(self, tmp_path: Path) -> None:
        for value in (1, 3):
            content = {"x": state(value, "a.") | state(9, "b."), "y": state(9)}
            torch.save(content, tmp_path / f"{value}.pt")
        files, part = [tmp_path / "1.pt", tmp_path / "3.pt"], ("--key", "x", "--prefix", "a.")
        done("average", *files, *part, "--out", tmp_path / "mean.safetensors")
        assert_value(load_file(tmp_path / "mean.safetensors"), "", 2)
        done("export", files[0], tmp_path / "one.safetensors", *part, "--as", "average")
        assert_value(load_file(tmp_path / "one.safetensors"), "", 1)
        assert json.loads(done("inspect", files[0], *part, "--json"))["live"]["tensors"] == ALL
        assert "7 of 7 tensors differ" in run("diff", *files, *part).output
        rule = ("--rule", "exponential(0.9)", "--count", "5", "--as", "average")
        done("convert", files[0], tmp_path / "ours.safetensors", *part, *rule)
        assert_value(read(tmp_path / "ours.safetensors").average(), "", 1)


def test_the_window_between_two_running_means_is_their_difference(tmp_path: Path) -> None:
    """icefall: (300 * 2.5 - 100 * 0.5) / 200 = 3.5."""
    for count, value in ((100, 0.5), (300, 2.5)):
        content = {"model": state(1), "model_avg": state(value), "batch_idx_train": count}
        torch.save(content, tmp_path / f"{count}.pt")
    files = [tmp_path / "100.pt", tmp_path / "300.pt"]
    assert_value(offline.average(files, [-0.5, 1.5], which="average"), "", 3.5)


def test_an_averagers_state_saved_by_torch_alone_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Alone, beside the model, and in a Lightning checkpoint."""
    net = Net(1)
    averager = polyak.Averager(net, {"bema": "bema()", "window": "window(3)"}, every=2)
    for _ in range(7):
        torch.nn.init.normal_(net.enc.weight)
        averager.update()
    saved = averager.state_dict()
    wholes = [saved, {"model": net.state_dict(), "average": saved},
              lightning(net.state_dict(), callbacks={"A": saved})]  # fmt: skip
    for i, content in enumerate(wholes):
        torch.save(content, tmp_path / f"{i}.ckpt")
        again = polyak.Averager(net, {"bema": "bema()", "window": "window(3)"}, every=2)
        polyak.load(tmp_path / f"{i}.ckpt", again)
        assert again.clock == averager.clock
        for name in ("bema", "window"):
            for key, tensor in averager.average(name).items():
                assert torch.equal(again.average(name)[key], tensor)
        found = read(tmp_path / f"{i}.ckpt")
        assert torch.equal(
            found.averages["window"]["enc.weight"], averager.average("window")["enc.weight"]
        )
        if i:
            bema = found.average("bema")["enc.weight"]
            assert torch.equal(bema, averager.average("bema")["enc.weight"])
        else:
            with pytest.raises(ValueError, match="needs the live weights"):
                found.average("bema")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("nested", [False, True])
def test_an_optimizers_moments_in_a_folder_are_no_weights(tmp_path: Path, nested: bool) -> None:
    """As Megatron and NeMo save them, by flat names; and as torch does."""
    for value in (1.0, 3.0):
        w = torch.full((4,), value)
        moments = ("fp32_param", "exp_avg", "exp_avg_sq")
        flat = {f"optimizer.state.{moment}.module.w": w for moment in moments}
        inner = {"state": {"w": dict.fromkeys(moments, w)}}
        content = {"model": {"w": w}, "optim": inner} if nested else {"module.w": w, **flat}
        saved_distributed(content, tmp_path / str(value))
    mean = offline.average([tmp_path / "1.0", tmp_path / "3.0"])
    assert list(mean) == ["w"] and mean.left == {"optim" if nested else "optimizer": 3}


def test_the_output_layer_of_opennmt_is_averaged_with_the_model(tmp_path: Path) -> None:
    """And written back beside it."""
    for value in (1.0, 3.0):
        held = {
            "model": {"w": torch.full((2,), value)},
            "generator": {"weight": torch.full((2,), value)},
        }
        rest = {"vocab": {}, "opt": argparse.Namespace(a=1), "optim": optimizer_state()}
        torch.save({**held, **rest}, tmp_path / f"m_step_{value:g}.pt")
    like, out = tmp_path / "m_step_3.pt", tmp_path / "avg.pt"
    done("average", tmp_path, "--last", 2, "--like", like, "--out", out, "--verify")
    made = torch.load(out, weights_only=False)
    assert made["model"]["w"][0] == made["generator"]["weight"][0] == 2 and made["opt"].a == 1


def test_what_is_left_aside_is_said(tmp_path: Path) -> None:
    for value in (1, 3):
        torch.save(
            {"model": state(value), "generator": state(value), "opt": optimizer_state()},
            tmp_path / f"{value}.pt",
        )
    files, said = (
        (tmp_path / "1.pt", tmp_path / "3.pt"),
        "not used: generator (7 tensors), opt (3",
    )
    assert said in done("inspect", files[0])
    assert said in done("average", *files, "--out", tmp_path / "it.safetensors")
    assert said in done("export", files[0], tmp_path / "live.safetensors", "--average", "live")


def test_an_average_and_weights_that_it_lacks_are_said(tmp_path: Path) -> None:
    """A dictionary of averages often has no buffers; of tied weights, one name is enough."""
    live, tied = state(1), torch.ones(2)
    ema = {name: tensor for name, tensor in state(2).items() if "running" not in name}
    lacks = len(live) - len(ema)
    for i in (1, 2):
        held = {"model": {**live, "a": tied, "b": tied}, "ema": {**ema, "a": tied + 1}}
        torch.save(held, tmp_path / f"{i}.pt")
    files, out = (tmp_path / "1.pt", tmp_path / "2.pt"), tmp_path / "it.safetensors"
    assert lacks > 0
    said = f"not used: live weights that the average lacks, such as norm.running_mean ({lacks} tensors)"
    assert said in done("export", files[0], out)
    assert said in done("average", *files, "--average", "average", "--out", out, "--force")
    assert f"not used: average ({len(ema) + 1} tensors)" in done(
        "average", *files, "--out", out, "--force"
    )


ONE, OTHER = {"a": torch.ones(2)}, {"a": torch.ones(2) * 2}
BESIDE = {
    "another average": (
        {"ema_0.9": ONE, "ema_0.99": OTHER, "model": ONE},
        {"ema_0.99": 1},
    ),
    "another average, and no live weights": (
        {"ema_0.9": ONE, "ema_0.99": OTHER},
        {"ema_0.99": 1},
    ),
    "live weights of another part, under names with a prefix": (
        {"state_dict": {"model.a": torch.ones(2), "crit.w": torch.ones(1)}, "ema": OTHER},
        {"live weights that the average lacks, such as crit.w": 1},
    ),
    "live weights with a prefix": ({"state_dict": {"model.a": torch.ones(2)}, "ema": OTHER}, {}),
}


@pytest.mark.parametrize("case", BESIDE)
def test_what_is_beside_an_average_is_named(tmp_path: Path, case: str) -> None:
    held, left = BESIDE[case]
    torch.save(held, tmp_path / "it.pt")
    checkpoint = checkpoints.read(tmp_path / "it.pt")
    assert checkpoint.unused(next(iter(checkpoint.averages))) == left


@pytest.mark.parametrize(
    "pickled",
    [torch.nn.Linear(2, 2), argparse.Namespace(shadow=state(2))],
    ids=["module", "namespace"],
)
def test_a_pickled_object_beside_the_weights_is_named_without_a_count(
    tmp_path: Path, pickled: object
) -> None:
    """How many tensors it has, only its own code could say."""
    torch.save({"model": state(1), "helper": pickled}, tmp_path / "it.pt")
    name = f"{type(pickled).__module__}.{type(pickled).__qualname__}"
    lines = done("inspect", tmp_path / "it.pt").splitlines()
    assert f"not used: helper (a pickled {name})" in lines


class TestAccelerate:
    """A folder of `save_state`, with what was registered for checkpointing beside the model."""

    def saved(self, folder: Path, registered: Any, *, safe: bool = True) -> Path:
        accelerator = accelerate.Accelerator(cpu=True)
        accelerator.prepare(Net(1))
        accelerator.register_for_checkpointing(registered)
        accelerator.save_state(str(folder), safe_serialization=safe)
        return folder

    @pytest.mark.parametrize("safe", [True, False])
    def test_an_averager(self, tmp_path: Path, safe: bool) -> None:
        averager = polyak.Averager(Net(2), "window(2)")
        averager.update()
        folder = self.saved(tmp_path / "it", averager, safe=safe)
        found = read(folder)
        assert found.live is not None
        assert_value(found.live, "", 1)
        assert_value(found.averages["average"], "", 2)
        again = polyak.Averager(Net(0), "window(2)")
        polyak.load(folder, again)
        assert again.clock == averager.clock
        assert_value(again.average(), "", 2)
        alone = polyak.Averager(Net(0), "window(2)")
        polyak.load(folder / "custom_checkpoint_0.pkl", alone)
        assert_value(alone.average(), "", 2)

    def test_an_average_of_torch(self, tmp_path: Path) -> None:
        found = read(self.saved(tmp_path / "it", swa_utils.AveragedModel(Net(2))))
        assert found.live is not None and found.clock == Clock(0)
        assert_value(found.live, "", 1)
        assert_value(found.averages["average"], "", 2)

    def test_a_copy_that_says_nothing_is_left_aside_and_can_be_named(self, tmp_path: Path) -> None:
        folder = self.saved(tmp_path / "it", Net(2))
        assert read(folder).left == {"custom_checkpoint_0.pkl": ALL}
        named = read(folder, key="custom_checkpoint_0.pkl", role="average")
        assert_value(named.average(), "", 2)

    def test_a_library_without_names(self, tmp_path: Path) -> None:
        average = diffusers.training_utils.EMAModel(Net(2).parameters(), decay=0.9)
        folder = self.saved(tmp_path / "it", average)
        assert list(read(folder).refused) == ["average"]
        assert_value(read(folder, list(parameters(0))).average(), "", 2)
