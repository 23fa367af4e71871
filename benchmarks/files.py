"""Averaging checkpoint files: against reading them, against a plain loop, against mergekit; and memory.

Run: python benchmarks/files.py [--files 20 --timed 12 --megabytes 500 --rounds 7] [--quick]

It makes the files in a temporary folder, prints its tables and writes `benchmarks/results/files.md`.
Every contender is a process of its own; seconds are those of its work, after its imports. Each round
runs all of them in turns, each right after `cat`: so all files are in the page cache, and what slows
the machine for a while slows both sides of a ratio. mergekit is measured where it is installed:
`pip install --no-deps mergekit==0.1.5 immutables peft sentencepiece protobuf accelerate`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from polyak.offline import average

RESULT = Path(__file__).parent / "results" / "files.md"
MODEL = "model.safetensors"
LOOP, SUM, WRITE, MERGEKIT = "loop", "sum", "write", "mergekit"
ADD, READ = "add", "read"
WIDE = "sum in float64"
SYNCED = ", on the disk"
TORCH = ", torch.save"  # files of torch.save, those of speech toolkits
TITLES = {
    READ: "the files read into one buffer of each thread",
    SUM: "polyak: read and average, float32",
    WIDE: "polyak: read and average, float64",
    SUM + TORCH: "polyak: read and average, float32, files of torch.save",
    ADD: "load and add, divide",
    ADD + TORCH: "torch.load and add, divide",
    WRITE: "polyak: read, average, write",
    WRITE + SYNCED: "polyak: the same, forced to the disk (as it always is)",
    LOOP: "load and add, divide, save",
    LOOP + SYNCED: "load and add, divide, save, forced to the disk",
    MERGEKIT: "mergekit-pytorch, linear",
}


@dataclass(frozen=True)
class Run:
    """What a process took: seconds of its work, of all, its peak of resident memory in MB.

    `cat` are the seconds of reading the files right before.
    """

    work: float
    whole: float
    peak: float
    cat: float


def weights(megabytes: int, seed: int) -> dict[str, Tensor]:
    """The shapes of GPT-2 small, in float32, as many layers of it as fill the size."""
    width, generator = 768, torch.Generator().manual_seed(seed)
    shapes = {"wte": (int(50257 * megabytes / 500), width), "wpe": (1024, width)}
    for i in range(max(1, 12 * megabytes // 500)):
        shapes |= {f"{i}.attention": (width, 3 * width), f"{i}.out": (width, width)}
        shapes |= {f"{i}.up": (width, 4 * width), f"{i}.down": (4 * width, width)}
        shapes |= {f"{i}.bias.{j}": (width, j + 1) for j in range(4)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def polyak_sum(files: list[str], out: Path) -> None:
    """Reads and averages; keeps nothing."""
    accumulate = torch.float64 if out.name == WIDE else torch.float32
    mean = average(files, accumulate=accumulate)
    for name in mean:
        for _ in mean.pieces(name):
            pass


def polyak_write(files: list[str], out: Path) -> None:
    """Averages into a file."""
    average(files).write(out / MODEL)


def read(files: list[str], out: Path) -> None:  # noqa: ARG001
    """Reads and computes nothing: no average of these files can be faster."""

    def read_one(file: str) -> None:
        with Path(file).open("rb", buffering=0) as opened:
            while opened.readinto(buffers.__dict__.setdefault("own", bytearray(1 << 20))):
                pass

    buffers = threading.local()
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        list(threads.map(read_one, files))


def add(files: list[str], out: Path) -> dict[str, Tensor]:
    """What is written by hand: two models in memory."""
    load = torch.load if out.name.endswith(TORCH) else load_file
    total: dict[str, Tensor] = load(files[0])
    for file in files[1:]:
        for name, tensor in load(file).items():
            total[name] += tensor
    for tensor in total.values():
        tensor /= len(files)
    return total


def loop(files: list[str], out: Path) -> None:
    """The same, into a file."""
    save_file(add(files, out), out / MODEL)
    with (out / MODEL).open("rb") as saved:
        os.fsync(saved.fileno())


def mergekit(files: list[str], out: Path) -> None:
    """mergekit's merge of plain files."""
    main = importlib.import_module(MODULES[MERGEKIT]).main
    models = "".join(f"- {{model: {file}, parameters: {{weight: 1.0}}}}\n" for file in files)
    (out / "merge.yaml").write_text(f"merge_method: linear\ndtype: float32\nmodels:\n{models}")
    main([str(out / "merge.yaml"), str(out)], standalone_mode=False)


