"""The commands on files: what they print and write, and one clear error for everything else."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file
from torch import Tensor, nn

import polyak
from cli_runs import STEPS, finished, model, moved, place, run
from hostile_files import valid
from polyak import Averager, checkpoints, offline, theory
from polyak.cli._options import bytes_of, checkpoints_of, grid_of, names_of
from polyak.cli._users_function import users_function
from polyak.snapshots import snapshots

__all__ = ["finished", "place"]  # fixtures


def done(*arguments: object) -> str:
    """The standard output of a command that ends well."""
    found = run(*arguments)
    assert found.exit_code == 0, found.output
    assert isinstance(found.stdout, str)
    return found.stdout


def data(*arguments: object) -> Any:
    """The JSON of a command: all of its standard output."""
    return json.loads(done(*arguments, "--json"))


def weight_bytes(file: str) -> bytes:
    """The bytes of a tensor, to find its place in a file."""
    checkpoint = checkpoints.read(file)
    weights = next(iter(checkpoint.averages.values()))
    return weights["0.weight"].numpy().tobytes()


def same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return set(got) == set(wanted) and all(torch.equal(got[n], wanted[n]) for n in wanted)


class TestInspect:
    def test_an_average_with_its_rule_at_its_clock(self) -> None:
        found = data("inspect", "average.safetensors")
        assert (found["format"], found["count"], found["unit"]) == ("polyak", STEPS, "updates")
        average = found["averages"]["average"]
        about = theory.explain(average["rule"], STEPS)
        assert average["half_life"] == pytest.approx(100) == about.half_life
        assert average["mean_age"] == pytest.approx(about.mean_age)
        assert found["norms"] == ["1"] and found["live"] is None

    def test_the_numbers_are_those_of_the_model(self) -> None:
        weights = data("inspect", "step-1.pt")["live"]
        live = model()
        assert weights["parameters"] == sum(p.numel() for p in live.parameters())
        state = live.state_dict()
        assert weights["tensors"] == len(state)
        assert weights["bytes"] == sum(t.numel() * t.element_size() for t in state.values())
        assert weights["dtypes"] == {"float32": 8, "int64": 1}

    def test_a_folder_of_snapshots(self) -> None:
        found = data("inspect", "snapshots")
        assert found["format"] == "snapshots"
        told, stored = found["recorded"], snapshots("snapshots")
        assert (told["snapshots"], told["updates"]) == (len(stored), STEPS)
        assert (told["first"], told["last"]) == (stored[0].time, STEPS)
        assert told["bytes"] == sum(snapshot.path.stat().st_size for snapshot in stored)
        assert list(found["averages"]) == ["fast", "slow"]
        about = theory.explain(found["averages"]["slow"]["rule"], STEPS)
        assert found["averages"]["slow"]["half_life"] == pytest.approx(about.half_life)

    def test_a_file_without_names(self) -> None:
        import torch_ema

        torch.save(
            torch_ema.ExponentialMovingAverage(model().parameters(), 0.9).state_dict(), "t.pt"
        )
        found = data("inspect", "t.pt")
        assert found["format"] == "torch-ema"
        assert {tensor["name"] for tensor in found["tensors"]} == {str(i) for i in range(6)}

    def test_tied_weights_count_once(self) -> None:
        tied = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
        tied[1].weight = tied[0].weight
        torch.save({"model": tied.state_dict()}, "tied.pt")
        averager = Averager(tied, "uniform()")
        averager.update()
        polyak.save("tied.safetensors", averager)
        assert data("inspect", "tied.pt")["live"]["parameters"] == 9
        assert data("inspect", "tied.safetensors")["averages"]["average"]["weights"]["tensors"] == 1

    def test_objects_that_are_set_aside_are_counted(self) -> None:
        objects = {"path": Path("a"), "others": [Path("b"), Fraction(1, 2)]}
        torch.save({"state_dict": model().state_dict(), "hparams": objects}, "aside.pt")
        paths = f"{Path.__module__}.PosixPath"  # pathlib._local since Python 3.13
        printed = done("inspect", "aside.pt")
        assert f"\nobjects that were not read: {paths} x2, fractions.Fraction x1\n" in printed
        told = {paths: 2, "fractions.Fraction": 1}
        assert data("inspect", "aside.pt")["aside"] == told
        assert "set aside" not in done("inspect", "step-1.pt")
        many = [type(f"Class{i}", (), {"__module__": __name__}) for i in range(20)]
        for each in many:
            globals()[each.__name__] = each
        torch.save({"model": model().state_dict(), "x": [each() for each in many]}, "many.pt")
        assert "Class9 x1 and 10 more\n" in done("inspect", "many.pt")

    def test_damage_is_found_by_verify(self) -> None:
        """Only headers are read without it."""
        sources = {"average.safetensors": "average.safetensors", "ema.pt": "ema.pt"}
        snapshot = sorted(Path("snapshots").iterdir())[3]
        sources["snapshots"] = str(snapshot)
        for path, file in sources.items():
            said = done("inspect", path, "--verify").splitlines()[-1]
            assert re.fullmatch(r"verified: [\d.]+ k?B fit their checksums", said)
            assert data("inspect", path, "--verify")["verified"]["unchecked"] == 0
            content = Path(file).read_bytes()
            place = content.rindex(weight_bytes(file))
            Path(file).write_bytes(content[:place] + b"\xff" + content[place + 1 :])
            assert not data("inspect", path)["verified"]
            found = run("inspect", path, "--verify")
            assert (found.exit_code, found.stdout) == (2, "")
            assert found.stderr.startswith(f"polyak: {file}: ") and found.stderr.count("\n") == 1

    def test_for_people(self) -> None:
        printed = run("inspect", "both.safetensors")
        assert printed.stdout.startswith("both.safetensors: polyak, 2,000 updates\n")
        assert "slow  power(relative_std=0.1)" in printed.stdout
        assert "largest tensors, 5 of 9; --tensors lists all" in printed.stdout
        assert printed.stderr.startswith("note: 1 norm with running statistics (1)")
        assert "recalibrate" in printed.stderr
        listed = done("inspect", "both.safetensors", "--tensors")
        assert all(name in listed for name in model().state_dict())
        assert "no average\n" in done("inspect", "step-1.pt")
        assert " snapshots of run " in done("inspect", "snapshots")


class TestAverage:
    FILES = ("step-1.pt", "step-2.pt", "step-3.pt")

    def made(self, *options: str) -> tuple[dict[str, Tensor], list[float]]:
        found = data("average", *self.FILES, "--out", "out.safetensors", *options)
        assert [term["file"] for term in found["terms"]] == list(self.FILES)
        return load_file("out.safetensors"), [term["coefficient"] for term in found["terms"]]

    def wanted(self, coefficients: Any, **options: Any) -> dict[str, Tensor]:
        return dict(offline.average(self.FILES, coefficients, **options))

    def test_the_mean(self) -> None:
        got, shares = self.made()
        assert shares == pytest.approx([1 / 3] * 3)
        assert same(got, self.wanted("uniform()"))

    def test_a_rule_with_the_time_that_files_span(self) -> None:
        rule = "exponential(half_life=500)"
        got, shares = self.made("--rule", rule, "--elapsed", "500,500,1000")
        assert shares == theory.coefficients(rule, [500, 500, 1000]).tolist()
        assert same(got, self.wanted(rule, elapsed=[500, 500, 1000]))
        _, even = self.made("--rule", rule, "--elapsed", "1000", "--force")
        assert even == theory.coefficients(rule, [1000.0] * 3).tolist()

    def test_coefficients(self) -> None:
        got, shares = self.made("--coefficients", "0.2,-0.3,1.1")
        assert shares == pytest.approx([0.2, -0.3, 1.1])
        assert same(got, self.wanted([0.2, -0.3, 1.1]))

    @pytest.mark.parametrize("kind", ["wsm", "qam"])
    @pytest.mark.parametrize("shape", ["sqrt", "linear", "cosine"])
    def test_a_decay_of_the_learning_rate(self, kind: str, shape: str) -> None:
        _, shares = self.made(f"--{kind}", shape)
        wanted = getattr(theory, kind)(theory.learning_rate_decay(shape, 3))
        assert shares == pytest.approx(wanted.tolist())

    def test_a_greedy_soup(self) -> None:
        _, shares = self.made("--greedy", "judge:loss")
        with users_function("judge:loss") as loss:
            soup = offline.greedy_soup(self.FILES, loss, better="lower")
        assert shares == soup.coefficients.tolist()
        assert len(soup.ingredients) < len(self.FILES)
        told = data("average", *self.FILES, "--greedy", "judge:loss", "--dry-run")["terms"]
        assert [term["quality"] for term in told] == list(soup.qualities)
        printed = run("average", *self.FILES, "--greedy", "judge:loss", "--dry-run")
        assert "quality alone" in printed.stdout and f"{soup.qualities[0]:.6g}" in printed.stdout
        assert f"the last {soup.qualities[-1]:g}" in printed.stderr

    def test_dtypes_and_sums(self) -> None:
        got, _ = self.made("--dtype", "bf16", "--accumulate", "float64")
        assert got["0.weight"].dtype == torch.bfloat16
        assert got["1.num_batches_tracked"].dtype == torch.int64
        wanted = self.wanted("uniform()", dtype=torch.bfloat16, accumulate=torch.float64)
        assert same(got, wanted)

    def test_shards(self) -> None:
        done("average", *self.FILES, "--out", "folder", "--shard-size", "200B")
        index = json.loads(Path("folder/model.safetensors.index.json").read_text())
        assert len(set(index["weight_map"].values())) > 1
        found = checkpoints.read("folder").live
        assert found is not None and same(dict(found), self.wanted("uniform()"))

    def test_the_average_in_each_file(self) -> None:
        files = ("both.safetensors", "both.safetensors")
        done("average", *files, "--average", "slow", "--out", "s.safetensors")
        wanted = checkpoints.read("both.safetensors").averages["slow"]
        assert same(load_file("s.safetensors"), dict(wanted))

    def test_for_people(self) -> None:
        printed = run("average", *self.FILES, "--out", "out.safetensors")
        assert "step-2.pt     0.333333\n" in printed.stdout
        assert "out.safetensors: 9 tensors of 3 files, " in printed.stdout
        copied, norms = printed.stderr.splitlines()
        assert "1 of 9 tensors" in copied and "polyak.recalibrate" in norms

    def test_files_are_taken_in_the_order_of_their_steps(self) -> None:
        """Shells sort step-1000 before step-900; only what is given file by file stays as listed."""
        backwards, rule = self.FILES[::-1], ("--rule", "exponential(0.9)")
        printed = run("average", *backwards, "--out", "a.safetensors", *rule)
        assert "the files are taken in the order of their steps" in printed.stderr
        done("average", *self.FILES, "--out", "b.safetensors", *rule)
        assert same(load_file("a.safetensors"), load_file("b.safetensors"))
        listed = ("--coefficients", "0.1,0.2,0.7")
        kept = run("average", *backwards, "--out", "c.safetensors", *listed)
        assert "numbers do not ascend" in kept.stderr
        wanted = dict(offline.average(backwards, [0.1, 0.2, 0.7]))
        assert same(load_file("c.safetensors"), wanted)


class TestSynthesize:
    RULE = "exponential(half_life=300)"

    def test_it_is_the_librarys(self) -> None:
        found = data("synthesize", "snapshots", "--rule", self.RULE, "--out", "e.safetensors")
        made = offline.synthesize("snapshots", self.RULE)
        assert found["relative_error"] == made.relative_error
        assert found["amplification"] == made.amplification
        assert (found["at"], found["out"]) == (STEPS, "e.safetensors")
        assert [term["coefficient"] for term in found["terms"]] == [
            t.coefficient for t in made.terms
        ]
        assert same(load_file("e.safetensors"), dict(made.weights()))

    def test_a_dry_run_writes_nothing(self) -> None:
        printed = done("synthesize", "snapshots", "--rule", self.RULE, "--dry-run")
        assert printed.startswith(str(offline.synthesize("snapshots", self.RULE)))
        assert "half-life 300" in printed and "snapshot-0000002000.safetensors" in printed
        terms = offline.synthesize("snapshots", self.RULE).terms
        assert f"and {len(terms) - 10} smaller ones" in printed
        out = ("--out", "e.safetensors")
        found = data("synthesize", "snapshots", "--rule", self.RULE, "--dry-run", *out)
        assert found["out"] is None and not Path("e.safetensors").exists()

    def test_an_earlier_time_and_checkpoints_alone(self) -> None:
        found = data("synthesize", "snapshots", "--rule", "uniform()", "--at", "1500", "--dry-run")
        assert found["at"] == 1500 and {term["time"] <= 1500 for term in found["terms"]} == {True}
        files = ("--checkpoint", "500=step-1.pt", "--checkpoint", "1000=step-2.pt")
        found = data("synthesize", *files, "--rule", "uniform()", "--max-error", "1", "--dry-run")
        assert {term["slot"] for term in found["terms"]} == {"live"}

    def test_shards(self) -> None:
        options = ("--rule", "uniform()", "--out", "folder", "--shard-size", "200B")
        done("synthesize", "snapshots", *options)
        assert len(list(Path("folder").glob("*.safetensors"))) > 1


class TestExport:
    def test_it_fits_the_model(self) -> None:
        found = data("export", "both.safetensors", "m.safetensors", "--average", "slow")
        assert found["from"] == "polyak"
        live = model(seed=1)
        missing, unexpected = load_model(live, Path("m.safetensors"))
        assert not missing and not unexpected
        wanted = checkpoints.read("both.safetensors").averages["slow"]
        assert same(dict(live.state_dict()), dict(wanted))

    def test_the_live_weights(self) -> None:
        found = data("export", "ema.pt", "l.safetensors", "--average", "live")
        assert found["average"] == "live"
        wanted = checkpoints.read("ema.pt").live
        assert wanted is not None and same(load_file("l.safetensors"), dict(wanted))
        assert run("export", "step-1.pt", "s.safetensors", "--average", "live").stderr == ""
        assert same(load_file("s.safetensors"), torch.load("step-1.pt"))

    def test_dtypes_are_those_of_the_live_weights(self) -> None:
        live = {"w": torch.ones(3, dtype=torch.bfloat16), "n": torch.tensor(3)}
        ema = {"w": torch.full((3,), 1.001), "n": torch.tensor(3)}
        torch.save({"model": live, "ema": ema}, "e.pt")
        done("export", "e.pt", "narrow.safetensors")
        assert same(load_file("narrow.safetensors"), {**ema, "w": ema["w"].bfloat16()})
        done("export", "e.pt", "wide.safetensors", "--dtype", "float32")
        assert same(load_file("wide.safetensors"), ema)

    def test_dtype_and_shards(self) -> None:
        done("export", "ema.pt", "folder", "--dtype", "fp16", "--shard-size", "100B")
        found = checkpoints.read("folder").live
        assert found is not None and found["0.weight"].dtype == torch.float16

    def test_a_rule_that_reads_out_several_slots(self) -> None:
        live = nn.Sequential(*[nn.Linear(64, 64) for _ in range(8)])
        averager = Averager(live, "bema()")
        for step in range(3):
            moved_all(live, step)
            averager.update()
        polyak.save("bema.safetensors", averager)
        done("export", "bema.safetensors", "e.safetensors")
        assert same(load_file("e.safetensors"), averager.average())

    def test_every_layout(self, tmp_path: Path) -> None:
        """Ours and the peers': each average and the live weights, to the bit in the live dtypes."""
        formats: dict[tuple[str, str], int] = {}
        for case in valid(tmp_path / "valid"):
            found = checkpoints.read(case.path, "positions")
            named = list(next(iter(found.averages.values()), found.live or {}))
            (tmp_path / "names.txt").write_text("\n".join(f"name.{name}" for name in named))
            positions = ("--names", "names.txt") if set(named) <= set(map(str, range(99))) else ()
            for average in (*found.averages, *(["live"] if found.live is not None else [])):
                out = tmp_path / f"{len(formats)}.safetensors"
                done("export", case.path, out, "--average", average, *positions, "--force")
                wanted = dict(found.weights(average))
                got = {n.removeprefix("name."): t for n, t in load_file(out).items()}
                assert set(got) <= set(wanted), (case.path, average)
                for name, tensor in got.items():
                    same_dtype = wanted[name].to(tensor.dtype)
                    torch.testing.assert_close(tensor, same_dtype, rtol=0, atol=0, equal_nan=True)
                formats[found.format, average] = len(got)
        assert len({name for name, _ in formats}) >= 12 and min(formats.values()) > 0


