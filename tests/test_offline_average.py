"""Averages of checkpoint files: `coefficients @ files` in every format, in little memory, or nothing."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import polyak
from patience import HANG
from polyak import theory
from polyak._dtypes import complex_of
from polyak._lazy import Held
from polyak.offline import _summation as summation
from polyak.offline import average, greedy_soup
from polyak.offline._combination import Combination
from polyak.offline._findings import Source
from polyak.rules import Rule
from rule_examples import RULE_EXAMPLES, each_rule

Folder = Path
RULES = [rule for examples in RULE_EXAMPLES.values() for rule in examples]
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]


def wide(tensor: Tensor) -> Any:
    """A tensor's values as numpy's widest."""
    kind = torch.complex128 if tensor.is_complex() else torch.float64
    return tensor.to(kind).numpy()


def dense(tensors: list[Tensor], coefficients: Any) -> Any:
    """The oracle: the sum in float64, all at once."""
    return sum(c * wide(tensor) for c, tensor in zip(coefficients, tensors, strict=True))


def assert_rounded(got: Tensor, tensors: list[Tensor], coefficients: Any) -> None:
    """Within the rounding of the sum, made in float32 at least, and that of the result."""
    # Of a small coefficient too, the rounding is that of the coefficients' sum: 1 - .999999 is rounded.
    size = sum(map(abs, coefficients)) * np.max([abs(wide(t)) for t in tensors], axis=0)
    summed = torch.float64 if got.dtype == torch.float64 else torch.float32
    wanted = dense(tensors, coefficients)
    steps = 4 * len(tensors) * sum(map(abs, coefficients))
    bound = steps * torch.finfo(summed).eps * size + torch.finfo(got.dtype).eps * abs(wanted)
    bound += torch.finfo(got.dtype).smallest_normal
    assert (abs(wide(got) - wanted) <= bound).all()


def saved(folder: Folder, weights: dict[str, Tensor], name: str) -> Path:
    path = folder / f"{name}.safetensors"
    save_file(weights, path)
    return path


def models(count: int, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    """State dicts of one model with a BatchNorm at different moments."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3)).to(dtype)
    found = []
    for _ in range(count):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
            model(torch.randn(8, 5, dtype=dtype))
        found.append(copy.deepcopy(dict(model.state_dict())))
    return found


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts so small that few elements are many of them, for two threads."""
    monkeypatch.setattr(summation, "PIECE_BYTES", 128)
    monkeypatch.setattr(summation, "_UNDIVIDED", 4)
    torch.set_num_threads(2)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Tensor], list[float], torch.dtype, bool]:
    """Tensors of one shape in any dtypes and layouts, and coefficients of sum 1 and any sign."""
    shape = draw(st.lists(st.integers(0, 9), max_size=4))
    files = draw(st.integers(1, 5))
    kinds = st.sampled_from([torch.complex64] if draw(st.booleans()) else FLOATS[:4])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    tensors = []
    for _ in range(files):
        order = draw(st.permutations(range(len(shape))))
        base = torch.empty([shape[i] for i in order], dtype=draw(kinds))
        base.copy_(
            torch.randn(base.shape, generator=generator, dtype=torch.complex64).to(base.dtype)
            if base.is_complex()
            else torch.randn(base.shape, generator=generator)
        )
        tensors.append(base.permute([order.index(i) for i in range(len(shape))]))
    drawn = draw(st.lists(st.floats(-2, 3), min_size=files, max_size=files))
    coefficients = [*drawn[1:], 1 - sum(drawn[1:])]
    return tensors, coefficients, draw(kinds), draw(st.booleans())


@pytest.mark.usefixtures("small_parts")
@given(cases())
def test_every_combination_is_the_dense_sum(
    case: tuple[list[Tensor], list[float], torch.dtype, bool],
) -> None:
    tensors, coefficients, dtype, in_float64 = case
    sources = [Source(str(i), Held({"w": tensor})) for i, tensor in enumerate(tensors)]
    accumulate = torch.float64 if in_float64 else torch.float32
    kept = Combination(sources, coefficients, accumulate=accumulate)["w"]
    wide = reduce(torch.promote_types, {tensor.dtype for tensor in tensors})
    assert kept.dtype == wide and kept.shape == tensors[-1].shape
    assert_rounded(kept, tensors, coefficients)
    if dtype.is_floating_point:
        made = Combination(sources, coefficients, dtype=dtype, accumulate=accumulate)["w"]
        assert made.dtype == (complex_of(dtype) if tensors[0].is_complex() else dtype)
        assert_rounded(made, tensors, coefficients)


@pytest.mark.parametrize("rule", each_rule(RULES), ids=str)
def test_any_rule_is_its_coefficients(rule: Rule, tmp_path: Folder) -> None:
    weights = [{"w": torch.randn(3, 4)} for _ in range(15)]
    files = [saved(tmp_path, each, str(i)) for i, each in enumerate(weights)]
    elapsed = [1.0, 2.5] * 7 + [4.0]
    wanted = theory.coefficients(rule, elapsed)
    made = average(files, rule, elapsed=elapsed)
    np.testing.assert_allclose(made.coefficients, wanted, atol=1e-12)
    assert_rounded(made["w"], [each["w"] for each in weights], wanted)
    assert torch.equal(average(files, str(rule), elapsed=elapsed)["w"], made["w"])


@pytest.mark.parametrize("shape", ["linear", "sqrt", "cosine"])
@pytest.mark.parametrize("merge", [theory.wsm, theory.qam])
def test_merges_that_stand_for_a_decay(shape: str, merge: Any, tmp_path: Folder) -> None:
    weights = [{"w": torch.randn(50)} for _ in range(6)]
    files = [saved(tmp_path, each, str(i)) for i, each in enumerate(weights)]
    coefficients = merge(theory.learning_rate_decay(shape, len(files)))
    assert_rounded(average(files, coefficients)["w"], [w["w"] for w in weights], coefficients)


@pytest.mark.usefixtures("small_parts")
@given(
    st.lists(st.floats(-3, 3), min_size=1, max_size=6),
    st.sampled_from([*FLOATS, torch.float8_e4m3fn, torch.float8_e5m2]),
    st.integers(0, 10**6),
)
def test_what_all_files_share_comes_out_as_it_is(
    drawn: list[float], dtype: torch.dtype, seed: int
) -> None:
    tensor = torch.randn(40, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if dtype != torch.float8_e4m3fn:  # has no infinity
        tensor[3], tensor[11] = torch.inf, -torch.inf
    tensor[20] = 0.0
    sources = [Source("", Held({"w": tensor.clone()})) for _ in range(len(drawn) + 1)]
    made = Combination(sources, [*drawn, 1 - sum(drawn)])["w"]
    assert made.dtype == dtype
    assert np.array_equal(wide(made), wide(tensor))


@pytest.mark.parametrize("coefficients", [[-1, 1, 1], [1, -1, 1], [1, 1, -1], [-5, 3, 3]])
def test_coefficients_of_any_sign_in_any_order(coefficients: list[int]) -> None:
    """Their sums so far pass 0, by which nothing must be divided."""
    tensors = [torch.randn(50) for _ in coefficients]
    sources = [Source("", Held({"w": tensor})) for tensor in tensors]
    assert_rounded(Combination(sources, coefficients)["w"], tensors, coefficients)


def test_an_infinity_that_only_some_files_have_is_no_finite_number(tmp_path: Folder) -> None:
    files = [
        saved(tmp_path, {"w": torch.tensor([each, 1.0])}, str(each))
        for each in (torch.inf, 2.0, torch.nan)
    ]
    for pair in (files[:2], files[1:], [files[2], files[0]]):
        made = average(pair)["w"]
        assert not made[0].isfinite() and made[1] == 1


def test_a_file_whose_coefficient_is_0_is_not_read(tmp_path: Folder) -> None:
    files = [
        saved(tmp_path, {"w": torch.tensor([each])}, str(each)) for each in (1.0, torch.nan, 5.0)
    ]
    assert average(files, [0.5, 0.0, 0.5])["w"] == 3


@pytest.mark.usefixtures("small_parts")
def test_neither_threads_nor_what_is_asked_for_change_a_bit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Folder
) -> None:
    monkeypatch.setattr(summation, "_UNDIVIDED", 64)
    weights = [{"w": torch.randn(1000), "b": torch.randn(7, 11)} for _ in range(5)]
    files = [saved(tmp_path, each, str(i)) for i, each in enumerate(weights)]
    made = dict(average(files, "exponential(0.7)"))
    for count in (1, 3, 8):
        torch.set_num_threads(count)
        average(files, "exponential(0.7)").write(tmp_path / "out.safetensors", overwrite=True)
        written = load_file(tmp_path / "out.safetensors")
        assert all(torch.equal(written[name], made[name]) for name in made)


@pytest.mark.usefixtures("small_parts")
def test_threads_and_open_files_end_with_the_average(tmp_path: Folder) -> None:
    def held() -> tuple[int, int]:
        return threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))

    files = [saved(tmp_path, {"w": torch.randn(1000)}, str(i)) for i in range(3)]
    before = held()
    for _ in range(20):
        pieces = average(files).pieces("w")
        next(pieces)
    del pieces
    for _ in range(round(HANG / 0.01)):
        if ended := bool((np.array(held()) <= before).all()):
            break
        time.sleep(0.01)
    assert ended


@pytest.mark.usefixtures("small_parts")
def test_pieces_of_several_tensors_may_be_asked_for_in_turns(tmp_path: Folder) -> None:
    weights = [{name: torch.randn(999) for name in "ab"} for _ in range(3)]
    made = average([saved(tmp_path, each, str(i)) for i, each in enumerate(weights)])
    turns = zip(made.pieces("a"), made.pieces("b"), strict=True)
    pairs = [(a.clone(), b.clone()) for a, b in turns]
    for name, pieces in zip("ab", zip(*pairs, strict=True), strict=True):
        assert torch.equal(torch.cat(pieces), made[name])


def as_safetensors(folder: Folder, weights: dict[str, Tensor]) -> Path:
    return saved(folder, weights, "plain")


def as_torch(folder: Folder, weights: dict[str, Tensor]) -> Path:
    torch.save(weights, folder / "model.pt")
    return folder / "model.pt"


def as_old_torch(folder: Folder, weights: dict[str, Tensor]) -> Path:
    torch.save(weights, folder / "old.pt", _use_new_zipfile_serialization=False)
    return folder / "old.pt"


def as_lightning(folder: Folder, weights: dict[str, Tensor]) -> Path:
    held = {"state_dict": weights, "pytorch-lightning_version": "2.6.6", "epoch": 1}
    torch.save(held, folder / "last.ckpt")
    return folder / "last.ckpt"


def as_shards(folder: Folder, weights: dict[str, Tensor]) -> Path:
    Combination([Source("", Held(weights))], [1.0]).write(folder / "shards", shard_bytes=100)
    return folder / "shards"


def as_ours(folder: Folder, weights: dict[str, Tensor]) -> Path:
    averager = polyak.Averager(weights, "uniform()")
    averager.update()
    polyak.save(folder / "ours.safetensors", averager)
    return folder / "ours.safetensors"


FORMATS: list[Callable[[Folder, dict[str, Tensor]], Path]] = [
    as_safetensors, as_torch, as_old_torch, as_lightning, as_shards, as_ours,
]  # fmt: skip


@pytest.mark.parametrize("last", FORMATS)
def test_every_format_beside_every_other(last: Callable[..., Path], tmp_path: Folder) -> None:
    makers = [*FORMATS, last]
    weights = models(len(makers))
    files = []
    for i, (make, each) in enumerate(zip(makers, weights, strict=True)):
        (tmp_path / str(i)).mkdir()
        files.append(make(tmp_path / str(i), each))
    out = tmp_path / "out.safetensors"
    average(files, "power(1.0)").write(out)
    coefficients = theory.coefficients("power(1.0)", [1] * len(files))
    made = load_file(out)
    assert made.keys() == weights[0].keys()
    for name, tensor in made.items():
        if name.endswith("num_batches_tracked"):
            assert tensor == len(makers)
        else:
            assert_rounded(tensor, [each[name] for each in weights], coefficients)


def test_the_average_in_each_file_of_ema_pytorch(tmp_path: Folder) -> None:
    ema_pytorch = pytest.importorskip("ema_pytorch")
    model = nn.Linear(4, 2)
    ema = ema_pytorch.EMA(model, beta=0.9, update_every=1, update_after_step=0)
    files, live, averages = [], [], []
    for i in range(3):
        with torch.no_grad():
            model.weight.add_(torch.randn_like(model.weight))
        ema.update()
        files.append(tmp_path / f"{i}.pt")
        torch.save(ema.state_dict(), files[-1])
        live.append(model.weight.detach().clone())
        averages.append(ema.ema_model.weight.detach().clone())
    thirds = [1 / 3] * 3
    assert_rounded(average(files)["weight"], live, thirds)
    assert_rounded(average(files, which="average")["weight"], averages, thirds)
    with pytest.raises(ValueError, match=r"0\.pt has the averages: average; there is no 'best'"):
        average(files, which="best")


def test_a_file_with_several_averages_and_no_live_weights_needs_which(tmp_path: Folder) -> None:
    weights = {"w": torch.zeros(3)}
    averager = polyak.Averager(weights, {"fast": "exponential(0.5)", "slow": "uniform()"})
    for value in (0.0, 4.0):
        weights["w"].fill_(value)
        averager.update()
    polyak.save(tmp_path / "a.safetensors", averager)
    with pytest.raises(ValueError, match="fast, slow; name one of them"):
        average([tmp_path / "a.safetensors"])
    assert average([tmp_path / "a.safetensors"], which="slow")["w"].tolist() == [2, 2, 2]


def test_an_average_that_is_read_out_of_several_slots(tmp_path: Folder) -> None:
    files, wanted = [], []
    for i in range(3):
        weights = {"w": torch.randn(20)}
        averager = polyak.Averager(weights, "window(3)")
        for _ in range(3):
            weights["w"].add_(torch.randn(20))
            averager.update()
        files.append(tmp_path / f"{i}.safetensors")
        polyak.save(files[-1], averager)
        wanted.append(averager.average()["w"])
    assert_rounded(average(files)["w"], wanted, [1 / 3] * 3)


def test_integers_and_booleans_are_those_of_the_last_file(tmp_path: Folder) -> None:
    kinds = [torch.int64, torch.int8, torch.uint8, torch.bool]
    weights = [
        {"w": torch.full((2,), float(i)), **{str(k): torch.tensor([i, 1, 0]).to(k) for k in kinds}}
        for i in range(3)
    ]
    made = average(
        [saved(tmp_path, each, str(i)) for i, each in enumerate(weights)], [1.0, 0.0, 0.0]
    )
    assert sorted(made.copied) == sorted(map(str, kinds))
    assert all(torch.equal(made[str(k)], weights[2][str(k)]) for k in kinds)
    assert made["w"].tolist() == [0, 0]


def test_norms_with_running_statistics_are_named(tmp_path: Folder) -> None:
    files = [saved(tmp_path, each, str(i)) for i, each in enumerate(models(2))]
    assert average(files).norms == ["1"]


def test_narrow_weights_are_summed_wide(tmp_path: Folder) -> None:
    weights = [{"w": (1 + i * torch.rand(100)).bfloat16()} for i in range(20)]
    files = [saved(tmp_path, each, str(i)) for i, each in enumerate(weights)]
    made = average(files)
    assert made["w"].dtype == torch.bfloat16
    assert_rounded(made["w"], [each["w"] for each in weights], [0.05] * 20)
    exact = average(files, dtype=torch.float32)["w"]
    assert_rounded(exact, [each["w"] for each in weights], [0.05] * 20)
    assert not torch.equal(exact, exact.bfloat16().float())


def test_float64_sums_are_rounded_once(tmp_path: Folder) -> None:
    files = [saved(tmp_path, {"w": torch.rand(1000)}, str(i)) for i in range(50)]
    wanted = dense([load_file(file)["w"] for file in files], [1 / 50] * 50)

    def error(**options: Any) -> float:
        return float(abs(wide(average(files, **options)["w"]) - wanted).max())

    half_a_unit = 2.0**-25 * (1 + 1e-6)  # of numbers from 1/2 to 1
    assert error(accumulate=torch.float64) <= half_a_unit < error()
    assert error(dtype=torch.float64) < 1e-15  # so it is summed in float64 too


def test_a_number_too_large_for_the_result_is_refused_and_nothing_is_left(tmp_path: Folder) -> None:
    files = [saved(tmp_path, {"head.w": torch.tensor([1.0, 7e4])}, str(i)) for i in range(2)]
    made = average(files, dtype=torch.float16)
    with pytest.raises(
        ValueError, match=r"head\.w: it has 70000, which torch\.float16 cannot hold"
    ):
        made.write(tmp_path / "out.safetensors")
    assert sorted(tmp_path.iterdir()) == sorted(files)


def test_files_that_differ_are_listed_before_anything_is_written(tmp_path: Folder) -> None:
    base = {"a": torch.zeros(2, 3), "b": torch.zeros(4), "n": torch.zeros(1, dtype=torch.int64)}
    first = saved(tmp_path, base, "first")
    others: list[tuple[dict[str, Tensor], list[str]]] = [
        (
            {"a": torch.zeros(3, 2)},
            ["different: a: floating-point (3, 2), wanted floating-point (2, 3)"],
        ),
        ({"c": torch.zeros(1)}, ["extra: c"]),
        ({"n": torch.zeros(1)}, ["different: n: floating-point (1,), wanted integer (1,)"]),
        (
            {"b": torch.zeros(4, dtype=torch.complex64)},
            ["b: complex (4,), wanted floating-point (4,)"],
        ),
    ]
    for change, lines in others:
        other = saved(tmp_path, {**base, **change}, "other")
        with pytest.raises(ValueError) as caught:
            average([first, other])
        assert str(caught.value).startswith(f"{other} is not of the same model as {first}")
        assert all(line in str(caught.value) for line in lines)
    missing = saved(tmp_path, {"a": base["a"]}, "missing")
    with pytest.raises(ValueError, match="missing: n, b"):
        average([first, first, missing], [0.5, 0.5, 0.0])


def test_arguments_that_make_no_sense_are_refused(tmp_path: Folder) -> None:
    files = [saved(tmp_path, {"w": torch.ones(2)}, str(i)) for i in range(2)]
    refused: list[tuple[str, Callable[[], object]]] = [
        ("files is .*wanted a list of one file or more", lambda: average([])),
        ("sum to 0.9, wanted finite", lambda: average(files, [0.5, 0.4])),
        ("sum to nan", lambda: average(files, [0.5, float("nan")])),
        (r"shape \(3,\), wanted \(2,\)", lambda: average(files, [0.5, 0.25, 0.25])),
        ("elapsed .* a rule uses them", lambda: average(files, [0.5, 0.5], elapsed=[1, 1])),
        ("elapsed has 3 times, wanted 2", lambda: average(files, elapsed=[1, 1, 1])),
        ("elapsed has 0", lambda: average(files, elapsed=[1, 0])),
        ("dtype is torch.int8", lambda: average(files, dtype=torch.int8)),
        ("accumulate is torch.float16", lambda: average(files, accumulate=torch.float16)),
        (r"ends in \.safetensors", lambda: average(files).write(tmp_path / "out.pt")),
        ("shard_bytes is 0", lambda: average(files).write(tmp_path / "out", shard_bytes=0)),
        (
            "wanted a folder",
            lambda: average(files).write(tmp_path / "o.safetensors", shard_bytes=9),
        ),
        ("nothing.pt", lambda: average([tmp_path / "nothing.pt"])),
    ]
    for message, call in refused:
        with pytest.raises((ValueError, OSError), match=message):
            call()
    assert sorted(tmp_path.iterdir()) == files


def test_coefficients_typed_in_are_made_to_sum_to_one(tmp_path: Folder) -> None:
    files = [saved(tmp_path, {"w": torch.tensor([float(i)])}, str(i)) for i in range(3)]
    made = average(files, [0.3333333, 0.3333333, 0.3333333])
    assert made.coefficients.tolist() == pytest.approx([1 / 3] * 3, rel=1e-15)
    assert made["w"] == 1


def test_what_exists_is_overwritten_only_when_told(tmp_path: Folder) -> None:
    files = [saved(tmp_path, {"w": torch.tensor([float(i)])}, str(i)) for i in range(3)]
    with pytest.raises(FileExistsError):
        average(files).write(files[0])
    average(files).write(files[0], overwrite=True)  # a source too: it was open before
    assert load_file(files[0])["w"] == 1


class Stop(BaseException):
    """What a test interrupts with."""


@pytest.mark.parametrize("error", [KeyboardInterrupt, Stop, OSError])
@pytest.mark.parametrize("shard_bytes", [None, 1000])
def test_an_interrupted_run_leaves_nothing(
    error: type[BaseException], shard_bytes: int | None, tmp_path: Folder
) -> None:
    files = [
        saved(tmp_path, {str(n): torch.randn(200) for n in range(5)}, str(i)) for i in range(3)
    ]
    told = []

    def interrupt(done: int, total: int) -> None:
        told.append((done, total))
        if done > total / 2:
            raise error

    out = tmp_path / ("out.safetensors" if shard_bytes is None else "out")
    with pytest.raises(error):
        average(files).write(out, shard_bytes=shard_bytes, progress=interrupt)
    assert told[-1] == (2400, 4000)
    assert sorted(tmp_path.iterdir()) == files


KILLED = """
import sys, time
from pathlib import Path
from polyak.offline import average