CONTENDERS: dict[str, Callable[[list[str], Path], object]] = {
    READ: read, ADD: add, ADD + TORCH: add, SUM + TORCH: polyak_sum, SUM: polyak_sum, WIDE: polyak_sum, WRITE: polyak_write, WRITE + SYNCED: polyak_write,
    LOOP: loop, LOOP + SYNCED: loop, MERGEKIT: mergekit,
}  # fmt: skip
MODULES = {MERGEKIT: "mergekit.scripts.merge_raw_pytorch"}


def child(name: str, out: Path, files: list[str]) -> None:
    """Runs a contender in this process; prints the seconds of its work and its peak of memory."""
    if name in MODULES:
        importlib.import_module(MODULES[name])
    if not name.endswith(SYNCED):
        os.fsync = lambda fd: None  # noqa: ARG005
    began = time.perf_counter()
    CONTENDERS[name](files, out)
    work = time.perf_counter() - began
    # Of this program alone: what a process reports when it ends also counts the one it was forked from.
    status = Path("/proc/self/status").read_text().split()
    print(f"\n{work} {int(status[status.index('VmHWM:') + 1]) * 1024 / 1e6}")


def run(name: str, out: Path, files: list[Path]) -> Run:
    """Runs a contender in a process of its own, after what it made before is gone."""
    files = [file.with_suffix(".pt") for file in files] if name.endswith(TORCH) else files
    place = out / name
    place.mkdir(exist_ok=True)
    (place / MODEL).unlink(missing_ok=True)
    os.sync()  # what others have written must not be in the way
    read, _ = timed(["cat", *map(str, files)])
    arguments = ["--child", name, str(place), *map(str, files)]
    whole, output = timed([sys.executable, __file__, *arguments])
    work, peak = map(float, output.split()[-2:])
    return Run(work, whole, peak, read)


def timed(command: list[str]) -> tuple[float, str]:
    """The seconds that a command takes, and the end of its output."""
    cat = command[0] == "cat"
    began = time.perf_counter()
    done = subprocess.run(
        command,
        stdout=subprocess.DEVNULL if cat else subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    seconds = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(f"{command[:4]}: {done.stderr}")
    return seconds, done.stdout


def check(out: Path, names: list[str]) -> None:
    """Raises unless all contenders made the same weights, up to rounding."""
    first, *others = (load_file(out / name / MODEL) for name in names)
    for other in others:
        for name, tensor in first.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-5, atol=1e-6)


def measure(files: list[Path], out: Path, rounds: int) -> dict[str, list[Run]]:
    """All contenders in turns; a first round does not count."""
    names = [name for name in CONTENDERS if name != MERGEKIT or importlib.util.find_spec(name)]
    found = [{name: run(name, out, files) for name in names} for _ in range(rounds + 1)]
    check(out, [name for name in names if (out / name / MODEL).exists()])
    return {name: [each[name] for each in found[1:]] for name in names}


def faster(found: dict[str, list[Run]], name: str, than: str) -> float:
    """How many times faster one is than another: the median over rounds."""
    pairs = zip(found[name], found[than], strict=True)
    return statistics.median(theirs.work / ours.work for ours, theirs in pairs)


AGAINST = {
    ADD: (READ, ADD, SUM, WIDE), ADD + TORCH: (ADD + TORCH, SUM + TORCH),
    LOOP + SYNCED: (LOOP + SYNCED, WRITE + SYNCED),
}  # fmt: skip
"""The loop that does as much -> what is compared with it; with the loop that saves, what is not here."""


def against_cat(runs: list[Run]) -> float:
    """What the work takes over what reading took right before: the median over rounds."""
    return statistics.median(run.work / run.cat for run in runs)