@torch.no_grad()
def moved_all(live: nn.Module, step: int) -> None:
    for parameter in live.parameters():
        parameter.add_(torch.randn(parameter.shape)).add_(step)


class TestConvert:
    def test_to_ours_goes_on_as_the_library_would(self) -> None:
        """ema-pytorch's average after a restart from a converted file is that without one."""
        import ema_pytorch

        live = model()
        peer = ema_pytorch.EMA(live, beta=0.9, update_after_step=2, update_every=3)
        for step in range(1, 24):
            moved(live, step)
            peer.update()
        torch.save(peer.state_dict(), "peer.pt")
        rule = "article_ema(beta=0.9, update_after_step=2, first_copy=False)"
        done("convert", "peer.pt", "ours.safetensors", "--rule", rule, "--every", "3")
        averager = Averager(live, rule, every=3)
        polyak.load("ours.safetensors", averager)
        for step in range(24, 50):
            moved(live, step)
            peer.update()
            averager.update()
        wanted = dict(peer.ema_model.named_parameters())
        got = averager.average()
        for name, parameter in wanted.items():
            torch.testing.assert_close(got[name], parameter.detach(), rtol=1e-5, atol=1e-6)

    def test_tensors_without_names(self) -> None:
        import torch_ema

        live = model()
        peer = torch_ema.ExponentialMovingAverage(live.parameters(), 0.9)
        peer.update()
        torch.save(peer.state_dict(), "peer.pt")
        Path("names.txt").write_text("\n".join(name for name, _ in live.named_parameters()))
        found = data("convert", "peer.pt", "o.safetensors", "--names", "names.txt")
        assert found["from"] == "torch-ema"
        assert checkpoints.read("o.safetensors").rules == {
            "average": polyak.parse("exponential(ratio(0.9))")
        }

    def test_several_averages_each_with_its_rule(self) -> None:
        import ema_pytorch

        live = nn.Linear(2, 2)
        peer = ema_pytorch.PostHocEMA(live, sigma_rels=(0.05, 0.1), checkpoint_folder="post")
        for _ in range(3):
            peer.update()
        torch.save(peer.state_dict(), "peer.pt")
        rules = ("--rule", "0=power(relative_std=0.05)", "--rule", "1=power(relative_std=0.1)")
        done("convert", "peer.pt", "o.safetensors", *rules)
        found = checkpoints.read("o.safetensors")
        assert list(found.rules.values()) == [
            polyak.Power.from_relative_std(s) for s in (0.05, 0.1)
        ]

    def test_buffers_that_are_copied(self) -> None:
        live = nn.Linear(2, 2)
        live.register_buffer("scale", torch.ones(2))
        torch.save({"model": live.state_dict(), "ema": live.state_dict()}, "b.pt")
        rule = ("--rule", "exponential(0.9)", "--count", "7")
        done("convert", "b.pt", "o.safetensors", *rule, "--copy", "scale")
        averager = Averager(live, "exponential(0.9)")
        polyak.load("o.safetensors", averager)
        assert averager.count == 7

    def test_tied_weights(self) -> None:
        live = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
        live[1].weight = live[0].weight
        torch.save({"model": live.state_dict(), "ema": live.state_dict()}, "tied.pt")
        rule = ("--rule", "exponential(0.9)", "--count", "7")
        done("convert", "tied.pt", "o.safetensors", *rule)
        averager = Averager(live, "exponential(0.9)")
        polyak.load("o.safetensors", averager)
        assert list(averager.average()) == ["0.weight", "1.weight"]


