"""What spoils an average of files is said by tensor and file: copies, NaN, variances, duplicates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cli_runs import run
from polyak import offline
from polyak.offline import _summation as summation

NAN, INF = torch.nan, torch.inf


def saved(folder: Path, *values: Sequence[float], name: str = "w") -> list[Path]:
    """Files 0.safetensors, 1.safetensors, ... with one tensor each."""
    paths = [folder / f"{i}.safetensors" for i in range(len(values))]
    for path, held in zip(paths, values, strict=True):
        save_file({name: torch.tensor(held, dtype=torch.float32), "b": torch.ones(2)}, path)
    return paths


SPOILT: dict[str, tuple[list[list[float]], str]] = {
    "NaN in one": ([[1, 2], [NAN, 3]], r"1 in \S*1\.safetensors: leave"),
    "NaN in two": ([[NAN, NAN], [1, 3], [NAN, 3]], r"2 in \S*0\.safetensors, 1 in \S*2\.safetensors"),
    "an infinity in one": ([[1, 2], [INF, 3]], r"1 in \S*1\.safetensors"),
    "infinities of two signs": ([[INF, 2], [-INF, 3]], r"1 in \S*0\.\S*, 1 in \S*1\."),
    "NaN beside an infinity of all": ([[INF, NAN], [INF, 3]], r"1 in \S*0\.safetensors: leave"),
    "a file alone": ([[1, NAN]], r"1 in \S*0\.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize(("values", "message"), SPOILT.values(), ids=SPOILT)
def test_values_that_are_not_finite_are_refused_by_tensor_and_file(
    tmp_path: Path, values: list[list[float]], message: str
) -> None:
    files, out = saved(tmp_path, *values), tmp_path / "mean.safetensors"
    with pytest.raises(ValueError, match=rf"w: values that are infinite or NaN, .*{message}"):
        dict(offline.average(files, allow_nonfinite=False))
    refused = run("average", *files, "--out", out)
    assert refused.exit_code == 2 and "--allow-nonfinite" in refused.stderr and not out.exists()
    written = run("average", *files, "--out", out, "--allow-nonfinite")
    assert (
        written.exit_code == 0 and "note: w has values that are infinite or NaN" in written.stderr
    )
    assert not load_file(out)["w"].isfinite().all()


@pytest.mark.parametrize("values", [[[-INF, 1.0], [-INF, 3.0]], [[3e38, 1.0], [3e38, 3.0]]])
def test_masks_and_large_values_are_finite_enough(
    tmp_path: Path, values: list[list[float]]
) -> None:
    """An infinity that all files share, and values whose sum alone would overflow."""
    made = offline.average(saved(tmp_path, *values), allow_nonfinite=False)
    assert made["w"].tolist() == [torch.tensor(values[0][0]).item(), 2.0]


def test_a_value_is_found_in_any_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summation, "PIECE_BYTES", 1 << 10)
    monkeypatch.setattr(summation, "_UNDIVIDED", 64)
    held = torch.ones(5000)
    held[4321] = NAN
    files = saved(tmp_path, [1.0] * 5000, held.tolist())
    with pytest.raises(ValueError, match=r"1 in \S*1\.safetensors"):
        offline.average(files, allow_nonfinite=False)["w"]


@pytest.mark.parametrize("name", ["layer.var", "n.moving_variance", "x.std"])
def test_variances_that_extrapolation_made_negative_are_named(tmp_path: Path, name: str) -> None:
    files, out = saved(tmp_path, [3.0, 1.0], [1.0, 1.0], name=name), tmp_path / "mean.safetensors"
    said = run("average", *files, "--coefficients", "-1,2", "--out", out).stderr
    assert f"negative coefficients made variances negative: {name}" in said
    assert load_file(out)[name].tolist() == [-1.0, 1.0]


@pytest.mark.parametrize(("name", "first"), [("log_variation", 3.0), ("w", 3.0), ("x.std", -3.0)])
def test_what_may_be_negative_is_not(tmp_path: Path, name: str, first: float) -> None:
    files, out = saved(tmp_path, [first, 1.0], [1.0, 1.0], name=name), tmp_path / "mean.safetensors"
    said = run("average", *files, "--coefficients", "-1,2", "--out", out)
    assert said.exit_code == 0 and "made variances" not in said.stderr


def same_but_for_the_end() -> tuple[Tensor, Tensor]:
    a = torch.zeros(50_000)
    b = a.clone()
    b[-1] = 1
    return a, b


def test_files_that_hold_the_same_weights_are_named(tmp_path: Path) -> None:
    """By their content, whatever the format; two that differ in one number at the end are not the same."""
    a, b = same_but_for_the_end()
    save_file({"w": a}, tmp_path / "a.safetensors")
    torch.save({"w": b, "step": torch.tensor(1)}, tmp_path / "b.pt")
    torch.save({"model": {"w": a}, "step": 3}, tmp_path / "c.pt")
    torch.save({"model": {"w": b}}, tmp_path / "d.pt")
    names = ["a.safetensors", "c.pt", "d.pt", *["a.safetensors"] * 58]
    files = [tmp_path / name for name in names]
    said = run("average", *files, "--out", tmp_path / "mean.safetensors").stderr
    note = (
        f"the same weights as {files[0]} come again, in {files[1]}, {files[0]}: they count 60 times"
    )
    assert said.count("the same weights") == 1 and f"note: {note}\n" in said


def test_copies_of_the_last_file_are_counted(tmp_path: Path) -> None:
    for i in range(2):
        held = {"w": torch.ones(6), "ids": torch.arange(2), "mask": torch.ones(8, dtype=torch.bool)}
        save_file({**held, "n": torch.tensor(i)}, tmp_path / f"{i}.safetensors")
    files, out = (
        [tmp_path / "0.safetensors", tmp_path / "1.safetensors"],
        tmp_path / "m.safetensors",
    )
    said = run("average", *files, "--out", out).stderr
    assert "3 of 4 tensors (57 % of the bytes) are the last file's: integers, booleans" in said
    assert load_file(out)["n"] == 1


def test_copies_alone_are_all_of_the_bytes(tmp_path: Path) -> None:
    torch.save({"steps": torch.tensor([1, 2])}, tmp_path / "it.pt")
    said = run("average", *[tmp_path / "it.pt"] * 2, "--out", tmp_path / "mean.safetensors").stderr
    assert "1 of 1 tensors (100 % of the bytes) are the last file's" in said


WIDEST = {
    ("float32", "bfloat16"): "float32", ("bfloat16", "float32"): "float32", ("float16", "bfloat16"): "float32",
    ("float64", "float16"): "float64", ("float8_e4m3fn", "bfloat16"): "float32",
    ("float16", "float8_e5m2"): "float32", ("float8_e5m2", "float64"): "float64",
}  # fmt: skip


@pytest.mark.parametrize(("dtypes", "wanted"), WIDEST.items())
def test_files_of_several_dtypes_are_averaged_in_the_widest(
    tmp_path: Path, dtypes: tuple[str, str], wanted: str
) -> None:
    """Whichever file is the last; a note says so, and the reader may choose another."""
    for i, name in enumerate(dtypes):
        held = {"w": torch.full((2,), 1.0 + i).to(getattr(torch, name)), "b": torch.ones(2)}
        torch.save(held, tmp_path / f"{i}.pt")
    files, out = [tmp_path / "0.pt", tmp_path / "1.pt"], tmp_path / "mean.safetensors"
    said = run("average", *files, "--out", out).stderr
    assert load_file(out)["w"].dtype == getattr(torch, wanted) and load_file(out)["w"][0] == 1.5
    assert (
        f"1 of 2 tensors have other dtypes in the files (w {' and '.join(sorted(dtypes))})" in said
    )
    assert f"written as {wanted}" in said
    said = run("average", *files, "--out", tmp_path / "asked.safetensors", "--dtype", "bf16").stderr
    assert "other dtypes" not in said
    said = run("average", *files, "--out", tmp_path / "like.pt", "--like", files[1]).stderr
    assert torch.load(tmp_path / "like.pt")["w"].dtype == getattr(torch, dtypes[1])
    assert f"written as {dtypes[1]}" in said


def test_what_a_module_keeps_as_bytes_may_have_any_length(tmp_path: Path) -> None:
    """As Transformer Engine's pickles do: they are the last file's."""
    for length in (10, 30):
        held = {"w": torch.full((2,), float(length)), "w._extra_state": torch.ones(length).byte()}
        torch.save(held, tmp_path / f"{length}.pt")
    made = offline.average([tmp_path / "10.pt", tmp_path / "30.pt"])
    assert made["w"].tolist() == [20.0, 20.0] and len(made["w._extra_state"]) == 30