def progress(done, total):
    print("written", done, flush=True)
    time.sleep(60)

average(sys.argv[2:]).write(sys.argv[1], overwrite=True, progress=progress)
"""


@pytest.mark.slow
def test_a_killed_run_leaves_the_file_that_was_there(tmp_path: Folder) -> None:
    (tmp_path / "in").mkdir()
    files = [saved(tmp_path / "in", {"w": torch.full((9,), float(i))}, str(i)) for i in range(3)]
    out = saved(tmp_path, {"w": torch.zeros(1)}, "out")
    before = out.read_bytes()
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, out, *files], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline().startswith("written")
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert out.read_bytes() == before
    average(files).write(out, overwrite=True)
    assert load_file(out)["w"].tolist() == [1] * 9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out.safetensors"]


def test_a_file_that_is_cut_short_meanwhile_is_an_error(tmp_path: Folder) -> None:
    files = [saved(tmp_path, {"w": torch.ones(10_000)}, str(i)) for i in range(2)]
    made = average(files)
    os.truncate(files[1], 20_000)
    with pytest.raises(ValueError, match=r"w: .*1\.safetensors: the file was changed in place"):
        made.write(tmp_path / "out.safetensors")
    assert sorted(tmp_path.iterdir()) == files


def test_shards_load_as_a_pretrained_model(tmp_path: Folder) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=8)
    folders, states = [], []
    for i in range(2):
        torch.manual_seed(i)
        model = transformers.GPT2LMHeadModel(config)
        folders.append(tmp_path / str(i))
        model.save_pretrained(folders[-1], max_shard_size="10KB")
        states.append(model.state_dict())
    out = tmp_path / "mean"
    average(folders).write(out, shard_bytes=10_000)
    config.save_pretrained(out)
    loaded, info = transformers.GPT2LMHeadModel.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    for name, tensor in loaded.state_dict().items():
        assert_rounded(tensor, [state[name] for state in states], [0.5, 0.5])
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        sizes = [tensor.nbytes for tensor in load_file(file).values()]
        assert sum(sizes) <= 10_000 or len(sizes) == 1


MEASURED = """
import sys
from pathlib import Path
from polyak.offline import average
import polyak.checkpoints