class TestDiff:
    @pytest.mark.parametrize("turned", [False, True])
    def test_a_part_that_one_of_them_has(self, turned: bool) -> None:
        """The other is read whole, and a note says so."""
        inner = torch.load("step-1.pt")
        nested = {"g": {f"net.{n}": t for n, t in inner.items()}, "d": {"w": torch.ones(2)}}
        torch.save(nested, "nested.pt")
        files = ["step-1.pt", "nested.pt"][:: -1 if turned else 1]
        result = run("diff", *files, "--key", "g", "--prefix", "net.")
        assert result.exit_code == 0 and result.stdout == "equal: 9 tensors\n", result.output
        assert "note: step-1.pt: " in result.stderr and "all of it is compared" in result.stderr
        for part in (("--key", "x"), ("--prefix", "x.")):
            result = run("diff", *files, *part)
            assert result.exit_code == 2 and "note" not in result.stderr
        missing = run("diff", *files, "--key", "x").stderr
        assert f"polyak: {files[0]}: key='x': there is no 'x'" in missing

    def test_equal_files_of_different_formats(self) -> None:
        save_file(torch.load("step-1.pt"), "same.safetensors")
        assert done("diff", "step-1.pt", "same.safetensors") == "equal: 9 tensors\n"
        assert data("diff", "step-1.pt", "same.safetensors")["equal"]
        assert "0.weight" in done("diff", "step-1.pt", "same.safetensors", "--all")

    def test_different_ones_end_with_1(self) -> None:
        found = run("diff", "step-1.pt", "step-2.pt", "--json")
        assert (found.exit_code, found.stderr) == (1, "")
        compared = json.loads(found.stdout)
        a, b = torch.load("step-1.pt"), torch.load("step-2.pt")
        for each in compared["tensors"]:
            first, second = a[each["name"]].double(), b[each["name"]].double()
            wanted = float((first - second).norm() / first.norm())
            assert (each["relative"] or 0.0) == pytest.approx(wanted if first.norm() else 0.0)
        sizes = [each["relative"] for each in compared["tensors"] if each["relative"]]
        assert sizes == sorted(sizes, reverse=True)

    def test_which_weights(self) -> None:
        each = ("--average", "live", "--average", "average")
        found = run("diff", "ema.pt", "ema.pt", *each)
        assert found.exit_code == 1 and "|a - b| / |a|" in found.stdout
        assert run("diff", "ema.pt", "average.safetensors", *each[2:]).exit_code == 0

    def test_names_shapes_and_dtypes(self) -> None:
        save_file({"x": torch.ones(2), "y": torch.ones(3), "z": torch.ones(1)}, "a.safetensors")
        save_file(
            {"y": torch.ones(4), "z": torch.ones(1).half(), "w": torch.ones(1)}, "b.safetensors"
        )
        found = run("diff", "a.safetensors", "b.safetensors")
        assert found.exit_code == 1
        assert "2 of 2 tensors differ" in found.stdout
        assert "float32, float16" in found.stdout and "3, 4" in found.stdout
        assert "only in A: x\n" in found.stdout and "only in B: w\n" in found.stdout

    def test_many_differences_are_cut(self) -> None:
        for name, value in (("a", 0.0), ("b", 1.0)):
            tensors = {f"t{i}": torch.full((1,), value + i) for i in range(30)}
            save_file(tensors, f"{name}.safetensors")
        few = run("diff", "a.safetensors", "b.safetensors").stdout
        assert "and 10 more; --all lists them" in few
        assert run("diff", "a.safetensors", "b.safetensors", "--all").stdout.count("\nt") == 31


