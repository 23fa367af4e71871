"""Files of other libraries: names, values, rules and clocks as they are, and the way they go on.

Files are made by the libraries themselves (`peer_files`) wherever they can be installed; tests named
`by_layout` build by hand what a library documents.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from ema_pytorch import post_hoc_ema
from lightning.pytorch import callbacks
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import swa_utils

import polyak
from alone import ALONE
from models import wander
from peer_files import (
    SAVED,
    STEPS,
    EpochRecorder,
    Net,
    Peer,
    State,
    averaged_by,
    averaged_model,
    diffusers_average,
    ema,
    fit,
    follow,
    karras,
    polyak_ema,
    torch_ema_average,
)
from polyak import Averager
from polyak._engine.policies import Choose
from polyak._engine.tracking import WRAPPERS, track
from polyak.checkpoints import Clock, read
from polyak.checkpoints._names import canonical_names
from polyak.checkpoints._open.files import OpenFile
from polyak.checkpoints._peers import FORMATS, recognise
from polyak.checkpoints._peers.common import Found
from polyak.checkpoints._torch_save.files import load
from polyak.decays import InversePower, Ratio
from polyak.rules import ArticleEMA, Exponential, Power, Rule, Tail, Uniform
from quick import first_quick

PARAMETERS = ["body.weight", "body.bias", "norm.weight", "norm.bias"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@pytest.fixture
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """ema-pytorch computes its decay in the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@dataclass(frozen=True)
class Case:
    """A library's average, what its file must tell, and by what rule it goes on."""

    make: Callable[..., Peer]
    options: dict[str, Any]
    format: str
    rule: Rule
    clock: Clock | None
    every: int = 1
    told: bool = False


def decay_of(decay: float) -> dict[str, Any]:
    return {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(decay)}


EMA = {"beta": 0.99, "update_after_step": 0, "update_every": 1}
LATE = {"beta": 0.97, "update_after_step": 20, "update_every": 4, "inv_gamma": 2.0}
CASES = {
    "ema-pytorch": Case(
        ema, EMA, "ema-pytorch", ArticleEMA(0.99, 0, first_copy=False), Clock(SAVED, "calls")
    ),
    "ema-pytorch-every-4": Case(
        ema,
        {**LATE, "include_online_model": False},
        "ema-pytorch",
        ArticleEMA(0.97, 20, inv_gamma=2.0, first_copy=False),
        Clock(SAVED, "calls"),
        every=4,
    ),
    "polyak.EMA": Case(
        polyak_ema, LATE, "ema-pytorch", ArticleEMA(0.97, 20, 2.0), Clock(SAVED, "calls"), every=4
    ),
    "torch-ema": Case(
        torch_ema_average,
        {"decay": 0.95},
        "torch-ema",
        Exponential(Ratio(0.95)),
        Clock(SAVED, ahead=1),
        told=True,
    ),
    "torch-ema-constant": Case(
        torch_ema_average,
        {"decay": 0.95, "use_num_updates": False},
        "torch-ema",
        Exponential(0.95),
        None,
        told=True,
    ),
    "averaged-model-ema": Case(
        averaged_model, decay_of(0.98), "averaged-model", Exponential(0.98), Clock(SAVED)
    ),
    "averaged-model-swa": Case(averaged_model, {}, "averaged-model", Uniform(), Clock(SAVED)),
    "diffusers": Case(
        diffusers_average, {}, "diffusers", Exponential(Ratio(0.9999)), Clock(SAVED), told=True
    ),
    "diffusers-warmup": Case(
        diffusers_average,
        {"decay": 0.95, "use_ema_warmup": True, "inv_gamma": 3.0, "power": 0.8, "min_decay": 0.3},
        "diffusers",
        Exponential(InversePower(3.0, 0.8, 0.3, 0.95)),
        Clock(SAVED),
        told=True,
    ),
    "diffusers-late": Case(
        diffusers_average,
        {"decay": 0.98, "update_after_step": 140},
        "diffusers",
        Tail(Exponential(Ratio(0.98)), 140),
        Clock(SAVED),
        told=True,
    ),
    "diffusers-not-begun": Case(
        diffusers_average,
        {"decay": 0.9, "use_ema_warmup": True, "update_after_step": 200},
        "diffusers",
        Tail(Exponential(InversePower(max_decay=0.9)), 200),
        Clock(SAVED),
        told=True,
    ),
    "diffusers-constant": Case(
        diffusers_average,
        {"decay": 0.9, "min_decay": 0.95},  # the floor wins
        "diffusers",
        Exponential(0.95),
        Clock(SAVED),
        told=True,
    ),
}


def gone_on(
    average: Mapping[str, Tensor], rule: Rule, clock: Clock, every: int, later: list[State]
) -> State:
    """What an average becomes under a rule of ours that takes its clock over."""
    held = {name: average[name].clone() for name in PARAMETERS_OF(average)}
    tick, since = clock.tick(rule, every), clock.since(every)
    for live in later:
        since += 1
        if since == every:
            tick, since = rule.tick(tick, float(every)), 0
            fraction = rule.fractions(tick)["average"]
            for name, tensor in held.items():
                tensor.copy_(live[name] if fraction == 1 else tensor.lerp(live[name], fraction))
    return held