def peak():
    status = Path("/proc/self/status").read_text()  # ru_maxrss counts the parent's memory too
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024

before = peak()
average(sys.argv[3:], accumulate=getattr(__import__("torch"), sys.argv[2])).write(sys.argv[1])
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", ["float32", "float64"])
@pytest.mark.parametrize("save", [as_safetensors, as_torch, as_ours])
def test_many_files_need_little_memory(
    save: Callable[..., Path], accumulate: str, tmp_path: Folder
) -> None:
    layers = {str(i): torch.randn(2000, 1000) for i in range(7)}  # 56 MB
    layers["turned"] = torch.randn(1000, 2000).T if save is as_torch else torch.randn(2000, 1000)
    (tmp_path / "0").mkdir()
    first = save(tmp_path / "0", layers)
    files = [first]
    for i in range(1, 12):
        files.append(tmp_path / f"{i}{first.suffix}")
        os.link(first, files[-1])
    command: list[Any] = [
        sys.executable,
        "-c",
        MEASURED,
        tmp_path / "out.safetensors",
        accumulate,
        *files,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 100
    written = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(written[name], layer) for name, layer in layers.items())


def minus_distance(target: Tensor) -> Callable[[dict[str, Tensor]], float]:
    """A quality whose greedy soup can be told by hand."""
    return lambda weights: -float((weights["w"] - target).square().sum())