OUT = ("--out", "x.safetensors")
ERRORS: list[tuple[tuple[str, ...], str]] = [
    (("inspect", "nothing.pt"), "nothing.pt: No such file or directory"),
    (
        ("inspect", "judge.py"),
        "judge.py is neither a file of torch.save nor of safetensors: it looks like text",
    ),
    (("inspect", "empty"), "empty: the file is empty"),
    (("inspect", "folder-of-nothing"), "folder-of-nothing holds no weights (nothing)"),
    (("average", "step-1.pt", *OUT, "--rule", "ema(1)"), "'ema' in spec 'ema(1)' is unknown"),
    (("average", "step-1.pt", "--out", "x.bin"), "out is 'x.bin', wanted a name that ends in"),
    (("average", "step-1.pt", "--out", "judge.py"), "judge.py "),
    (("average", "step-1.pt", *OUT, "--dtype", "int8"), "--dtype is 'int8', wanted one of float64"),
    (("average", "step-1.pt", *OUT, "--accumulate", "bf16"), "accumulate is torch.bfloat16"),
    (("average", "step-1.pt", *OUT, "--accumulate", "x"), "--accumulate is 'x', wanted one of"),
    (("average", "step-1.pt", *OUT, "--shard-size", "2 cats"), "--shard-size is '2 cats'"),
    (
        ("average", "step-1.pt", *OUT, "--shard-size", "2GB"),
        "out is 'x.safetensors', wanted a fold",
    ),
    (
        ("average", "step-1.pt", *OUT, "--coefficients", "a"),
        "--coefficients is 'a', wanted numbers",
    ),
    (("average", "step-1.pt", *OUT, "--coefficients", "1,2"), "coefficients have shape (2,)"),
    (("average", "step-1.pt", *OUT, "--elapsed", "1,2"), "elapsed has 2 times, wanted 1"),
    (("average", "step-1.pt", *OUT, "--wsm", "sqrt"), "checkpoints is 1, wanted an integer >= 2"),
    (
        ("average", "step-1.pt", *OUT, "--wsm", "sqrt", "--rule", "uniform()"),
        "--rule and --wsm each choose",
    ),
    (
        ("average", "step-1.pt", *OUT, "--average", "ema"),
        "step-1.pt has the averages: none",
    ),
    (
        ("average", "both.safetensors", *OUT),
        "both.safetensors has the averages: fast, slow",
    ),
    (
        ("average", "step-1.pt", *OUT, "--greedy", "judge"),
        "'judge' is not MODULE:FUNCTION",
    ),
    (("average", "step-1.pt", *OUT, "--greedy", "judge:silent"), "evaluate returned None"),
    (("synthesize", "snapshots", "--rule", "uniform()"), "nothing to do: give --out, or --dry-run"),
    (
        ("synthesize", "snapshots", "--rule", "exponential(0.1)", *OUT),
        "exponential(0.1) at 2000 cannot",
    ),
    (
        ("synthesize", "snapshots", "--rule", "uniform()", *OUT, "--at", "9999"),
        "at is 9999.0, wanted",
    ),
    (("synthesize", "--rule", "uniform()", "--dry-run"), "nothing to make an average of"),
    (
        ("synthesize", "nowhere", "--rule", "uniform()", *OUT),
        "nowhere: no such folder of snapshots",
    ),
    (("synthesize", "empty", "--rule", "uniform()", *OUT), "empty: no such folder of snapshots"),
    (
        ("synthesize", "--checkpoint", "5", "--rule", "uniform()", *OUT),
        "--checkpoint is '5', wanted",
    ),
    (
        ("synthesize", "snapshots", "--rule", "uniform()", "--out", "ema.pt"),
        "ema.pt ",
    ),
    (
        ("export", "step-1.pt", "x.safetensors"),
        "step-1.pt has live weights and no average: to use them, name",
    ),
    (
        ("export", "average.safetensors", "x.safetensors", "--average", "live"),
        "average.safetensors has no live",
    ),
    (
        ("export", "ema.pt", "x.safetensors", "--average", "best"),
        "ema.pt has the averages: average; there is no",
    ),
    (
        ("average", "average.safetensors", *OUT, "--average", "live"),
        "average.safetensors has no live",
    ),
    (
        ("diff", "average.safetensors", "ema.pt", "--average", "live"),
        "average.safetensors has no live",
    ),
    (
        ("export", "both.safetensors", "x.safetensors"),
        "both.safetensors has the averages: fast, slow",
    ),
    (("export", "ema.pt", "average.safetensors"), "average.safetensors "),
    (("export", "ema.pt", "x.pt"), "out is 'x.pt', wanted a name that ends in .safetensors"),
    (
        ("export", "ema.pt", "x.safetensors", "--names", "no.txt"),
        "no.txt: No such file or directory",
    ),
    (("convert", "ema.pt", "x.safetensors"), "ema.pt: the format state-dict does not"),
    (("convert", "step-1.pt", "x.safetensors"), "step-1.pt (state-dict) has live weights"),
    (("convert", "average.safetensors", "x"), "average.safetensors is polyak's own"),
    (("convert", "ema.pt", "x", "--rule", "0=a", "--rule", "b"), "--rule is 0=a, b: "),
    (("convert", "ema.pt", "x", "--rule", "b=uniform()"), "ema.pt has no average b"),
    (("convert", "ema.pt", "x", "--rule", "uniform()"), "ema.pt: this state-dict file do"),
    (("convert", "ema.pt", "best.pt"), "best.pt "),
    (("convert", "ema.pt", "x", "--names", "best.pt"), "best.pt is not a text file"),
    (("convert", "ema.pt", "x", "--average", "live"), "No such option: --average"),
    (("diff", "step-1.pt", "nothing.pt"), "nothing.pt: No such file or directory"),
    (
        ("diff", "both.safetensors", "ema.pt"),
        "both.safetensors has the averages: fast, slow; name one of them (--average)",
    ),
    (("diff", "ema.pt", "ema.pt", *("--average", "a") * 3), "--average is given 3 times, wanted"),
]