def PARAMETERS_OF(average: Mapping[str, Tensor]) -> list[str]:  # noqa: N802
    return [name for name in average if not name.rpartition(".")[2].startswith(("running", "num_"))]


def assert_equal(got: Mapping[str, Tensor] | None, wanted: Mapping[str, Tensor]) -> None:
    assert got is not None and set(got) == set(wanted)
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name


def assert_near(got: State, wanted: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    for name, tensor in got.items():
        most = TOLERANCE[dtype] * max(1.0, float(wanted[name].abs().max()))
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=most)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_load_says_which_rule_it_assumed(tmp_path: Path, case: Case) -> None:
    model = Net()
    run = follow(tmp_path / "average.pt", case.make(model, **case.options), model)
    averager = Averager(model, {"average": case.rule}, every=case.every)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        polyak.load(run.path, averager, count=None if case.clock else 1)
    words = (
        f"does not name its rule.*assumed \\(average: {re.escape(str(case.rule))}\\).*from_library"
    )
    assert len(said) == (not case.told)
    assert all(re.search(words, str(each.message)) and each.filename == __file__ for each in said)


@pytest.mark.parametrize("dtype", first_quick(TOLERANCE), ids=str, indirect=True)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_file_is_read_as_it_is_and_goes_on(
    tmp_path: Path, case: Case, dtype: torch.dtype
) -> None:
    model = Net()
    run = follow(tmp_path / "average.pt", case.make(model, **case.options), model)
    positional = case.format in ("torch-ema", "diffusers")
    found = read(run.path, PARAMETERS if positional else None)
    assert (found.format, found.clock) == (case.format, case.clock)
    assert found.rules == ({"average": case.rule} if case.told else {})
    assert_equal(found.averages["average"], run.average)
    if case.format == "ema-pytorch" and case.options.get("include_online_model", True):
        assert_equal(found.live, run.live)
    else:
        assert found.live is None
    clock = found.clock or Clock(1)
    after = gone_on(found.averages["average"], case.rule, clock, case.every, run.later)
    assert set(PARAMETERS) <= set(after)
    assert_near(after, run.final, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str, indirect=True)