def table(found: dict[str, list[Run]], gigabytes: float) -> str:
    """Every contender: seconds, speed, ratios, memory."""
    read = statistics.median(run.cat for runs in found.values() for run in runs)
    lines = [f"| `cat FILES > /dev/null` | {read:.2f} | {gigabytes / read:.1f} | 1.00 | | | |"]
    for name, runs in found.items():
        work, whole, peak = (
            statistics.median(getattr(each, field) for each in runs)
            for field in ("work", "whole", "peak")
        )
        loop = next((against for against, of in AGAINST.items() if name in of), LOOP)
        cells = (
            f"{work:.2f}", f"{gigabytes / work:.1f}", f"{against_cat(runs):.2f}",
            f"{faster(found, name, loop):.1f}", f"{whole:.2f}", f"{peak:.0f}",
        )  # fmt: skip
        lines.append(f"| {TITLES[name]} | {' | '.join(cells)} |")
    header = "what | seconds | GB/s | x cat | times faster than the loop | with start and imports | peak MB"
    return "\n".join([f"| {header} |", "| --- | --- | --- | --- | --- | --- | --- |", *lines])


def targets(found: dict[str, list[Run]], peak: float, files: int, megabytes: int) -> str:
    """What was wanted, and whether it came out."""
    bound = f"the same, of files that are only read: {faster(found, READ, ADD):.1f}"
    cat, plain, of_torch = (
        against_cat(found[SUM]),
        faster(found, SUM, ADD),
        faster(found, SUM + TORCH, ADD + TORCH),
    )
    rows = [
        (f"peak resident MB, {files} files of {megabytes} MB", "<= 600", peak, peak <= 600, ".0f"),
        ("read and average, x cat", "<= 1.3", cat, cat <= 1.3, ".2f"),
        (f"times faster than load and add ({bound})", ">= 5", plain, plain >= 5, ".1f"),
        ("the same, files of torch.save", ">= 5", of_torch, of_torch >= 5, ".1f"),
    ]
    if MERGEKIT in found:
        times = faster(found, WRITE + SYNCED, MERGEKIT)
        title = "times faster than mergekit, polyak alone forced to the disk"
        rows.append((title, ">= 4", times, times >= 4, ".1f"))
    lines = [
        f"| {what} | {wanted} | {got:{form}} | {'yes' if met else 'no'} |"
        for what, wanted, got, met, form in rows
    ]
    return "\n".join(["| what | wanted | measured | met |", "| --- | --- | --- | --- |", *lines])


def report(arguments: argparse.Namespace, folder: Path) -> str:
    """Makes the files, measures, and gives the result as Markdown."""
    count, few, megabytes = arguments.files, arguments.timed, arguments.megabytes
    files = [folder / f"{i}.safetensors" for i in range(count)]
    for i, file in enumerate(files):
        save_file(made := weights(megabytes, i), file)
        torch.save(made, file.with_suffix(".pt"))
    peak = run(WRITE + SYNCED, folder, files).peak
    found = measure(files[:few], folder, arguments.rounds)
    gigabytes = sum(file.stat().st_size for file in files[:few]) / 1e9
    command = f"python benchmarks/files.py --files {count} --timed {few} --megabytes {megabytes}"
    return "\n".join([
        "# Averaging checkpoint files", "",
        f"`{command} --rounds {arguments.rounds}`: {platform.machine()}, {torch.get_num_threads()} "
        f"threads, torch {torch.__version__}, Python {platform.python_version()}.", "",
        "## Targets", "", targets(found, peak, count, megabytes), "",
        f"## {few} files of {megabytes} MB in the page cache", "", table(found, gigabytes), "",
        "Medians over rounds, of seconds and of ratios within a round. A loop that is forced to the "
        "disk is compared with what is forced, one that is not with what is not.", "",
    ])  # fmt: skip


def main() -> None:
    """Measures, prints and writes the result; or, as a child, runs one contender."""
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--files", type=int, default=20, help="for the peak of memory")
    parser.add_argument("--timed", type=int, default=12, help="of these, for the times")
    parser.add_argument("--megabytes", type=int, default=500, help="of each file")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="small files; writes no result")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.files, arguments.timed, arguments.megabytes, arguments.rounds = 8, 8, 100, 3
    with tempfile.TemporaryDirectory() as folder:
        text = report(arguments, Path(folder))
    print(text)
    if not arguments.quick:
        RESULT.write_text(text)


if __name__ == "__main__":
    main()