@pytest.mark.parametrize(("arguments", "message"), ERRORS, ids=[" ".join(a) for a, _ in ERRORS])
def test_errors_are_one_line(arguments: tuple[str, ...], message: str, place: Path) -> None:
    Path("empty").touch()
    Path("folder-of-nothing").mkdir()
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    found = run(*arguments)
    assert (found.exit_code, found.stdout) == (2, ""), found.output
    line = found.stderr.removeprefix("polyak: ")
    assert found.stderr.startswith("polyak: ") and line.startswith(message)
    assert found.stderr.count("\n") == 1
    after = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    assert {p: t for p, t in after.items() if "__pycache__" not in str(p)} == before


def test_what_exists_is_overwritten_by_force_alone() -> None:
    Path("x.safetensors").write_text("precious")
    commands: list[tuple[str, ...]] = [
        ("average", "step-1.pt", *OUT),
        ("synthesize", "snapshots", "--rule", "uniform()", *OUT),
        ("export", "ema.pt", "x.safetensors"),
        (*("convert", "ema.pt", "x.safetensors"), *("--rule", "uniform()", "--count", "1")),
    ]  # fmt: skip
    for command in commands:
        Path("x.safetensors").write_text("precious")
        refused = run(*command)
        assert refused.exit_code == 2 and refused.stderr.endswith("; --force replaces it\n")
        assert Path("x.safetensors").read_text() == "precious"
        done(*command, "--force")
        assert load_file("x.safetensors")


