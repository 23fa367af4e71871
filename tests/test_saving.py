"""Files of our own: exact resume, one clear error for everything else, and what SIGKILL leaves."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import polyak
from killing import kill
from models import assert_same, everything, snapshot, wander
from polyak import EMA, Averager, Exponential, checkpoints
from polyak._lazy import spec_of
from polyak.checkpoints._open.files import OpenFile
from polyak.checkpoints._safetensors import files as tensorfile
from polyak.checkpoints._safetensors.files import TensorFile
from polyak.rules import Rule
from quick import first_quick
from rule_examples import RULE_EXAMPLES, each_rule

EXAMPLES = [rule for rules in RULE_EXAMPLES.values() for rule in rules]
SEVERAL = {"fast": "exponential(0.9)", "window": "window(3)", "bema": "tail(bema(), 4)"}
KINDS: list[dict[str, Any]] = [
    {},
    {"every": 3},
    {"rounding": "compensated"},
    {"dtype": torch.bfloat16, "rounding": "stochastic", "select": lambda name: name != "phase"},
    {"dtype": torch.float64},
]


def trained(rule: Any, steps: range, of: torch.dtype, **options: Any) -> tuple[nn.Module, Averager]:
    torch.manual_seed(0)
    model = everything(of)
    averager = Averager(model, rule, **options)
    for step in steps:
        wander(model, step)
        averager.update(1.5 if step % 4 == 0 else None)
    return model, averager


def go_on(model: nn.Module, averager: Averager, steps: range) -> dict[str, dict[str, Tensor]]:
    for step in steps:
        wander(model, step)
        averager.update(1.5 if step % 4 == 0 else None)
    names = averager.rule if isinstance(averager.rule, dict) else {"average": None}
    return {name: averager.average(name) for name in names}


def resumed(
    path: Path, model: nn.Module, averager: Averager, rule: Any, **options: Any
) -> Averager:
    """An averager of the same model, made anew from a file."""
    polyak.save(path, averager)
    other = Averager(model, rule, **options)
    polyak.load(path, other)
    return other


@pytest.mark.parametrize("rule", [*each_rule(EXAMPLES), SEVERAL], ids=str)
@pytest.mark.parametrize("stop", first_quick([7, 1]))
def test_a_resumed_average_is_the_undisturbed_one_bit_for_bit(
    tmp_path: Path, rule: Rule | dict[str, str], stop: int
) -> None:
    model, averager = trained(rule, range(20), torch.bfloat16)
    wanted = go_on(model, averager, range(0))
    model, averager = trained(rule, range(stop), torch.bfloat16)
    other = resumed(tmp_path / "a.safetensors", model, averager, rule)
    got = go_on(model, other, range(stop, 20))
    for name in wanted:
        assert_same(wanted[name], got[name])


@pytest.mark.parametrize("options", KINDS, ids=lambda options: "-".join(map(str, options)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_so_it_is_with_every_option(
    tmp_path: Path, options: dict[str, Any], dtype: torch.dtype
) -> None:
    model, averager = trained(SEVERAL, range(23), dtype, **options)
    wanted = go_on(model, averager, range(0))
    model, averager = trained(SEVERAL, range(8), dtype, **options)
    other = resumed(tmp_path / "a.safetensors", model, averager, SEVERAL, **options)
    got = go_on(model, other, range(8, 23))
    for name in wanted:
        assert_same(wanted[name], got[name])


def test_before_the_first_update_there_is_a_state_too(tmp_path: Path) -> None:
    model, averager = trained(SEVERAL, range(0), torch.float32)
    other = resumed(tmp_path / "a.safetensors", model, averager, SEVERAL)
    assert other.count == 0 and not checkpoints.read(tmp_path / "a.safetensors").averages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_articles_class_resumes_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    def run(stop: int | None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = everything(dtype)
        ema = EMA(model, beta=0.9, update_after_step=3, update_every=2)
        for step in range(20):
            if step == stop:
                polyak.save(tmp_path / "ema.safetensors", ema, overwrite=True)
                ema = EMA(model, beta=0.9, update_after_step=3, update_every=2)
                polyak.load(tmp_path / "ema.safetensors", ema)
            wander(model, step)
            ema.update()
        return dict(ema.state_dict())

    wanted = run(None)
    for stop in (1, 4, 5, 12):
        assert_same(wanted, run(stop))


def test_a_file_is_plain_safetensors_and_tells_what_it_is(tmp_path: Path) -> None:
    _, averager = trained("exponential(0.9)", range(5), torch.bfloat16)
    path = tmp_path / "a.safetensors"
    polyak.save(path, averager)
    held = load_file(path)
    average = averager.average()
    assert torch.equal(held["averages/average/average/body.weight"], average["body.weight"])
    described = json.loads(TensorFile(OpenFile(path)).metadata["polyak"])
    assert described["averages"]["average"]["rule"] == "exponential(0.9)"
    assert described["averages"]["average"]["tick"] == [5, 6.0, 1.5, None]
    assert described["model"]["embedding.weight"]["aliases"] == ["head.weight"]


@pytest.mark.parametrize("rule", [Exponential(0.9), *map(polyak.parse, SEVERAL.values())], ids=str)
def test_read_gives_the_average(tmp_path: Path, rule: Rule) -> None:
    model, averager = trained(rule, range(9), torch.bfloat16, select="*")
    polyak.save(tmp_path / "a.safetensors", averager)
    found = checkpoints.read(tmp_path / "a.safetensors")
    assert (found.format, found.count, dict(found.rules)) == ("polyak", 9, {"average": rule})
    assert_same(dict(found.averages["average"]), averager.average())
    state = model.state_dict()
    assert all(state[name].dtype == dtype for name, dtype in found.dtypes.items())


def test_read_gives_the_articles_class(tmp_path: Path) -> None:
    model = everything()
    ema = EMA(model, update_every=1, update_after_step=0)
    ema.update()
    polyak.save(tmp_path / "ema.safetensors", ema)
    found = checkpoints.read(tmp_path / "ema.safetensors")
    assert found.count == 1 and found.live is not None
    assert_same(dict(found.live), dict(model.state_dict()))
    assert_same(dict(found.averages["average"]), dict(ema.ema_model.state_dict()))


def replaced(path: Path, **changes: Any) -> None:
    """The file with another description, and a digest that is right for it."""
    file = TensorFile(OpenFile(path))
    described = json.loads(file.metadata["polyak"]) | changes
    held = {name: file[name].clone() for name in file}
    specs = {name: spec_of(tensor) for name, tensor in held.items()}
    metadata = {"polyak": json.dumps(described)}
    tensorfile.write(path, specs, lambda name: [held[name]], metadata, checksums=True)


class Refusals:
    """Files that do not fit are refused with a list, and change nothing."""

    def refused(self, path: Path, averager: Averager, *said: str, **options: Any) -> None:
        before = averager.state_dict() if averager.count else None
        with pytest.raises(ValueError) as error:
            polyak.load(path, averager, **options)
        assert str(path) in str(error.value) or "load_state_dict" in str(error.value)
        for words in said:
            assert words in str(error.value)
        if before is not None:
            after = averager.state_dict()
            assert str(before["averages"].keys()) == str(after["averages"].keys())


class TestRefusals(Refusals):
    def test_another_rule_is_said_and_changes_nothing_unless_told(self, tmp_path: Path) -> None:
        model, averager = trained("exponential(0.9)", range(5), torch.float32)
        path = tmp_path / "a.safetensors"
        polyak.save(path, averager)
        other = Averager(model, "exponential(0.99)")
        self.refused(path, other, "exponential(0.9), wanted exponential(0.99)", "change_rule=True")
        assert other.count == 0
        polyak.load(path, other, change_rule=True)
        assert other.count == 5 and other.rule == Exponential(0.99)
        assert_same(other.average(), averager.average())

    def test_a_rule_with_its_own_clock_takes_over_too(self, tmp_path: Path) -> None:
        model, averager = trained("uniform()", range(8), torch.float32)
        path = tmp_path / "a.safetensors"
        polyak.save(path, averager)
        other = Averager(model, "tail(uniform(), 3)")
        polyak.load(path, other, change_rule=True)
        assert other.clock[:2] == averager.clock[:2] and other.clock.inner is not None

    def test_slots_that_the_file_lacks_are_named(self, tmp_path: Path) -> None:
        model, averager = trained("exponential(0.9)", range(5), torch.float32)
        polyak.save(tmp_path / "a.safetensors", averager)
        self.refused(
            tmp_path / "a.safetensors", Averager(model, "bema()"), "anchor", change_rule=True
        )

    def test_another_cadence(self, tmp_path: Path) -> None:
        model, averager = trained("uniform()", range(6), torch.float32, every=2)
        path = tmp_path / "a.safetensors"
        polyak.save(path, averager)
        self.refused(path, Averager(model, "uniform()"), "every=2, this averager has every=1")
        polyak.save(path, EMA(model, update_every=2), overwrite=True)
        with pytest.raises(ValueError, match="update_every: 2, wanted 7"):
            polyak.load(path, EMA(model, update_every=7))

    def test_a_claim_of_slots_that_are_not_there(self, tmp_path: Path) -> None:
        _, averager = trained("window(3)", range(5), torch.float32)
        path = tmp_path / "a.safetensors"
        polyak.save(path, averager)
        for rule, n in (("window(1000000000)", 10**7), ("uniform()", 10**16)):
            claim = {"rule": rule, "tick": [n, float(n), 1.0, None], "slots": ["window.0"]}
            replaced(path, averages={"average": claim})
            with pytest.raises(ValueError, match="too few slots"):
                checkpoints.read(path)

    def test_a_slash_in_an_averages_name(self) -> None:
        with pytest.raises(ValueError, match="wanted one without a slash"):
            Averager({"w": torch.zeros(1)}, {"a/b": "uniform()"})

    def test_names_shapes_and_dtypes(self, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        averager = Averager({"a": torch.zeros(2), "b": torch.zeros(3)}, "uniform()")
        averager.update()
        polyak.save(path, averager)
        other = Averager({"a": torch.zeros(3), "c": torch.zeros(3)}, "uniform()")
        self.refused(path, other, "missing: c", "extra: b", "different: a")
        weights = {"a": torch.zeros(2), "b": torch.zeros(3)}
        narrow = Averager(weights, "uniform()", dtype=torch.bfloat16)
        self.refused(path, narrow, "float32", "wanted", "bfloat16")

    def test_other_averages(self, tmp_path: Path) -> None:
        model, averager = trained(SEVERAL, range(5), torch.float32)
        polyak.save(tmp_path / "a.safetensors", averager)
        other = Averager(model, {**SEVERAL, "more": "uniform()"})
        self.refused(tmp_path / "a.safetensors", other, "missing: more")
        self.refused(tmp_path / "a.safetensors", Averager(model, "uniform()"), "extra: fast")

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"format": 1}, "format is 1, wanted 2"),
            ({"averages": []}, "averages is [], wanted a JSON dict"),
            ({"averages": {"average": {"rule": "uniform()"}}}, "wanted rule, tick and slots"),
            ({"calls": -1}, "calls is -1"),
            ({"pairs": None}, "pairs is None"),
        ],
    )
    def test_descriptions_that_make_no_sense(
        self, tmp_path: Path, changes: dict[str, Any], said: str
    ) -> None:
        _, averager = trained("uniform()", range(5), torch.float32)
        polyak.save(tmp_path / "a.safetensors", averager)
        replaced(tmp_path / "a.safetensors", **changes)
        self.refused(tmp_path / "a.safetensors", averager, said)

    def test_a_changed_byte_is_found(self, tmp_path: Path) -> None:
        _, averager = trained("uniform()", range(5), torch.float32)
        path = tmp_path / "a.safetensors"
        polyak.save(path, averager)
        whole = path.read_bytes()
        path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
        self.refused(path, averager, "damaged")
        with pytest.raises(ValueError, match="damaged"):
            checkpoints.read(path).verify()

    def test_an_ema_is_no_averager(self, tmp_path: Path) -> None:
        model = nn.Linear(2, 2)
        polyak.save(tmp_path / "ema.safetensors", EMA(model))
        self.refused(tmp_path / "ema.safetensors", Averager(model, "uniform()"), "polyak.EMA")
        polyak.save(tmp_path / "a.safetensors", Averager(model, "uniform()"))
        with pytest.raises(ValueError, match="not the state of this EMA"):
            polyak.load(tmp_path / "a.safetensors", EMA(model))
        with pytest.raises(ValueError, match=r"other settings.*\s+different: rule: "):
            polyak.load(tmp_path / "ema.safetensors", EMA(model, beta=0.5))
        with pytest.raises(ValueError, match=r"different: .*ema_model\.weight"):
            polyak.load(tmp_path / "ema.safetensors", EMA(nn.Linear(3, 2)))

    def test_what_cannot_be_saved(self, tmp_path: Path) -> None:
        _, averager = trained("uniform()", range(2), torch.float32)
        with pytest.raises(TypeError, match=r"got Linear, wanted a polyak\.Averager or EMA"):
            polyak.save(tmp_path / "a.safetensors", nn.Linear(1, 1))  # type: ignore[arg-type]
        with averager.applied(), pytest.raises(RuntimeError, match="inside applied"):
            polyak.save(tmp_path / "a.safetensors", averager)
        polyak.save(tmp_path / "a.safetensors", averager)
        with pytest.raises(FileExistsError, match="overwrite=True"):
            polyak.save(tmp_path / "a.safetensors", averager)


class TestExport:
    def test_it_is_the_models_own_state(self, tmp_path: Path) -> None:
        from safetensors.torch import load_model

        model, averager = trained(
            "exponential(0.9)", range(9), torch.bfloat16, select=["body*", "n*"]
        )
        path = tmp_path / "model.safetensors"
        checkpoints.export(path, averager)
        other = everything(torch.bfloat16)
        missing, extra = load_model(other, path)
        assert not missing and not extra
        with averager.applied():
            wanted = snapshot(model)
        wanted["cache"] = snapshot(other)["cache"]  # not saved, so left out
        assert_same(snapshot(other), wanted)
        assert "head.weight" not in load_file(path)

    def test_from_a_file_it_is_the_same(self, tmp_path: Path) -> None:
        _, averager = trained("tail(bema(), 4)", range(9), torch.bfloat16, select="*")
        checkpoints.export(tmp_path / "a.safetensors", averager)
        polyak.save(tmp_path / "state.safetensors", averager)
        checkpoints.export(
            tmp_path / "b.safetensors", checkpoints.read(tmp_path / "state.safetensors")
        )
        a, b = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
        assert_same(a, b)

    def test_of_a_file_with_tied_weights_they_are_there_once(self, tmp_path: Path) -> None:
        model = everything()
        average = torch.optim.swa_utils.AveragedModel(model)
        average.update_parameters(model)
        torch.save(average.state_dict(), tmp_path / "swa.pt")
        checkpoints.export(tmp_path / "a.safetensors", checkpoints.read(tmp_path / "swa.pt"))
        held = load_file(tmp_path / "a.safetensors")
        assert set(model.state_dict()) - set(held) == {"head.weight"}

    def test_in_another_dtype_and_in_shards(self, tmp_path: Path) -> None:
        _, averager = trained("exponential(0.9)", range(9), torch.float32)
        checkpoints.export(tmp_path / "model", averager, dtype=torch.bfloat16, shard_bytes=100)
        found = checkpoints.read(tmp_path / "model")
        assert found.format == "sharded-safetensors" and found.live is not None
        assert found.live["body.weight"].dtype == torch.bfloat16
        assert found.live["counter"].dtype == torch.int64
        assert len(list((tmp_path / "model").glob("*.safetensors"))) == 3

    def test_transformers_takes_it(self, tmp_path: Path) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=50, n_positions=8, n_embd=8, n_layer=1, n_head=2)
        )
        averager = Averager(model, "exponential(0.5)")
        for _ in range(3):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter))
            averager.update()
        (tmp_path / "one").mkdir()
        checkpoints.export(tmp_path / "one" / "model.safetensors", averager)
        checkpoints.export(tmp_path / "many", averager, shard_bytes=5000)
        for folder in (tmp_path / "one", tmp_path / "many"):
            model.config.save_pretrained(folder)
            loaded = GPT2LMHeadModel.from_pretrained(folder)
            assert_same(dict(loaded.state_dict()), averager.average())

    def test_diffusers_takes_it(self, tmp_path: Path) -> None:
        from diffusers import UNet2DModel

        config: dict[str, Any] = {
            "sample_size": 8, "block_out_channels": (8, 8), "norm_num_groups": 4,
            "down_block_types": ("DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D"), "layers_per_block": 1,
        }  # fmt: skip
        model: Any = UNet2DModel(**config)
        averager = Averager(model, "uniform()")
        averager.update()
        model.save_config(tmp_path)
        checkpoints.export(tmp_path / "diffusion_pytorch_model.safetensors", averager)
        assert_same(
            dict(cast(Any, UNet2DModel).from_pretrained(tmp_path).state_dict()), averager.average()
        )

    def test_a_value_that_the_dtype_cannot_hold(self, tmp_path: Path) -> None:
        averager = Averager({"w": torch.tensor([1e5, float("nan")])}, "uniform()")
        averager.update()
        with pytest.raises(ValueError, match=r"w has a value of 1e\+05, which torch.float16"):
            checkpoints.export(tmp_path / "a.safetensors", averager, dtype=torch.float16)
        assert not list(tmp_path.iterdir())

    def test_errors(self, tmp_path: Path) -> None:
        _, averager = trained(SEVERAL, range(5), torch.float32)
        with pytest.raises(KeyError, match="average None is unknown"):
            checkpoints.export(tmp_path / "a.safetensors", averager)
        polyak.save(tmp_path / "s.safetensors", averager)
        with pytest.raises(ValueError, match="fast, window, bema; name one of them"):
            checkpoints.export(
                tmp_path / "a.safetensors", checkpoints.read(tmp_path / "s.safetensors")
            )
        with pytest.raises(TypeError, match="got str"):
            checkpoints.export(tmp_path / "a.safetensors", "x")  # type: ignore[arg-type]
        assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.slow
def test_a_killed_process_leaves_its_last_state(tmp_path: Path) -> None:
    """SIGKILL at random moments of saving: the file is there, whole, and not older than was said."""
    moments, count = random.Random(0), 0
    for _ in range(15):
        count = kill(tmp_path / "state.safetensors", moments, count)
    polyak.save(tmp_path / "state.safetensors", Averager({"w": torch.zeros(1)}, "uniform()"))
    assert [each.name for each in tmp_path.iterdir()] == ["state.safetensors"], "parts are left"


def test_saving_a_folder_keeps_what_belongs_together(tmp_path: Path) -> None:
    """The pattern of the docs: model, optimizer and average of one step, or none of them."""
    model = nn.Linear(2, 1)
    averager = Averager(model, "exponential(0.9)")
    averager.update()
    with checkpoints.saving(tmp_path / "step-1") as folder:
        torch.save(model.state_dict(), folder / "model.pt")
        polyak.save(folder / "average.safetensors", averager)
    with pytest.raises(ZeroDivisionError), checkpoints.saving(tmp_path / "step-2") as folder:
        torch.save(model.state_dict(), folder / "model.pt")
        _ = 1 / 0
    assert checkpoints.latest(tmp_path) == tmp_path / "step-1"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-1"]
    save_file({"w": torch.zeros(1)}, tmp_path / "step-10.safetensors")
    assert checkpoints.latest(tmp_path) == tmp_path / "step-10.safetensors"
    inside = checkpoints.latest(tmp_path / "step-1")
    assert inside is not None and inside.name in ("average.safetensors", "model.pt")


@pytest.mark.parametrize("before", range(1, 9))
def test_complex_pairs_load_wherever_they_lie(tmp_path: Path, before: int) -> None:
    """They lie on 8 bytes in a file, and torch faults on complex128 that does not lie on 16."""
    weights = {
        "a": torch.randn(before, dtype=torch.float64),
        "c": torch.randn(5, dtype=torch.complex128),
    }
    averager = polyak.Averager(weights, "exponential(0.9)")
    averager.update()
    polyak.save(tmp_path / "it", averager)
    fresh = polyak.Averager(weights, "exponential(0.9)")
    polyak.load(tmp_path / "it", fresh)
    assert torch.equal(fresh.average()["c"], weights["c"])