def test_karras_ema_reads_as_the_same_keys_read_and_runs_one_update_ahead(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    model = Net()
    run = follow(tmp_path / "it.pt", karras(model, sigma_rel=0.1, update_every=1), model)
    found = read(run.path)
    assert (found.format, found.clock, found.live) == ("ema-pytorch", Clock(SAVED, "calls"), None)
    rule, clock = Power.from_relative_std(0.1), Clock(SAVED, "updates", ahead=1)
    assert_near(gone_on(found.averages["average"], rule, clock, 1, run.later), run.final, dtype)


class TestPostHoc:
    """ema-pytorch's `PostHocEMA`: its folder of snapshots, one of them, its state dict."""

    def made(self, folder: Path, steps: int = 12, every: int = 4) -> post_hoc_ema.PostHocEMA:
        model = Net()
        average = post_hoc_ema.PostHocEMA(
            model,
            sigma_rels=(0.05, 0.1),
            update_every=1,
            checkpoint_every_num_steps=every,
            checkpoint_folder=str(folder),
        )
        for step in range(steps):
            wander(model, step)
            average.update()
        return average

    def test_snapshots(self, tmp_path: Path) -> None:
        average = self.made(tmp_path)
        found = read(tmp_path)
        assert (found.format, found.clock, found.live) == ("post-hoc-ema", None, None)
        assert list(found.averages) == ["0.4", "0.8", "0.12", "1.4", "1.8", "1.12"]
        for i, each in enumerate(average.ema_models):
            wanted = {k: t.half() for k, t in each.ema_model.state_dict().items()}
            assert_equal(found.averages[f"{i}.12"], wanted)

    def test_snapshots_of_one_step_have_a_clock(self, tmp_path: Path) -> None:
        self.made(tmp_path, steps=6)
        assert read(tmp_path).clock == Clock(4, "updates", ahead=1)

    def test_a_snapshot(self, tmp_path: Path) -> None:
        """Its clock is its name: 3001 in float16 is 3000."""
        average = self.made(tmp_path, steps=3)
        for each in average.ema_models:
            each.step.fill_(3001)
        average.checkpoint()
        found = read(tmp_path / "1.3001.pt")
        assert (found.format, found.clock) == ("post-hoc-ema", Clock(3001, "updates", ahead=1))
        wanted = average.ema_models[1].ema_model.state_dict()
        assert_equal(found.averages["average"], {k: t.half() for k, t in wanted.items()})
        renamed = (tmp_path / "1.3001.pt").rename(tmp_path / "last.pt")
        assert read(renamed).clock is None

    def test_the_state_dict(self, tmp_path: Path) -> None:
        average = self.made(tmp_path / "snapshots")
        torch.save(average.state_dict(), tmp_path / "it.pt")
        found = read(tmp_path / "it.pt")
        assert (found.format, found.clock) == ("post-hoc-ema", Clock(12, "updates", ahead=1))
        assert list(found.averages) == ["0", "1"]
        for i, each in enumerate(average.ema_models):
            assert_equal(found.averages[str(i)], each.ema_model.state_dict())


def ddp(model: nn.Module, folder: Path) -> nn.Module:
    """The model in DistributedDataParallel, in a group of this process alone."""
    store = f"file://{folder / 'store'}"
    torch.distributed.init_process_group("gloo", store, rank=0, world_size=1)
    return nn.parallel.DistributedDataParallel(model)


@pytest.mark.parametrize("wrapped", ["compiled", "ddp", "compiled-ddp", "ddp-compiled"])
def test_names_are_those_of_the_plain_model(tmp_path: Path, wrapped: str) -> None:
    plain = Net()
    model: Any = plain
    try:
        for wrapper in reversed(wrapped.split("-")):
            model = torch.compile(model) if wrapper == "compiled" else ddp(model, tmp_path)
        if "ddp" in wrapped:  # which cannot be copied
            average: Any = swa_utils.AveragedModel(nn.Module())
            average.module = model
        else:
            average = swa_utils.AveragedModel(model)
        for name, state in (("average", average.state_dict()), ("live", model.state_dict())):
            assert not set(plain.state_dict()) & set(state)
            torch.save(state, tmp_path / f"{name}.pt")
    finally:
        if "ddp" in wrapped:
            torch.distributed.destroy_process_group()
    assert_equal(read(tmp_path / "average.pt").averages["average"], plain.state_dict())
    assert_equal(read(tmp_path / "live.pt").live, plain.state_dict())


def test_wrappers_are_those_of_tracking() -> None:
    """A model and its file have the same names."""
    for wrapper in WRAPPERS:
        inner, outer = nn.Linear(1, 1), nn.Module()
        setattr(outer, wrapper, inner)
        model = nn.Sequential(outer)
        assert [item.name for item in track(model, Choose()).tracked] == list(
            canonical_names(model.state_dict())
        )


def test_names_that_meet_are_refused(tmp_path: Path) -> None:
    torch.save({"a.w": torch.ones(1), "_orig_mod.a.w": torch.ones(1)}, tmp_path / "it.pt")
    with pytest.raises(
        ValueError, match=r"it\.pt: the keys 'a\.w' and '_orig_mod\.a\.w' are both 'a\.w'"
    ):
        read(tmp_path / "it.pt")


def test_module_in_front_stays_unless_every_key_has_it() -> None:
    assert list(canonical_names(["module.w", "head.w"])) == ["module.w", "head.w"]
    assert list(canonical_names(["a.module.w", "a.module.b"])) == ["a.module.w", "a.module.b"]


class TestPositions:
    """Tensors without names."""

    def saved(self, folder: Path, within: dict[str, Any] | None = None) -> Path:
        model = Net()
        state = torch_ema_average(model, decay=0.9).state()
        torch.save({**within, "ema": state} if within is not None else state, folder / "it.pt")
        return folder / "it.pt"

    def test_names_are_asked_for(self, tmp_path: Path) -> None:
        with pytest.raises(
            ValueError, match=r"it\.pt: it has 4 tensors .*\n?.*named_parameters\(\)"
        ):
            read(self.saved(tmp_path))

    def test_wrong_names_are_refused(self, tmp_path: Path) -> None:
        path = self.saved(tmp_path)
        with pytest.raises(ValueError, match=r"it\.pt: 3 names were given for 4 tensors"):
            read(path, PARAMETERS[:3])
        with pytest.raises(ValueError, match="a name is given twice"):
            read(path, ["a", "b", "c", "a"])
        with pytest.raises(ValueError, match=r'names is \'abcd\', wanted a list .* "positions"'):
            read(path, "abcd")

    def test_positions_will_do_to_look_at_it(self, tmp_path: Path) -> None:
        found = read(self.saved(tmp_path), "positions")
        assert [tuple(t.shape) for t in found.averages["average"].values()] == [
            (2, 3),
            (2,),
            (2,),
            (2,),
        ]
        assert list(found.averages["average"]) == ["0", "1", "2", "3"]

    def test_names_of_a_wrapped_model(self, tmp_path: Path) -> None:
        found = read(self.saved(tmp_path), [f"module.{name}" for name in PARAMETERS])
        assert list(found.averages["average"]) == PARAMETERS

    def test_shapes_are_compared_with_the_live_weights(self, tmp_path: Path) -> None:
        path = self.saved(tmp_path, {"model": Net().state_dict()})
        assert_equal(read(path, PARAMETERS).live, torch.load(path)["model"])
        swapped = ["body.bias", "body.weight", *PARAMETERS[2:]]
        with pytest.raises(
            ValueError, match=r"not in the order(?s:.*)body\.bias: \(2, 3\), wanted \(2,\)"
        ):
            read(path, swapped)

    def test_what_was_collected_is_no_live_weights(self, tmp_path: Path) -> None:
        """torch_ema saves, for ever after, what it once put aside."""
        import torch_ema

        model = Net()
        average = torch_ema.ExponentialMovingAverage(model.parameters(), 0.9)
        average.store()
        torch.save(average.state_dict(), tmp_path / "it.pt")
        assert read(tmp_path / "it.pt", PARAMETERS).live is None


NO_RULE = {
    "min_decay in the ramp": {"min_decay": 0.5},
    "decay 1": {"decay": 1.0},
}


@pytest.mark.parametrize("options", NO_RULE.values(), ids=NO_RULE)
def test_a_rule_that_is_none_of_ours_is_left_out(tmp_path: Path, options: dict[str, Any]) -> None:
    torch.save(diffusers_average(Net(), **options).state(), tmp_path / "it.pt")
    assert read(tmp_path / "it.pt", PARAMETERS).rules == {}


class TestFolders:
    """Folders of the Hugging Face libraries, and of torch.distributed.checkpoint."""

    def unet(self) -> Any:
        return diffusers.UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
        )

    def test_diffusers_save_pretrained(self, tmp_path: Path) -> None:
        model = self.unet()
        options: dict[str, Any] = {"decay": 0.9, "use_ema_warmup": True, "model_cls": type(model)}
        average = diffusers.training_utils.EMAModel(
            model.parameters(), model_config=model.config, **options
        )
        for step in range(5):
            wander(model, step)
            average.step(model.parameters())
        average.save_pretrained(tmp_path / "unet_ema")
        found = read(tmp_path / "unet_ema")
        assert (found.format, found.live, found.clock) == ("diffusers", None, Clock(5))
        assert found.rules == {"average": Exponential(InversePower(max_decay=0.9))}
        names = [name for name, _ in model.named_parameters()]
        wanted = dict(zip(names, average.shadow_params, strict=True))
        assert_equal(found.averages["average"], wanted)

    def test_settings_that_are_damaged(self, tmp_path: Path) -> None:
        self.test_diffusers_save_pretrained(tmp_path)
        config = tmp_path / "unet_ema" / "config.json"
        text = config.read_text()
        config.write_text(text.replace('"decay": 0.9', '"decay": "most"'))
        with pytest.raises(ValueError, match=r"config\.json: decay is 'most', wanted a number"):
            read(tmp_path / "unet_ema")
        config.write_text(text[:-5])
        with pytest.raises(ValueError, match=r"config\.json: the settings cannot be read"):
            read(tmp_path / "unet_ema")

    def test_a_model_of_diffusers_in_shards(self, tmp_path: Path) -> None:
        model = self.unet()
        model.save_pretrained(tmp_path, max_shard_size="10KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        found = read(tmp_path)
        assert (found.format, dict(found.averages)) == ("sharded-safetensors", {})
        assert_equal(found.live, model.state_dict())

    @pytest.mark.parametrize("size", ["5GB", "10KB"])
    def test_a_model_of_transformers(self, tmp_path: Path, size: str) -> None:
        config = transformers.BertConfig(
            vocab_size=20,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=8,
        )
        model = transformers.BertModel(config)
        model.save_pretrained(tmp_path, max_shard_size=size)
        found = read(tmp_path)
        assert found.format == ("safetensors" if size == "5GB" else "sharded-safetensors")
        assert_equal(found.live, model.state_dict())

    def test_an_index_may_be_named(self, tmp_path: Path) -> None:
        self.unet().save_pretrained(tmp_path, max_shard_size="10KB")
        (index,) = tmp_path.glob("*.index.json")
        assert_equal(read(index).live, dict(read(tmp_path).live or {}))

    def test_which_of_several_is_not_guessed(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            save_file({"w": torch.ones(1)}, tmp_path / f"{name}.safetensors")
        with pytest.raises(ValueError, match=r"holds a\.safetensors, b\.safetensors: read one"):
            read(tmp_path)

    def test_a_folder_without_weights(self, tmp_path: Path) -> None:
        (tmp_path / "unet_ema").mkdir()
        with pytest.raises(
            ValueError, match=r"is a folder of folders \(unet_ema\) without weights"
        ):
            read(tmp_path)


def saved_distributed(state: Mapping[str, Any], folder: Path) -> Path:
    save(dict(state), checkpoint_id=folder, **ALONE)
    return folder


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
class TestDistributed:
    """Folders of torch.distributed.checkpoint, by the real writer."""

    def test_a_state_dict(self, tmp_path: Path) -> None:
        model = Net()
        found = read(saved_distributed(model.state_dict(), tmp_path / "it"))
        assert (found.format, dict(found.averages)) == ("dcp", {})
        assert_equal(found.live, model.state_dict())

    def test_a_training_state(self, tmp_path: Path) -> None:
        model = Net()
        average = averaged_model(model)
        optimizer = torch.optim.Adam(model.parameters())
        for step in range(5):
            wander(model, step)
            average.update()
        state = {
            "model": model.state_dict(),
            "optim": optimizer.state_dict(),
            "ema": average.state(),
        }
        found = read(saved_distributed({**state, "step": 5}, tmp_path / "it"))
        assert (found.format, found.clock) == ("averaged-model", Clock(5))
        assert_equal(found.live, model.state_dict())
        assert_equal(found.averages["average"], average.average())

    def test_a_name_that_begins_with_model_stays(self, tmp_path: Path) -> None:
        """Where the dictionary was flat, `model.` belongs to the name, as in a language model's."""
        state = {f"model.{name}": tensor for name, tensor in Net().state_dict().items()}
        assert_equal(read(saved_distributed(state, tmp_path / "it")).live, state)
        nested = {"model": Net().state_dict()}
        assert set(read(saved_distributed(nested, tmp_path / "other")).live or {}) == set(
            nested["model"]
        )

    def test_a_folder_that_does_not_tell_how_it_was_nested(self, tmp_path: Path) -> None:
        planner = DefaultSavePlanner(flatten_state_dict=False)
        save(Net().state_dict(), checkpoint_id=tmp_path / "it", **ALONE, planner=planner)
        assert set(read(tmp_path / "it").live or {}) == set(Net().state_dict())

    def test_torchtitan_by_layout(self, tmp_path: Path) -> None:
        model = Net()
        parameters = dict(model.named_parameters())
        average = {name: torch.randn_like(tensor) for name, tensor in parameters.items()}
        slots = {f"state.{name}.ema_params": tensor for name, tensor in average.items()}
        moments = {f"state.{name}.exp_avg": torch.ones(1) for name in parameters}
        state = {**model.state_dict(), "optimizer": {**moments, **slots}, "step": 3}
        found = read(saved_distributed(state, tmp_path / "it"))
        assert (found.format, found.clock, found.rules) == ("torchtitan", None, {})
        assert_equal(found.live, model.state_dict())
        assert_equal(found.averages["average"], average)

    def test_only_what_is_asked_for_is_read(self, tmp_path: Path) -> None:
        folder = saved_distributed({"model": Net().state_dict()}, tmp_path / "it")
        live = read(folder).live
        assert live is not None
        for file in folder.glob("*.distcp"):
            os.truncate(file, file.stat().st_size)
            file.write_bytes(bytes(file.stat().st_size))
        assert "body.weight" in live
        with pytest.raises(ValueError, match=r"body\.weight"):
            live["body.weight"]


lightning_warns = pytest.mark.filterwarnings("ignore")


@lightning_warns
class TestLightning:
    """Checkpoints of a real `Trainer.fit`."""

    @pytest.mark.parametrize("dtype", first_quick(TOLERANCE), ids=str, indirect=True)
    @pytest.mark.parametrize(
        ("callback", "rule", "saved"),
        [
            (lambda: callbacks.EMAWeightAveraging(decay=0.97), Exponential(0.97), SAVED),
            (
                lambda: callbacks.EMAWeightAveraging(decay=0.97, update_every_n_steps=3),
                Exponential(0.97 ** (1 / 3)),
                SAVED + 1,  # a step of an update
            ),
            (callbacks.WeightAveraging, Uniform(), SAVED),
        ],
        ids=["ema", "ema-every-3", "mean"],
    )
    def test_weight_averaging(
        self, tmp_path: Path, callback: Any, rule: Rule, saved: int, dtype: torch.dtype
    ) -> None:
        averaging = callback()
        run = fit(tmp_path / "it.ckpt", [averaging], averaged_by(averaging), dtype, saved=saved)
        found = read(run.path)
        every = getattr(averaging, "update_every_n_steps", 1)
        assert (found.format, found.clock) == ("lightning", Clock(-(-saved // every)))
        assert_equal(found.live, run.live)
        assert_equal(found.averages["average"], run.average)
        clock = found.clock or Clock(0)
        after = gone_on(found.averages["average"], rule, clock, every, run.later)
        assert_near(after, run.final, dtype)

    def test_stochastic_weight_averaging(self, tmp_path: Path) -> None:
        averaging = callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=5)
        average = lambda: dict(getattr(averaging, "_average_model").state_dict())  # noqa: E731, B009
        run = fit(tmp_path / "it.ckpt", [averaging], average, torch.float64, recorder=EpochRecorder)
        found = read(run.path)
        assert (found.format, found.clock) == ("lightning", Clock(11))  # epochs 4 to 14, from 0
        assert_equal(found.live, run.live)
        assert_equal(found.averages["average"], run.average)
        after = gone_on(run.average, Uniform(), found.clock or Clock(0), 1, run.later[:15])
        assert_near(after, run.final, torch.float64)

    def test_of_two_averages_the_live_weights_are_lost(self, tmp_path: Path) -> None:
        first, second = callbacks.WeightAveraging(), callbacks.EMAWeightAveraging()
        both = {"first": averaged_by(first), "second": averaged_by(second)}
        average = lambda: {f"{i}.{n}": t for i, of in both.items() for n, t in of().items()}  # noqa: E731
        run = fit(tmp_path / "it.ckpt", [first, second], average, torch.float64)
        saved = torch.load(run.path, weights_only=True)["current_model_state"]
        found = read(run.path)
        assert found.live is None
        for name, tensor in found.averages["average"].items():
            assert torch.equal(tensor, run.average[f"second.{name}"])
            assert torch.equal(saved[name], run.average[f"first.{name}"])

    def test_without_an_average(self, tmp_path: Path) -> None:
        run = fit(tmp_path / "it.ckpt", [], dict, torch.float32)
        found = read(run.path)
        assert (found.format, dict(found.averages), found.clock) == ("lightning", {}, None)
        assert_equal(found.live, run.live)


def of_plain_keys() -> dict[str, tuple[dict[str, Any], str]]:
    """What training scripts save, by whose habit, and the format that it is read as."""
    live, average = Net().state_dict(), Net().state_dict()
    return {
        "timm": ({"state_dict": live, "state_dict_ema": average, "version": 2}, "timm"),
        "ConvNeXt": ({"model": live, "model_ema": average, "epoch": 3}, "state-dict"),
        "DiT": ({"model": live, "ema": average, "opt": {"state": {}}}, "state-dict"),
        "BasicSR": ({"params": live, "params_ema": average}, "state-dict"),
    }


@pytest.mark.parametrize("by", of_plain_keys())
def test_an_average_beside_the_live_weights_by_layout(tmp_path: Path, by: str) -> None:
    state, wanted = of_plain_keys()[by]
    live, average = (
        each for each in state.values() if isinstance(each, dict) and "body.bias" in each
    )
    torch.save(state, tmp_path / "it.pt")
    found = read(tmp_path / "it.pt")
    assert (found.format, found.clock, found.rules) == (wanted, None, {})
    assert_equal(found.live, live)
    assert_equal(found.averages["average"], average)


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "net", "weights"])
def test_live_weights_under_a_key(tmp_path: Path, key: str) -> None:
    state = Net().state_dict()
    torch.save({"epoch": 3, key: state, "optimizer": {"state": {}}}, tmp_path / "it.pt")
    found = read(tmp_path / "it.pt")
    assert (found.format, dict(found.averages)) == ("state-dict", {})
    assert_equal(found.live, state)


def test_an_average_that_tells_its_layout_under_any_key(tmp_path: Path) -> None:
    model = Net()
    average = ema(model, **EMA, include_online_model=False)
    average.update()
    state = {"net": model.state_dict(), "teacher": average.state(), "step": 1}
    torch.save(state, tmp_path / "it.pt")
    found = read(tmp_path / "it.pt")
    assert (found.format, found.clock) == ("ema-pytorch", Clock(1, "calls"))
    assert_equal(found.live, model.state_dict())
    torch.save({**state, "other": average.state()}, tmp_path / "it.pt")
    both = read(tmp_path / "it.pt")
    assert (list(both.averages), both.clock) == (["teacher", "other"], Clock(1, "calls"))
    later = ema(model, **EMA, include_online_model=False)
    torch.save({**state, "other": later.state()}, tmp_path / "it.pt")
    assert read(tmp_path / "it.pt").clock is None  # they have clocks of their own


@pytest.mark.parametrize("extra", [False, True])
def test_safetensors(tmp_path: Path, extra: bool) -> None:
    state = Net().state_dict()
    save_file(state, tmp_path / "it.safetensors", {"format": "pt"} if extra else None)
    found = read(tmp_path / "it.safetensors")
    assert (found.format, dict(found.averages)) == ("safetensors", {})
    assert_equal(found.live, state)


def test_a_layout_is_told_by_its_keys_whatever_file_it_lies_in(tmp_path: Path) -> None:
    model = Net()
    average = ema(model, **EMA)
    average.update()
    save_file({k: t.clone() for k, t in average.state().items()}, tmp_path / "it.safetensors")  # type: ignore[attr-defined]
    found = read(tmp_path / "it.safetensors")
    assert (found.format, found.clock) == ("ema-pytorch", Clock(1, "calls"))
    assert_equal(found.averages["average"], average.average())


def composer_state(active: bool, started: bool = True) -> dict[str, Any]:
    model = Net()
    model.body.bias.requires_grad_(False)
    other = {n: torch.randn_like(p) for n, p in model.named_parameters() if p.requires_grad}
    buffers = {n: b + 1 for n, b in model.named_buffers()}
    inner = {"named_parameters_dict": other, "named_buffers_dict": buffers}
    algorithm = {"ema_model": inner, "ema_weights_active": active, "ema_started": started}
    return {"state": {"model": model.state_dict(), "algorithms": [("EMA", algorithm)]}, "rng": []}


@pytest.mark.parametrize("active", [True, False])
def test_composer_by_layout(tmp_path: Path, active: bool) -> None:
    """While it saves, the model holds the average; a frozen parameter is in the model alone."""
    saved = composer_state(active)
    torch.save(saved, tmp_path / "it.pt")
    found = read(tmp_path / "it.pt")
    assert (found.format, found.clock, found.rules) == ("composer", None, {})
    model = saved["state"]["model"]
    held = saved["state"]["algorithms"][0][1]["ema_model"]
    other = {**model, **held["named_parameters_dict"], **held["named_buffers_dict"]}
    assert torch.equal(other["body.bias"], model["body.bias"])
    assert_equal(found.live, other if active else model)
    assert_equal(found.averages["average"], model if active else other)


def test_composer_before_its_start_by_layout(tmp_path: Path) -> None:
    saved = composer_state(active=False, started=False)
    torch.save(saved, tmp_path / "it.pt")
    found = read(tmp_path / "it.pt")
    assert dict(found.averages) == {}
    assert_equal(found.live, saved["state"]["model"])


def test_mmengine_by_layout(tmp_path: Path) -> None:
    live, average = Net().state_dict(), Net().state_dict()
    exchanged = {"steps": torch.tensor(7), **{f"module.{k}": t for k, t in live.items()}}
    torch.save(
        {"state_dict": average, "ema_state_dict": exchanged, "meta": {}}, tmp_path / "it.pth"
    )
    found = read(tmp_path / "it.pth")
    assert (found.format, found.clock) == ("mmengine", Clock(7, "calls"))
    assert_equal(found.live, live)
    assert_equal(found.averages["average"], average)


class TestEdm2ByLayout:
    """EDM2's training state, built by hand: its repository is no package."""

    def state(self, ema: dict[str, Any]) -> dict[str, Any]:
        return {
            "state": {"cur_nimg": 4096, "total_elapsed_time": 1.5},
            "net": Net().state_dict(),
            "loss_fn": {},
            "optimizer": {"state": {}},
            "ema": ema,
        }

    @pytest.mark.parametrize("stds", [[0.05, 0.1], [0.1]])
    def test_power_functions(self, tmp_path: Path, stds: list[float]) -> None:
        emas = [Net().state_dict() for _ in stds]
        saved = self.state({"stds": stds, "emas": emas})
        torch.save(saved, tmp_path / "it.pt")
        found = read(tmp_path / "it.pt")
        names = ["0.05", "0.1"] if len(stds) == 2 else ["average"]
        assert (found.format, found.clock) == ("edm2", Clock(4096, "time"))
        rules = {name: Power.from_relative_std(std) for name, std in zip(names, stds, strict=True)}
        assert found.rules == rules
        assert_equal(found.live, saved["net"])
        for name, wanted in zip(names, emas, strict=True):
            assert_equal(found.averages[name], wanted)

    def test_a_half_life(self, tmp_path: Path) -> None:
        average = Net().state_dict()
        torch.save(self.state(average), tmp_path / "it.pt")
        found = read(tmp_path / "it.pt")
        assert (found.rules, found.clock) == ({}, Clock(4096, "time"))
        assert_equal(found.averages["average"], average)

    def test_it_goes_on_by_the_papers_decay(self) -> None:
        """beta = (1 - dt / t)^(gamma + 1), t the images after the batch (algorithm 1)."""
        rule = Power.from_relative_std(0.1)
        live = torch.randn(STEPS, dtype=torch.float64)
        batch, wanted, held = 32, 0.0, 0.0
        tick = Clock(SAVED * batch, "time").tick(rule, 1)
        for step, value in enumerate(live.tolist(), 1):
            beta = (1 - 1 / step) ** (rule.gamma + 1)
            wanted = beta * wanted + (1 - beta) * value
            held = wanted if step == SAVED else held
            if step > SAVED:
                tick = rule.tick(tick, float(batch))
                held += rule.fractions(tick)["average"] * (value - held)
        assert held == pytest.approx(wanted, abs=1e-12)


UNKNOWN: dict[str, tuple[object, str]] = {
    "a list": ([torch.ones(1)], "holds a list, wanted a dictionary"),
    "no weights": (
        {"epoch": 3, "history": [1, 2], "w": torch.ones(2)},
        r"no layout that polyak knows\. It holds 'epoch' \(int\), 'history' \(list of 2\), "
        r"'w' \(tensor \(2,\)\); known are polyak, averaged-model, composer",
    ),
    "nothing": ({}, "It holds nothing; known are"),
    "a count that is none": (
        {"n_averaged": torch.tensor([1, 2]), "module.w": torch.ones(1)},
        r"n_averaged is \(2,\), wanted one integer >= 0",
    ),
    "a negative count": (
        {"n_averaged": torch.tensor(-1), "module.w": torch.ones(1)},
        r"n_averaged is -1, wanted one integer >= 0",
    ),
    "a count of nan": (
        {"initted": torch.ones(1), "step": torch.tensor([torch.nan]), "ema_model.w": torch.ones(1)},
        "step is nan, wanted one integer >= 0",
    ),
    "a decay in words": (
        {"decay": "0.9", "num_updates": 1, "shadow_params": [torch.ones(1)]},
        "decay is '0.9', wanted a number",
    ),
    "no list of tensors": (
        {"decay": 0.9, "num_updates": 1, "shadow_params": [1.0]},
        "shadow_params is a list, wanted a list of tensors",
    ),
    "a part that is missing": (
        {"state": {"model": {"w": torch.ones(1)}, "algorithms": [("EMA", {"ema_started": True})]}},
        "a part of its layout is missing",
    ),
}


@pytest.mark.parametrize(("content", "message"), UNKNOWN.values(), ids=UNKNOWN)
def test_what_is_not_known_is_refused_with_what_it_holds(
    tmp_path: Path, content: object, message: str
) -> None:
    torch.save(content, tmp_path / "it.pt")
    with pytest.raises(ValueError, match=rf"it\.pt\b.*{message}"):
        read(tmp_path / "it.pt", "positions")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none"):
        read(tmp_path / "none.pt")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "it.pt")
    with pytest.raises(ValueError, match=r"it\.pt is a pipe or a device"):
        read(tmp_path / "it.pt")


def layouts() -> list[dict[str, Any]]:
    """One state of every layout, small."""
    w = {"w": torch.ones(2)}
    ema_state = {
        "initted": torch.tensor(True),
        "step": torch.tensor(3),
        "ema_model.w": torch.ones(2),
    }
    settings = {"min_decay": 0.0, "update_after_step": 0, "use_ema_warmup": True, "inv_gamma": 1.0}
    lit = {"pytorch-lightning_version": "2.6.6", "state_dict": w, "callbacks": {}}
    averaging = {"averaging_state": {"n_averaged": torch.tensor(2)}, "current_model_state": w}
    stochastic = {"S": {"n_averaged": 2, "average_model_state": w}}
    nemo = {"ema": [torch.ones(2)], "current_step": 3, "decay": 0.9, "every_n_steps": 1}
    held = {"named_parameters_dict": w, "named_buffers_dict": {}}
    algorithm = {"ema_model": held, "ema_weights_active": True, "ema_started": True}
    counters = {"ema.decay": torch.tensor(0.9), "ema.num_updates": torch.tensor(3)}
    averager = Averager(w, "bema()")
    averager.update()
    averager_state = averager.state_dict()
    return [
        ema_state,
        {f"ema_models.{i}.{key}": tensor for i in (0, 1) for key, tensor in ema_state.items()},
        {"n_averaged": torch.tensor(3), "module.w": torch.ones(2)},
        {
            "decay": 0.9,
            "num_updates": 3,
            "shadow_params": [torch.ones(2)],
            "collected_params": None,
        },
        {
            "decay": 0.9,
            "optimization_step": 3,
            "shadow_params": [torch.ones(2)],
            "power": 1,
            **settings,
        },
        {**lit, **averaging, "callbacks": {"E": {"latest_update_step": 3}}},
        {**lit, "callbacks": stochastic},
        {**lit, "optimizer_states": [{"opt": {}, **nemo}]},
        {"state_dict": w, "state_dict_ema": w, "version": 2},
        {"state": {"model": w, "algorithms": [("EMA", algorithm)]}},
        {"state_dict": w, "ema_state_dict": {"steps": torch.tensor(3), "module.w": torch.ones(2)}},
        {"state": {"cur_nimg": 9}, "net": w, "ema": {"stds": [0.1], "emas": [w]}},
        {"model": w, "ema": w},
        {"model": w, "ema": {"module": w, "updates": 3}},
        {"model": w, "model_ema": {"n_averaged": torch.tensor(3), "module.w": torch.ones(2)}},
        {"model": {"net.w": w["w"], "ema.w": w["w"], **counters}},
        {"model": w, "ema_list": [torch.ones(2)]},
        {"model": w, "average": averager_state},
    ]


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every part of a structure."""
    if at:
        yield at
    if isinstance(value, dict):
        for key, each in value.items():
            yield from places(each, (*at, key))
    elif isinstance(value, (list, tuple)):
        for i, each in enumerate(value):
            yield from places(each, (*at, i))


def replaced(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    """A structure with another part; `...` takes it away."""
    if not at:
        return new
    first, rest = at[0], at[1:]
    if isinstance(value, dict):
        changed = {key: replaced(v, rest, new) if key == first else v for key, v in value.items()}
        return {key: v for key, v in changed.items() if v is not ...}
    parts = [replaced(v, rest, new) if i == first else v for i, v in enumerate(value)]
    return [v for v in parts if v is not ...]


JUNK = [
    None, True, 0, -1, 10**400, 1.5, math.nan, math.inf, 1j, "text", b"", [], {}, {1: 2}, (1, 2),
    torch.ones(()), torch.ones(3), torch.tensor(math.nan), torch.tensor(True), {"w": 3}, [[torch.ones(1)]],
]  # fmt: skip


@pytest.mark.parametrize("state", layouts(), ids=lambda state: "-".join(list(state)[:3]))
def test_a_part_of_any_other_kind_is_an_error_that_names_the_file(
    tmp_path: Path, state: dict[str, Any]
) -> None:
    torch.save({"state": state, "junk": JUNK}, tmp_path / "stored.pt")
    stored: Any = load(OpenFile(tmp_path / "stored.pt").whole).value
    state, path = stored["state"], Path("it.pt")
    whole = recognise(Found(path, "state-dict", state, "positions"))
    assert whole.averages and whole.format in FORMATS
    for place, junk in product(places(state), [..., *stored["junk"]]):
        damaged = replaced(state, place, junk)
        try:
            found = recognise(Found(path, "state-dict", damaged, "positions"))
        except ValueError as error:
            assert str(error).startswith("it.pt: ")
        else:
            live = [] if found.live is None else [found.live]
            for held in (*live, *found.averages.values()):
                assert all(isinstance(tensor, Tensor) for tensor in held.values())