def test_differences_between_files_keep_their_lines() -> None:
    save_file({"0.weight": torch.ones(1)}, "other.safetensors")
    found = run("average", "step-1.pt", "other.safetensors", *OUT)
    assert found.exit_code == 2 and "  missing: 0.bias, " in found.stderr
    assert found.stderr.startswith(
        "polyak: other.safetensors is not of the same model as step-1.pt\n"
    )


def test_what_a_file_says_never_commands_the_terminal() -> None:
    name = "w\x1b[2J\nnote: all is well\udc80"
    torch.save({name: torch.ones(1)}, "hostile.pt")
    torch.save({"w": torch.ones(1)}, "plain.pt")
    printed = [
        run("inspect", "hostile.pt", "--tensors"),
        run("diff", "hostile.pt", "plain.pt"),
        run("average", "hostile.pt", "plain.pt", *OUT),
        run("inspect", "no\x1b[2J.pt"),
    ]
    for found in printed:
        assert "\x1b" not in found.output and "\\x1b[2J" in found.output


def test_names_are_lines_of_a_text_file() -> None:
    Path("names.txt").write_text("a.weight\n\n  a name with spaces \r\nb\n")
    assert names_of(Path("names.txt")) == ["a.weight", "a name with spaces", "b"]
    assert names_of(None) is None