def points(folder: Folder, *values: list[float]) -> list[Path]:
    return [saved(folder, {"w": torch.tensor(value)}, str(i)) for i, value in enumerate(values)]


def greedy_by_hand(vectors: list[Any], quality: Callable[[Any], float]) -> tuple[list[int], float]:
    """The recipe as it is printed: a running mean in float64."""
    order = sorted(range(len(vectors)), key=lambda i: -quality(vectors[i]))
    kept, soup = [order[0]], vectors[order[0]]
    for i in order[1:]:
        trial = soup + (vectors[i] - soup) / (len(kept) + 1)
        if quality(trial) > quality(soup):
            kept, soup = [*kept, i], trial
    return kept, quality(soup)


@pytest.mark.slow
@given(count=st.integers(1, 7), seed=st.integers(0, 10**6))
def test_a_greedy_soup_is_the_recipe(
    count: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("soup")
    generator = np.random.default_rng(seed)
    vectors = list(generator.standard_normal((count, 3)).astype(np.float32).astype(float))
    files = points(folder, *(v.tolist() for v in vectors))
    soup = greedy_soup(files, minus_distance(torch.zeros(3)), better="higher")
    kept, quality = greedy_by_hand(vectors, lambda w: -float((w * w).sum()))
    assert list(soup.ingredients) == kept
    assert soup.quality == pytest.approx(quality, rel=1e-5)
    assert soup.quality >= max(soup.qualities)
    assert soup.coefficients.sum() == pytest.approx(1)
    made = dict(average(soup.files, soup.coefficients))
    assert minus_distance(torch.zeros(3))(made) == soup.quality


def test_a_soup_takes_what_helps_and_no_ties(tmp_path: Folder) -> None:
    files = points(tmp_path, [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [9.0, 0.0])
    soup = greedy_soup(files, minus_distance(torch.zeros(2)), better="higher")
    assert soup.order == (0, 1, 2, 3)  # of equals the first given
    assert soup.ingredients == (0, 1) and soup.quality == 0
    assert list(soup.trials) == pytest.approx([-1, 0, -1 / 9, -9])
    alike = greedy_soup([files[0], files[2]], minus_distance(torch.zeros(2)), better="higher")
    assert alike.ingredients == (0,)  # no better, so not added


def test_a_soup_tries_the_best_first_and_never_goes_back(tmp_path: Folder) -> None:
    files = points(tmp_path, [2.5], [-1.0], [-2.0])
    told: list[Path] = []
    quality = minus_distance(torch.zeros(1))
    soup = greedy_soup(files, quality, better="higher", progress=lambda path, _: told.append(path))
    assert soup.order == (1, 2, 0) and soup.ingredients == (1, 0)
    assert told == [*files, files[2], files[0]]
    assert quality(dict(average(files))) > soup.quality  # in another order it had taken all


def test_a_quality_may_be_better_when_lower(tmp_path: Folder) -> None:
    files = points(tmp_path, [2.5], [-1.0], [-2.0])
    lower = greedy_soup(files, lambda w: float(w["w"].square()), better="lower")
    assert lower.ingredients == (1, 0) and lower.quality == 0.75**2
    higher = greedy_soup(files, lambda w: float(w["w"].square()), better="higher")
    assert higher.ingredients == (0,)


def test_a_soup_without_a_quality_is_refused(tmp_path: Folder) -> None:
    files = points(tmp_path, [1.0], [2.0])
    for bad in (float("nan"), float("inf"), None, "good"):
        with pytest.raises(ValueError, match=r"evaluate returned .* with .*0\.safetensors"):
            greedy_soup(files, lambda _, bad=bad: bad)  # type: ignore[misc]
    with pytest.raises(ValueError, match="better is 'best'"):
        greedy_soup(files, lambda _: 0.0, better="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one file or more"):
        greedy_soup([], lambda _: 0.0)
    with pytest.raises(ValueError, match="wanted a list of one file or more"):
        greedy_soup(str(files[0]), lambda _: 0.0)


def test_a_soup_of_real_models(tmp_path: Folder) -> None:
    """Weights go through `load_state_dict` and may be changed by who evaluates."""
    files = [saved(tmp_path, each, str(i)) for i, each in enumerate(models(3))]
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3)).eval()
    inputs = torch.randn(20, 5)

    def evaluate(weights: dict[str, Tensor]) -> float:
        model.load_state_dict(weights)
        with torch.no_grad():
            quality = -float(model(inputs).square().mean())
        weights["0.weight"].zero_()
        return quality

    soup = greedy_soup(files, evaluate)
    assert evaluate(dict(average(files, soup.coefficients))) == soup.quality