def test_sizes() -> None:
    texts = {"2GB": 2 * 10**9, "1GiB": 2**30, "500 MB": 5 * 10**8, "1.5k": 1500, "7": 7, "3b": 3}
    assert {text: bytes_of(text) for text in texts} == texts
    for wrong in ("", "GB", "-1GB", "1iB", "1e9"):
        with pytest.raises(ValueError, match="wanted a size"):
            bytes_of(wrong)


def test_grids() -> None:
    assert grid_of("100:10000:3", "--half-lives") == [100, 1000, 10000]
    assert grid_of("5:5:1", "--half-lives") == [5] and grid_of(None, "--half-lives") == []
    for wrong in ("100", "100:10:3", "0:10:3", "1:2:0", "1:2:x", "1:inf:3", "nan:1:2"):
        with pytest.raises(ValueError, match="wanted LOW:HIGH:COUNT"):
            grid_of(wrong, "--half-lives")


def test_times_of_checkpoints() -> None:
    assert checkpoints_of(["5=a=b.pt", "10=c.pt"]) == {5: Path("a=b.pt"), 10: Path("c.pt")}
    for wrong in (["5"], ["x=a"], ["5="], ["5=a", "5=b"]):
        with pytest.raises(ValueError, match="wanted TIME=FILE"):
            checkpoints_of(wrong)
