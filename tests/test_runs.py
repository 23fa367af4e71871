"""Folders of runs: their checkpoints are found, ordered by their steps, and chosen by their metrics."""

from __future__ import annotations

import os
import random
import re
import sys
import warnings
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli_runs import run as command
from polyak import Averager, Recorder, offline
from polyak._runs.metrics import _TABLES, _TEXTS
from polyak.checkpoints._file_names import named
from polyak.offline import Choice
from run_folders import (
    KINDS,
    fairseq2,
    lightning,
    megatron,
    mmengine,
    put,
    text,
    transformers_trainer,
    weights,
    wenet,
)


def names(choice: Choice, folder: Path) -> tuple[str, ...]:
    """What its trainer named: a folder's file stands for the folder."""
    paths = [file.path for file in choice.files]
    in_folder = ("model.ckpt", "mp_rank_00_model_states.pt")
    assert all(path.is_relative_to(folder) for path in paths)
    return tuple(path.parent.name if path.name in in_folder else path.name for path in paths)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        for kind, (make, *_) in KINDS.items():
            make(folder / kind)
    return folder


@pytest.mark.parametrize("kind", KINDS)
class TestEveryKind:
    def test_the_last(self, kind: str, runs: Path) -> None:
        assert names(offline.choose(runs / kind, last=2), runs / kind) == KINDS[kind][1]

    def test_the_best(self, kind: str, runs: Path) -> None:
        _, _, by, metric, wanted = KINDS[kind]
        choice = offline.choose(runs / kind, best=2, by=by)
        assert names(choice, runs / kind) == wanted
        assert choice.metric == metric
        qualities = [file.quality for file in choice.files]
        best = (max if choice.better == "higher" else min)(q for q in qualities if q is not None)
        (first,) = offline.choose(runs / kind, best=1, by=by).files
        assert first.quality == best and first.path in [file.path for file in choice.files]

    def test_neither_the_listed_order_nor_the_times_of_files_count(
        self, kind: str, runs: Path
    ) -> None:
        wanted = [file.path for file in offline.choose(runs / kind).files]
        shuffled = [*wanted]
        for seed in range(3):
            random.Random(seed).shuffle(shuffled)
            for i, path in enumerate(shuffled):
                os.utime(path, (i, i))
            assert [file.path for file in offline.choose(runs / kind).files] == wanted
            if kind != "speechbrain":  # its records lie beside the files, not in them
                assert [file.path for file in offline.choose(shuffled).files] == wanted

    def test_they_are_averaged(self, kind: str, runs: Path, tmp_path: Path) -> None:
        files = offline.choose(runs / kind, last=2).files
        made = offline.average(files, [0.25, 0.75])
        (name,) = (name for name in made if name.endswith("w"))
        values = [float(offline.average([file])[name][0]) for file in files]
        assert values[0] != values[1]
        assert float(made[name][0]) == 0.25 * values[0] + 0.75 * values[1]
        out = tmp_path / "mean.safetensors"
        done = command("average", runs / kind, "--last", 2, "--out", out, "--verify")
        assert done.exit_code == 0, done.output
        assert float(load_file(out)[name][0]) == sum(values) / 2
        assert "verified: 2 tensors are the direct sums" in done.stdout


@pytest.mark.parametrize("name", (*_TABLES, *_TEXTS))
def test_a_table_of_each_name_is_read(name: str, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        put(tmp_path / f"step-{step}.pt", weights(step))
    rows = '{"step": 1, "loss": 3}\n{"step": 2, "loss": 1}\n{"step": 3, "loss": 2}\n'
    if name == "*.csv":
        rows = "step,loss\n1,3\n2,1\n3,2\n"
    text(tmp_path / name.replace("*", "it"), rows)
    assert [file.at for file in offline.choose(tmp_path, best=1, by="loss").files] == [2]


NAMES = [
    ("step-1000.pt", {"step": 1000}),
    ("step1000-unsharded", {"step": 1000}),
    ("iter_0001000", {"step": 1000}),
    ("global_step100", {"step": 100}),
    ("model_step_20000.pt", {"step": 20000}),
    ("model.iter-500.pth", {"step": 500}),
    ("epoch=3-step=64.ckpt", {"epoch": 3, "step": 64}),
    ("epoch=3-step=64-v1.ckpt", {"epoch": 3, "step": 64}),
    ("epoch=03-val_loss=0.12.ckpt", {"epoch": 3}),
    ("epoch-12.pt", {"epoch": 12}),
    ("12epoch.pth", {"epoch": 12}),
    ("rl_model_10000_steps.pt", {"step": 10000}),
    ("ep1-ba100-rank0.pt", {"step": 100, "epoch": 1}),
    ("snapshot.ep.7", {"epoch": 7}),
    ("checkpoint-500", {"number": 500}),
    ("checkpoint_1_500.pt", {"number": 500}),
    ("0.pt", {"number": 0}),
    ("ema_0.9999_050000.pt", {"number": 50000}),
    ("iter_80k.pth", {"step": 80000}),
    ("step=2K.pt", {"step": 2000}),
    ("step_1e4.pt", {"step": 10000}),
    ("model-1.5M.pt", {"number": 1500000}),
    ("olmo-step1000-tokens4B", {"step": 1000}),
    ("last.ckpt", {}),
    ("wav.pt", {}),
    ("llama2-7b-step-500.pt", {"step": 500}),
    ("350m-step_500", {"step": 500}),
    ("gpt-1.3B-iter_0001000.pt", {"step": 1000}),
    ("ViT-300M-steps5000.pt", {"step": 5000}),
    ("llama-7b-steps-100.pt", {"step": 100}),
    ("7b_steps_3.pt", {"step": 3}),
    ("350m-step-10k.pt", {"step": 10000}),
    ("10k-steps-350m.pt", {"step": 10000}),
    ("10000-steps-350m.pt", {"step": 10000}),
    ("llama-7b-10k-iters.pt", {"step": 10000}),
    ("350m-500-steps.pt", {"step": 500}),
    ("size=7b-step-100.pt", {"step": 100}),
    ("step10k.pt", {"step": 10000}),
    ("10k-steps.pt", {"step": 10000}),
    ("1e4-steps.pt", {"step": 10000}),
    ("step_1.5e4.pt", {"step": 15000}),
    ("1.5e4.pt", {"number": 15000}),
    ("step1B.pt", {"step": 1e9}),
    ("resnet50-step-500.pt", {"step": 500}),
    ("5epoch-1step.pt", {"epoch": 5, "step": 1}),
    ("step100b.pt", {"step": 100}),
    ("step=2.3M.pt", {"step": 2300000}),
    ("epoch=3-step=1e4.ckpt", {"epoch": 3, "step": 10000}),
    ("epoch_3-step_500.pt", {"epoch": 3, "step": 500}),
    ("epoch_3-step_10k-7b.pt", {"epoch": 3, "step": 10000}),
    ("run_3_step_500.pt", {"step": 500}),
    ("epoch_1k.pt", {"epoch": 1000}),
    ("epoch12b.pt", {"epoch": 12}),
    ("epoch=12b.ckpt", {"epoch": 12}),
    ("tokens-125B", {"number": 125e9}),
    ("tokens-900M", {"number": 900e6}),
    ("ckpt_1.5M.pt", {"number": 1500000}),
    ("1.5M.pt", {"number": 1500000}),
    ("v2-100k.pt", {"number": 100000}),
    ("vit_b16_300k.pt", {"number": 300000}),
    ("resnet50-10k.pt", {"number": 10000}),
    ("llama-7b-100.pt", {"number": 100}),
    ("gpt2-350m-400.pt", {"number": 400}),
    ("llama-7b.pt", {"number": 7}),  # no step, but not 7e9, which would be the last
    ("gpt2-350m-a.pt", {"number": 2}),
    ("qwen2.5-0.5B.pt", {"number": 5}),
    ("model_0.91.pt", {}),
    ("model-loss-2.31-400.pt", {"number": 400}),
    ("resnet_acc0.91.pt", {}),
    ("0.91_model.pt", {}),
    ("model-loss2.31.pt", {}),
    ("ckpt_1000_lr1e-3.pt", {"number": 1000}),
    ("model_9.1e-2.pt", {}),
    ("hash_ab3e-10.pt", {"number": 10}),
    ("hash-3e-1000.pt", {"number": 1000}),
    ("step_100_val_loss=0.5.pt", {"step": 100}),
    ("epoch_3_val_loss=0.5.pt", {"epoch": 3}),
    ("mystep1_loss=0.5.ckpt", {}),
    ("epoch=3-val_step1_acc=0.5.ckpt", {"epoch": 3}),
    ("ckpt_1000_lr=1e-3.pt", {"number": 1000}),
    ("epoch=3-top5.acc=0.5-f1_score=0.25.ckpt", {"epoch": 3}),
    ("resnet18.10.pth", {"number": 10}),
    ("0.1000.pt", {"number": 1000}),  # ema-pytorch's snapshots
]


@pytest.mark.parametrize(("name", "clock"), NAMES)
def test_what_names_tell(name: str, clock: dict[str, float]) -> None:
    assert named(Path(name)).clock == clock


def test_names_of_averages_and_copies() -> None:
    averages = ("avg_10.pt", "valid.acc.ave_10best.pth", "model-step=5-EMA.ckpt", "ema_0.9999_1.pt")
    assert all(named(Path(name)).averages for name in averages)
    others = (
        "wave-10.pt",
        "schema-1.pt",
        "swap_3.pt",
        "step-3.pt",
        "lastly-3.pt",
        "val_best=3-step=4.pt",
    )
    assert not any(named(Path(n)).averages or named(Path(n)).repeats for n in others)
    assert all(named(Path(name)).repeats for name in ("last-v1.ckpt", "model_best.pth.tar"))


class TestChoosing:
    @pytest.fixture
    def run(self, tmp_path: Path) -> Path:
        for step in range(2000, 22000, 2000):
            put(tmp_path / f"step-{step}.pt", weights(step))
        return tmp_path

    def steps(self, run: Path, **options: object) -> list[float]:
        return [file.at / 1000 for file in offline.choose(run, **options).files]  # type: ignore[arg-type]

    def test_steps(self, run: Path) -> None:
        assert self.steps(run, steps=(4000, 12000, 4000)) == [4, 8, 12]
        assert self.steps(run, steps=(None, 5000, None)) == [2, 4]
        assert self.steps(run, steps=(17000, None, None)) == [18, 20]
        assert self.steps(run, steps=(None, None, 8000)) == [2, 10, 18]
        assert self.steps(run, steps=(None, 10000, None), last=2) == [8, 10]
        assert len(self.steps(run)) == 10

    @pytest.mark.parametrize(
        "name", ["llama2-7b-step-{}.pt", "{}-steps-350m.pt", "gpt2-350m-{}.pt", "vit-300m-{}k.pt"]
    )
    def test_a_size_in_the_names_is_no_step(self, name: str, tmp_path: Path) -> None:
        for step in (200, 500, 700, 1100):
            put(tmp_path / name.format(step), weights(step))
        files = offline.choose(tmp_path, last=2).files
        assert [file.path.name for file in files] == [name.format(700), name.format(1100)]

    def test_a_step_that_is_missing_is_told(self, run: Path) -> None:
        with pytest.raises(ValueError, match="steps 3000, 5000 are missing"):
            self.steps(run, steps=(2000, 5000, 1000))
        with pytest.raises(ValueError, match="wanted steps from 2000 to 20000"):
            self.steps(run, steps=(50000, None, None))

    def test_a_window_holds_as_many_distances_as_it_is_long(self, run: Path) -> None:
        """Each checkpoint stands for the steps before it."""
        assert self.steps(run, window=10_000) == [12, 14, 16, 18, 20]
        assert self.steps(run, window=10_001) == [10, 12, 14, 16, 18, 20]
        options = ("--window-tokens", "40B", "--tokens-per-step", "4M", "--dry-run")
        done = command("average", run, *options)
        assert done.exit_code == 0 and done.stdout.count("0.2\n") == 5, done.output

    def test_too_few(self, run: Path) -> None:
        with pytest.raises(ValueError, match="last is 11, wanted at most 10"):
            self.steps(run, last=11)

    def test_options_that_exclude_each_other(self, run: Path) -> None:
        with pytest.raises(ValueError, match="last and window are given, wanted one"):
            self.steps(run, last=1, window=5)
        with pytest.raises(ValueError, match="best is 1 and by is None: give both"):
            self.steps(run, best=1)

    def test_a_run_needs_a_choice(self, run: Path) -> None:
        done = command("average", run, "--out", run / "mean.safetensors")
        assert done.exit_code == 2
        assert "a run with 10 checkpoints, step-2000.pt to step-20000.pt: say which" in done.stderr
        assert command("average", run, "--steps", ":", "--dry-run").exit_code == 0


class TestWhatCannotBeKnown:
    def test_a_window_of_steps_over_epochs(self, tmp_path: Path) -> None:
        for epoch in (1, 2):
            put(tmp_path / f"epoch={epoch}.ckpt", weights(1))
        with pytest.raises(
            ValueError, match=r"are ordered by epoch: choose by .*\(last=, --last\)"
        ):
            offline.choose(tmp_path, window=1000)

    def test_two_of_one_step(self, tmp_path: Path) -> None:
        for name in ("a-step=5.pt", "b-step=5.pt"):
            put(tmp_path / name, weights(1))
        with pytest.raises(ValueError, match=r"a-step=5.pt and .*b-step=5.pt are both of step 5"):
            offline.choose(tmp_path)

    def test_two_kinds_of_one_run(self, tmp_path: Path) -> None:
        """icefall saves by epochs and by batches; both count batches inside."""
        for name, step in (("epoch-1", 500), ("epoch-2", 1000), ("checkpoint-1000", 1000)):
            put(tmp_path / f"{name}.pt", {"model": weights(step), "batch_idx_train": step})
        with pytest.raises(
            ValueError, match=r"or those of one kind \(.*/checkpoint-\*\.pt, .*/epoch-"
        ):
            offline.choose(tmp_path)
        files = sorted(tmp_path.glob("epoch-*.pt"))
        assert [file.at for file in offline.choose(files, last=2).files] == [500, 1000]

    def test_two_runs(self, tmp_path: Path) -> None:
        for version in (0, 1):
            for step in (1, 2):
                put(tmp_path / f"version_{version}" / f"step={step}.ckpt", weights(1))
        with pytest.raises(
            ValueError, match=r"several runs \(.*version_0, .*version_1\): give one"
        ):
            offline.choose(tmp_path)

    def test_no_checkpoint(self, tmp_path: Path) -> None:
        text(tmp_path / "notes.txt", "none")
        with pytest.raises(ValueError, match="no checkpoints were found"):
            offline.choose(tmp_path)
        with pytest.raises(FileNotFoundError):
            offline.choose(tmp_path / "nowhere")

    def test_a_run_whose_folder_has_a_number(self, tmp_path: Path) -> None:
        """It is no checkpoint with several files."""
        folder = tmp_path / "run-January-01-2026"
        for name in ("checkpoint_100", "checkpoint_200", "best_model_200", "best_model"):
            put(
                folder / f"{name}.pth", {"model": weights(200), "step": 200 if "2" in name else 100}
            )
        names = [file.path.name for file in offline.choose(tmp_path, last=2).files]
        assert names == ["checkpoint_100.pth", "checkpoint_200.pth"]

    def test_a_run_within_a_folder(self, tmp_path: Path) -> None:
        """Composer's names have a rank, of which there is one."""
        for batch in (5, 10):
            put(
                tmp_path / "run-1-of-mine" / f"ep1-ba{batch}-rank0.pt",
                {"state": {"model": weights(batch)}},
            )
        assert [file.at for file in offline.choose(tmp_path).files] == [5, 10]

    def test_what_is_for_a_crash(self, tmp_path: Path) -> None:
        """As timm's `recovery-4-40.pth.tar`: its last number is a batch, and its step may be that of another."""
        for epoch in range(5):
            put(
                tmp_path / f"checkpoint-{epoch}.pth.tar",
                {"state_dict": weights(epoch), "epoch": epoch},
            )
        put(tmp_path / "recovery-4-40.pth.tar", {"state_dict": weights(4), "epoch": 4})
        chosen = offline.choose(tmp_path, last=2)
        assert [file.path.name for file in chosen.files] == [
            "checkpoint-3.pth.tar",
            "checkpoint-4.pth.tar",
        ]
        assert [path.name for path in chosen.aside] == ["recovery-4-40.pth.tar"]

    def test_numbers_that_count_several_things(self, tmp_path: Path) -> None:
        for name in ("a-1.pt", "a-2.pt", "b-1-30.pt"):
            put(tmp_path / name, weights(1))
        with pytest.raises(
            ValueError, match=r"several things, or several runs: .* of one kind \(.*a-\*\.pt, "
        ):
            offline.choose(tmp_path)

    @pytest.mark.parametrize(
        "files",
        [
            ("20251231-230000.pt", "20260102-100000.pt", "20260110-090000.pt"),
            ("ckpt_e1_b100.pt", "ckpt_e1_b300.pt", "ckpt_e2_b200.pt"),
            ("a-step-10.pt", "b-step-15.pt", "a-step-20.pt", "b-step-25.pt"),
            ("run1_step10.pt", "run2_step15.pt", "run1_step20.pt", "run2_step25.pt"),
            ("fold0_epoch1.pt", "fold1_epoch2.pt", "fold0_epoch3.pt"),
            ("seed=0-step=10.ckpt", "seed=1-step=15.ckpt", "seed=0-step=20.ckpt"),
            ("model_r0.97.pt", "model_r0.99.pt", "model_r1.00.pt"),
        ],
    )
    def test_names_whose_order_is_not_that_of_one_number(
        self, files: tuple[str, ...], tmp_path: Path
    ) -> None:
        for name in files:
            put(tmp_path / name, {"model": weights(1)})
        with pytest.raises(
            ValueError, match=r"several things, or several runs: list only the files"
        ):
            offline.choose(tmp_path, last=2)

    @pytest.mark.parametrize(
        "files",
        [
            ("a-step-10.pt", "a-step-20.pt", "b-step-30.pt"),
            ("a_epoch1.pt", "b_epoch2.pt", "a_epoch3.pt"),
            ("step_1000.pt", "step_2000_milestone.pt", "step_3000.pt"),
            ("step_1_kept.pt", "step_2.pt", "step_3_kept.pt", "step_4.pt"),
            ("model-ppl23-1000.pt", "model-ppl19-2000.pt", "model-ppl17-3000.pt"),
            ("model_bs128_100.pt", "model_bs64_200.pt"),
            ("epoch=0-step=10.ckpt", "epoch=1-step=20-v1.ckpt", "epoch=2-step=30.ckpt"),
            *(
                tuple(f"epoch={i}-val_loss={loss}.ckpt" for i, loss in enumerate(losses))
                for losses in (("0.5", "nan", "0.3"), ("nan", "0.5", "-inf", "0.3", "nan"))
            ),
            ("resnet18.10.pth", "resnet18.20.pth", "resnet18.100.pth"),
            ("gpt2.1000.pt", "gpt2.2000.pt"),
            ("net_v2.9.pt", "net_v2.10.pt"),
            ("cycle1.2.pt", "cycle1.3.pt"),
            *(
                (f"{epoch}_1.500.pt", f"{epoch}_2.1000.pt")
                for epoch in ("epoch", "Epochs", "ep", "net-ep")
            ),
            ("loss2.91_1.pt", "loss2.05_2.pt", "loss2.1_3.pt"),
            ("r91.3_100.pt", "r90.1_200.pt", "r93.1_300.pt"),
            ("30.01_1000.pt", "01.02_2000.pt"),
            ("model_1_loss2.05.pt", "model_2_loss2.15.pt", "model_3_loss1.93.pt"),
            ("step_2_loss=0.5.pt", "step_10_loss=0.6.pt", "step_20_loss=nan.pt"),
            ("ckpt_1e3.pt", "ckpt_5e3.pt", "ckpt_1e4.pt"),
            ("model-1e5.pt", "model-2e5.pt", "model-5e5.pt", "model-1e6.pt"),
            ("ckpt-1.5k.pt", "ckpt-2k.pt"),
            ("ckpt_900k.pt", "ckpt_950k.pt", "ckpt_1M.pt", "ckpt_1.05M.pt"),
            ("acc=91-1000.pt", "acc=90-2000.pt", "acc=95-3000.pt"),
            ("m-1000-loss=2.5e-05.pt", "m-2000-loss=1.9e-04.pt"),
            ("model_acc93_epoch1.pt", "model_acc91_epoch2.pt", "model_acc92_epoch3.pt"),
        ],
    )
    def test_names_of_one_run(self, files: tuple[str, ...], tmp_path: Path) -> None:
        for name in files:
            put(tmp_path / name, weights(1))
        assert [file.path.name for file in offline.choose(tmp_path).files] == [*files]

    def test_several_runs_that_are_listed_or_of_which_the_best_are_wanted(
        self, tmp_path: Path
    ) -> None:
        files = [tmp_path / f"{run}-step-{step}.pt" for step, run in enumerate("abab")]
        for loss, path in enumerate(files):
            put(path, {"model": weights(1), "loss": loss})
        assert [file.path for file in offline.choose(files[::-1], last=2).files] == files[2:]
        dates = [f"2025123{i}-{hour}0000.pt" for i, hour in enumerate((23, 10, 9))]
        for loss, name in enumerate(dates):
            put(tmp_path / "dates" / name, {"model": weights(loss), "loss": loss})
        listed = [tmp_path / "dates" / name for name in dates]
        assert len(offline.choose(listed, best=2, by="loss").files) == 2
        with pytest.raises(ValueError, match="may count several things"):
            offline.choose(listed, last=2)
        done = command("average", *listed, "--rule", "exponential(0.5)", "--dry-run")
        places = [done.stdout.index(name) for name in dates]
        assert places == sorted(places), done.stdout
        for run in (files, tmp_path):
            chosen = offline.choose(run, best=2, by="loss").files
            assert [file.path for file in chosen] == files[:2]

    @pytest.mark.parametrize(
        "name", ["model_{}.pt", "resnet_acc{}.pt", "{}_model.pt", "net_{}/w.pt"]
    )
    def test_a_metric_in_a_name_is_no_count(self, name: str, tmp_path: Path) -> None:
        for epoch, loss in enumerate(("0.91", "0.95", "0.93")):
            for run, inside in (("bare", {}), ("inside", {"epoch": epoch})):
                put(tmp_path / run / name.format(loss), {"model": weights(1)} | inside)
        with pytest.raises(ValueError, match="the order of its checkpoints is not known"):
            offline.choose(tmp_path / "bare", last=2)
        numbered = tmp_path / "inside"
        files = offline.choose(numbered, last=2).files
        wanted = [numbered / Path(name.format(loss)).parts[0] for loss in ("0.95", "0.93")]
        assert [file.path for file in files] == wanted

    def test_averages_and_optimizers_beside(self, tmp_path: Path) -> None:
        """As guided-diffusion saves. Averages that are listed alone are what is wanted."""
        for step in (10_000, 20_000):
            put(tmp_path / f"model{step:06d}.pt", weights(step))
            put(tmp_path / f"ema_0.9999_{step:06d}.pt", weights(step))
            put(tmp_path / f"opt{step:06d}.pt", {"state": {}})
        names = [file.path.name for file in offline.choose(tmp_path).files]
        assert names == ["model010000.pt", "model020000.pt"]
        chosen = offline.choose(sorted(tmp_path.glob("ema_*.pt")), last=1)
        assert chosen.files[0].path.name == "ema_0.9999_020000.pt"

    def test_no_folder_with_the_file(self, tmp_path: Path) -> None:
        put(tmp_path / "save" / "CKPT+1" / "model.ckpt", weights(1))
        with pytest.raises(ValueError, match=r"no folder of a checkpoint in it has asr\.ckpt"):
            offline.choose(tmp_path, file="asr.ckpt")

    def test_weights_beside_a_file_of_the_rest(self, tmp_path: Path) -> None:
        """As OpenNMT saves: the settings in `m_step_5.pt`, the weights in `m_step_5.safetensors`."""
        for step in (5, 10):
            put(tmp_path / f"m_step_{step}.pt", {"opt": {}, "vocab": {}})
            save_file(weights(step), tmp_path / f"m_step_{step}.safetensors")
        chosen = offline.choose(tmp_path)
        assert [file.path.suffix for file in chosen.files] == [".safetensors"] * 2
        assert "its weights lie in m_step_5.safetensors" in chosen.aside.values()

    def test_no_common_count(self, tmp_path: Path) -> None:
        put(tmp_path / "step-5.pt", weights(1))
        put(tmp_path / "epoch-1.pt", weights(1))
        with pytest.raises(ValueError, match="the order of its checkpoints is not known"):
            offline.choose(tmp_path)

    def test_parts_of_a_model(self, tmp_path: Path) -> None:
        for rank in (0, 1):
            put(tmp_path / "global_step5" / f"mp_rank_0{rank}_model_states.pt", weights(1))
        with pytest.raises(
            ValueError, match=r"parts of one model .* \(--file, .* let their trainer merge them"
        ):
            offline.choose(tmp_path)

    @pytest.mark.parametrize(
        "name", ["consolidated.0{}.pth", "model/pp_00/tp_0{}/sdp_00.pt", "mp_rank_0{}/m.pt"]
    )
    def test_parts_are_averaged_one_by_one(self, tmp_path: Path, name: str) -> None:
        """A part of the mean is the mean of the parts."""
        for rank, step in product((0, 1), (1, 3)):
            put(tmp_path / f"step_{step}" / name.format(rank), {"model": weights(step + 10 * rank)})
        for rank in (0, 1):
            like, out = tmp_path / "step_3" / name.format(rank), tmp_path / "made" / f"{rank}.pt"
            options = ("--file", name.format(rank), "--like", like, "--out", out)
            assert command("average", tmp_path, "--last", 2, *options).exit_code == 0
            assert torch.load(out)["model"]["w"][0] == 2 + 10 * rank

    def test_files_of_one_rank(self, tmp_path: Path) -> None:
        """The number of the rank is not the step's."""
        for rank, step in product((0, 1), (200, 1000)):
            put(tmp_path / f"checkpoint_1_{step}-shard{rank}.pt", weights(step))
        for rank in (0, 1):
            chosen = offline.choose(sorted(tmp_path.glob(f"*shard{rank}.pt")))
            assert [file.at for file in chosen.files] == [200, 1000]
        with pytest.raises(
            ValueError, match="average the files of each rank by a command of its own"
        ):
            offline.choose(tmp_path)

    def test_parts_by_ranks(self, tmp_path: Path) -> None:
        for rank in (0, 1):
            put(tmp_path / f"ep1-ba5-rank{rank}.pt", weights(1))
        with pytest.raises(ValueError, match="there are parts of it by other ranks"):
            offline.choose(tmp_path)

    def test_several_files_in_each_folder(self, tmp_path: Path) -> None:
        for day in (1, 2):
            for name in ("asr", "lm"):
                put(tmp_path / f"CKPT+{day}" / f"{name}.ckpt", weights(day))
        with pytest.raises(
            ValueError, match=r"it holds asr.ckpt, lm.ckpt: read the file with the weights"
        ):
            offline.choose(tmp_path)
        chosen = offline.choose(tmp_path, file="lm.ckpt").files
        assert [(file.path.name, file.at) for file in chosen] == [("lm.ckpt", 1), ("lm.ckpt", 2)]

    def test_several_models_in_each_folder(self, tmp_path: Path) -> None:
        """As the training scripts of diffusers leave them."""
        for step in (500, 1000):
            for name in ("unet", "unet_ema"):
                folder = tmp_path / f"checkpoint-{step}" / name
                folder.mkdir(parents=True)
                save_file(weights(step), folder / "diffusion_pytorch_model.safetensors")
                text(folder / "config.json", "{}")
            put(tmp_path / f"checkpoint-{step}" / "optimizer.bin", {})
        with pytest.raises(
            ValueError, match="it holds unet, unet_ema: read the file with the weights"
        ):
            offline.choose(tmp_path)
        chosen = offline.choose(tmp_path, last=1, file="unet").files
        assert [file.path for file in chosen] == [tmp_path / "checkpoint-1000" / "unet"]
        out = tmp_path / "new"
        like = ("--like", tmp_path / "checkpoint-500" / "unet", "--out", out)
        done = command("average", tmp_path, "--last", 2, "--file", "unet", *like)
        assert done.exit_code == 0, done.output
        assert load_file(out / "diffusion_pytorch_model.safetensors")["w"].tolist() == [750] * 3
        assert (out / "config.json").exists()

    def test_an_interrupted_save_is_left_aside(self, tmp_path: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            megatron(tmp_path)
        aside = offline.choose(tmp_path).aside
        assert {path.name for path in aside} == {"iter_0002000"}

    def test_what_is_left_aside_is_told(self, tmp_path: Path) -> None:
        wenet(tmp_path)
        aside = {path.name for path in offline.choose(tmp_path).aside}
        assert aside == {"avg_5.pt", "final.pt"}
        done = command("average", tmp_path, "--last", 2, "--dry-run")
        assert "note: not used: avg_5.pt (its name says that it is an average)" in done.stderr


class TestMetrics:
    def test_what_lightning_remembers_is_exact_where_names_are_rounded(
        self, tmp_path: Path
    ) -> None:
        """Both names say 0.25; of equal ones the later would be taken."""
        lightning(tmp_path)
        (file,) = offline.choose(tmp_path, best=1, by="val_loss").files
        assert file.at == 64 and file.quality == pytest.approx(0.2499)

    def test_an_unknown_one(self, tmp_path: Path) -> None:
        lightning(tmp_path)
        with pytest.raises(ValueError, match=r"no such metric: they have .*val_loss"):
            offline.choose(tmp_path, best=1, by="val_accuracy")

    def test_one_that_may_be_several(self, tmp_path: Path) -> None:
        put(
            tmp_path / "step-1.pt",
            {"model": weights(1), "train": {"loss": 1.0}, "valid": {"loss": 2.0}},
        )
        with pytest.raises(ValueError, match=r"fits train.loss and valid.loss: give one"):
            offline.choose(tmp_path, best=1, by="loss")

    def test_a_direction_that_is_not_known(self, tmp_path: Path) -> None:
        put(tmp_path / "step=1-score=3.pt", weights(1))
        put(tmp_path / "step=2-score=4.pt", weights(1))
        with pytest.raises(ValueError, match="give better"):
            offline.choose(tmp_path, best=1, by="score")
        for better, step in (("lower", 1), ("higher", 2)):
            (file,) = offline.choose(tmp_path, best=1, by="score", better=better).files  # type: ignore[arg-type]
            assert file.at == step

    def test_one_without_a_value_is_left_aside(self, tmp_path: Path) -> None:
        for step, loss in ((1, "0.1"), (2, "nan"), (3, "0.3"), (4, "")):
            put(tmp_path / f"step-{step}.pt", weights(step))
            with (tmp_path / "log.csv").open("a") as file:
                file.write(f"step,loss\n{step},{loss}\n" if step == 1 else f"{step},{loss}\n")
        choice = offline.choose(tmp_path, best=2, by="loss")
        assert [file.at for file in choice.files] == [1, 3]
        assert {path.name for path in choice.aside} == {"step-2.pt", "step-4.pt"}
        with pytest.raises(ValueError, match="best is 3, wanted at most 2"):
            offline.choose(tmp_path, best=3, by="loss")

    @pytest.mark.parametrize(
        ("iterations", "every", "by_epoch"),
        [(1, 1, True), *product((3, 8, 10), (1, 7, 50), (True, False))],
    )
    def test_what_mmengine_counts(
        self, iterations: int, every: int, by_epoch: bool, tmp_path: Path
    ) -> None:
        """Where no row of training tells it, the steps of the checkpoints do; epoch 8 is no step 8."""
        mmengine(tmp_path, iterations=iterations, every=every, by_epoch=by_epoch, epochs=10)
        choice = offline.choose(tmp_path, best=3, by="coco/bbox_mAP")
        assert [torch.load(file.path)["meta"]["epoch"] for file in choice.files] == [2, 3, 4]
        assert [path.name for path in choice.aside] == ["best_coco_bbox_mAP_epoch_3.pth"]

    def test_rows_of_trainers_that_count_from_0(self, tmp_path: Path) -> None:
        """Lightning's CSV has the validation after 64 steps at step 63, and training's loss anywhere."""
        for step in (64, 128):
            put(tmp_path / "checkpoints" / f"step={step}.ckpt", weights(step))
        rows = "step,train_loss,val_loss\n63,,0.5\n64,2.0,\n127,,0.6\n130,1.0,\n"
        text(tmp_path / "metrics.csv", rows)
        for run in (tmp_path, tmp_path / "checkpoints"):
            (file,) = offline.choose(run, best=1, by="val_loss").files
            assert (file.at, file.quality) == (64, 0.5)

    @pytest.mark.parametrize(
        ("name", "files", "unit", "rows"),
        [
            ("epoch{}.pt", (0, 1, 2), "epoch", (1, 2, 3)),
            ("epoch{}.pt", (1, 2, 3), "epoch", (0, 1, 2)),
            ("{}.pt", (1, 2, 3), "step", (0, 1, 2)),
            ("{}.pt", (8, 9), "epoch", tuple(range(9))),
        ],
    )
    def test_what_is_counted_otherwise(
        self, name: str, files: tuple[int, ...], unit: str, rows: tuple[int, ...], tmp_path: Path
    ) -> None:
        for count in files:
            put(tmp_path / name.format(count), weights(count))
        text(tmp_path / "results.csv", f"{unit},loss\n" + "".join(f"{n},{n}\n" for n in rows))
        wanted = f"count from {rows[0]} and the checkpoints from {1 - rows[0]}"
        with pytest.raises(ValueError, match=wanted):
            offline.choose(tmp_path, best=1, by="loss")

    @pytest.mark.parametrize(
        ("name", "board", "tag", "by", "counts"),
        [
            ("epoch={0}-step={1}.ckpt", ".", "val_loss", "val_loss", (63, 127, 191)),
            ("checkpoints/step={1}.ckpt", ".", "val/loss", "val.loss", (63, 127, 191)),
            ("checkpoint-{1}", "runs/Nov30_10-00-00_host", "eval/loss", "eval_loss", (64, 128, 192)),
            ("{0}epoch.pth", "tensorboard/valid", "loss", "valid.loss", (1, 2, 3)),
            ("checkpoint_{0}.pt", "logs", "val/loss", "val/loss", (1, 2, 3)),
        ],
    )  # fmt: skip
    def test_what_tensorboard_has(
        self, name: str, board: str, tag: str, by: str, counts: tuple[int, ...], tmp_path: Path
    ) -> None:
        """Of the steps, or of the epochs where the checkpoints have no steps."""
        summary = pytest.importorskip("torch.utils.tensorboard")
        with summary.SummaryWriter(tmp_path / board) as writer:
            for epoch, loss in ((1, 0.5), (2, 0.25), (3, 0.75)):
                step = 64 * epoch
                put(tmp_path / name.format(epoch, step) / "model.pt" if name == "checkpoint-{1}"
                    else tmp_path / name.format(epoch, step), weights(epoch))  # fmt: skip
                writer.add_scalar(tag, loss, counts[epoch - 1])
                writer.add_scalar("train/loss" if tag != "loss" else "lr", 0.1, step - 30)
                writer.add_histogram("weights", torch.ones(3), step)
        (file,) = offline.choose(tmp_path, best=1, by=by).files
        assert file.quality == 0.25 and "2" in str(file.path.relative_to(tmp_path))
        with pytest.raises(ValueError, match="no such metric"):
            offline.choose(tmp_path, best=1, by="accuracy")

    @pytest.mark.parametrize(
        ("folders", "by", "qualities"),
        [
            (("runs/Nov30_10-00-00_h", "runs/Dec01_10-00-00_h"), "loss", (0.5, 0.25, 0.125)),
            (("logs/version_9", "logs/version_10"), "loss", (0.5, 0.25, 0.125)),
            (("out/2024-11-30", "out/2024-12-01"), "loss", (0.5, 0.25, 0.125)),
            (("logs/20241130_100000", "logs/20241201_100000"), "loss", (0.5, 0.25, 0.125)),
            ((".", "."), "loss", (0.5, 0.25, 0.125)),
            (("logs/fold1", "logs/fold2"), "fold1/loss", (0.5, 1.0, None)),
            (("logs/valid1", "logs/valid2"), "valid2/loss", (None, 0.25, 0.125)),
            (("logs/seed123456", "logs/seed123457"), "seed123457/loss", (None, 0.25, 0.125)),
        ],
    )
    def test_what_two_files_of_events_have(
        self,
        folders: tuple[str, str],
        by: str,
        qualities: tuple[float | None, ...],
        tmp_path: Path,
    ) -> None:
        """The later of a resumed run counts; what lies in a folder of another kind is another series."""
        summary = pytest.importorskip("torch.utils.tensorboard")
        for folder, suffix, values in (
            (folders[0], "b", {1: 0.5, 2: 1.0}),
            (folders[1], "a", {2: 0.25, 3: 0.125}),
        ):
            with summary.SummaryWriter(tmp_path / folder, filename_suffix=suffix) as writer:
                for step, loss in values.items():
                    writer.add_scalar("loss", loss, step, walltime=1e9 + step - 100 * ord(suffix))
        for step in (1, 2, 3):
            put(tmp_path / f"step={step}.pt", weights(step))
        choice = offline.choose(tmp_path, best=sum(q is not None for q in qualities), by=by)
        found = {file.at: file.quality for file in choice.files}
        assert found == {n: q for n, q in zip((1, 2, 3), qualities, strict=True) if q is not None}

    def test_only_the_first_event_of_a_tag_says_that_it_is_a_scalar(self, tmp_path: Path) -> None:
        proto = pytest.importorskip("tensorboard.compat.proto.summary_pb2")
        summary = pytest.importorskip("torch.utils.tensorboard")
        scalar = proto.SummaryMetadata(plugin_data={"plugin_name": "scalars"})
        with summary.SummaryWriter(tmp_path) as writer:
            for step, loss in ((1, 0.5), (2, 0.25), (3, 0.75)):
                put(tmp_path / f"step={step}.pt", weights(step))
                value = proto.Summary.Value(
                    tag="loss",
                    tensor={"dtype": 1, "float_val": [loss]},
                    metadata=scalar if step == 1 else None,
                )
                writer.file_writer.add_summary(proto.Summary(value=[value]), step)
        (file,) = offline.choose(tmp_path, best=1, by="loss").files
        assert (file.at, file.quality) == (2, 0.25)

    def test_without_tensorboard(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is asked for only if nothing else has the metric."""
        put(tmp_path / "step=1-loss=0.5.pt", weights(1))
        text(tmp_path / "events.out.tfevents.1.host", "")
        monkeypatch.setitem(sys.modules, "tensorboard", None)
        for name in [name for name in sys.modules if name.startswith("tensorboard.")]:
            monkeypatch.delitem(sys.modules, name)
        offline.choose(tmp_path, best=1, by="loss")
        with pytest.raises(ModuleNotFoundError, match=r"tfevents.* not installed: install tensor"):
            offline.choose(tmp_path, best=1, by="accuracy")

    def test_equal_ones_the_later(self, tmp_path: Path) -> None:
        for step in (1, 2, 3):
            put(tmp_path / f"step={step}-loss=0.5.pt", weights(step))
        assert [file.at for file in offline.choose(tmp_path, best=2, by="loss").files] == [2, 3]


class TestDryRun:
    def test_it_writes_nothing_and_tells_files_coefficients_bytes(self, tmp_path: Path) -> None:
        for step in (900, 1000, 1100):
            put(tmp_path / f"step-{step}.pt", {"w": torch.ones(1000)})
        before = sorted(tmp_path.iterdir())
        out = tmp_path / "out.safetensors"
        done = command("average", tmp_path, "--last", 2, "--rule", "exponential(0.75)",
                       "--dry-run", "--out", out)  # fmt: skip
        lines = done.stdout.splitlines()
        assert lines[1].split() == [str(tmp_path / "step-1000.pt"), "0.75"]
        assert lines[2].split() == [str(tmp_path / "step-1100.pt"), "0.25"]
        assert lines[3].startswith("1 tensors of 2 files: 8 kB to read, 4 kB to write, about 0")
        assert sorted(tmp_path.iterdir()) == before


class TestVerify:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_it_finds_a_wrong_element_and_nothing_else(
        self, dtype: torch.dtype, tmp_path: Path
    ) -> None:
        torch.manual_seed(0)
        files = [tmp_path / f"{i}.pt" for i in range(5)]
        for file in files:
            put(
                file,
                {"a": torch.randn(300, 1000).to(dtype), "n": torch.tensor(3), "e": torch.ones(0)},
            )
        made = offline.average(files, [-0.5, 0.5, 0.5, 0.25, 0.25])
        out = tmp_path / "out.safetensors"
        made.write(out)
        from polyak import checkpoints

        assert offline.verify(made, checkpoints.read(out).weights()) == 3
        wrong = {name: tensor.clone() for name, tensor in load_file(out).items()}
        for place in (0, 150_000, 299_999):
            changed = {**wrong, "a": wrong["a"].clone()}
            changed["a"].view(-1)[place] *= 1.02
            put(tmp_path / "wrong.pt", changed)
            with pytest.raises(ValueError, match=r"a: .* was written, and the direct sum is"):
                offline.verify(made, checkpoints.read(tmp_path / "wrong.pt").weights())
        put(tmp_path / "wrong.pt", {**wrong, "n": torch.tensor(4)})
        with pytest.raises(ValueError, match=r"n: 4.0 was written"):
            offline.verify(made, checkpoints.read(tmp_path / "wrong.pt").weights())


def test_a_run_is_synthesized_and_swept_as_its_checkpoints_are(tmp_path: Path) -> None:
    """By their steps; where epochs count from 0, by their place in the order."""
    for step in (500, 1000, 1500, 2000):
        put(tmp_path / "steps" / f"step-{step}.pt", {"w": torch.full((3,), float(step))})
        put(
            tmp_path / "epochs" / f"epoch-{step // 500 - 1}.pt",
            {"w": torch.full((3,), float(step))},
        )
    for run, times in (("steps", (500, 1000, 1500, 2000)), ("epochs", (1, 2, 3, 4))):
        paths = [file.path for file in offline.choose(tmp_path / run).files]
        mapping = dict(zip(times, paths, strict=True))
        wanted = offline.synthesize(None, "uniform()", checkpoints=mapping, max_error=9)
        made = offline.synthesize(tmp_path / run, "uniform()", max_error=9)
        assert tuple(slot.time for slot in made.run.slots) == times
        assert torch.equal(made.average()["w"], wanted.average()["w"])


def test_what_is_copied_in_a_run_is_the_last_checkpoint_s(tmp_path: Path) -> None:
    """As in `average`: quantised tensors have no mean, and a table may be taken as it is."""
    for step in (100, 200, 300):
        packed = {
            "q.weight": torch.full((4, 4), step % 100, dtype=torch.int8),
            "q.scale": torch.ones(4),
        }
        put(tmp_path / f"step-{step}.pt", {"w": torch.full((3,), float(step)), "table": torch.full((2,), float(step)), **packed})  # fmt: skip
    with pytest.raises(ValueError, match=r"q.weight .* quantised"):
        offline.synthesize(tmp_path, "uniform()", max_error=9).weights()
    copy = ["q.*", "table"]
    made = offline.synthesize(tmp_path, "uniform()", max_error=9, copy=copy).average()
    assert made["table"].eq(300).all() and made["w"].lt(300).all()

    seen: list[dict[str, torch.Tensor]] = []

    def judge(weights: dict[str, torch.Tensor]) -> float:
        seen.append(weights)
        return 0.0

    offline.sweep(tmp_path, ["uniform()"], judge, windows=[2], max_error=9, copy=copy)
    assert [w["table"][0].item() for w in seen] == [100, 200, 300, 300, 300]
    assert seen[-1]["w"].eq(250).all() and torch.equal(seen[-2]["w"], made["w"])
    with pytest.raises(ValueError, match=r"copy is 'nothing'"):
        offline.synthesize(tmp_path, "uniform()", max_error=9, copy=[*copy, "nothing"]).weights()
    done = command("synthesize", tmp_path, "--rule", "uniform()", "--max-error", 9, "--copy", "q.*",
                   "--copy", "table", "--out", tmp_path / "out.safetensors")  # fmt: skip
    assert done.exit_code == 0 and load_file(tmp_path / "out.safetensors")["table"].eq(300).all()


def test_snapshots_copy_what_their_averager_copied(tmp_path: Path) -> None:
    averager = Averager({"w": torch.ones(2)}, "uniform()")
    recorder = Recorder(averager, tmp_path, every=1)
    averager.update()
    recorder.update()
    with pytest.raises(ValueError, match=r"copy \(--copy\) is \['w'\], wanted none for snapshots"):
        offline.synthesize(tmp_path, "uniform()", copy=["w"])


@pytest.mark.parametrize(
    ("leads", "why"),
    [
        ("nowhere.pt", "it is a link that leads nowhere"),
        ("step-30.pt", "it is a link that leads nowhere"),
        ("../.git/annex/objects/0a/1b/key/key", "it is a link of git-annex: fetch its content (git annex get)"),
        ("", "DVC keeps it: fetch it (dvc pull)"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_is_elsewhere_is_named(tmp_path: Path, leads: str, why: str) -> None:
    for step in (10, 20):
        torch.save({"w": torch.ones(2)}, tmp_path / f"step-{step}.pt")
    if leads:
        (tmp_path / "step-30.pt").symlink_to(tmp_path / leads)
    else:
        (tmp_path / "step-30.pt.dvc").write_text("outs:\n")
    choice = offline.choose(tmp_path, last=2)
    assert [file.at for file in choice.files] == [10, 20]
    assert choice.aside == {tmp_path / "step-30.pt": why}
    with pytest.raises(FileNotFoundError, match=re.escape(f"step-30.pt: {why}")):
        offline.choose([tmp_path / "step-30.pt"], last=1)


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    """A save may have been interrupted; a folder that holds a run is another thing."""
    for step in (10, 20):
        (tmp_path / "run" / f"checkpoint-{step}").mkdir(parents=True)
        save_file(
            {"w": torch.ones(2)}, tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors"
        )
    empty = tmp_path / "run" / "checkpoint-30"
    empty.mkdir()
    choice = offline.choose(tmp_path, last=2)
    assert [file.at for file in choice.files] == [10, 20]
    assert list(choice.aside) == [empty] and "holds no weights" in choice.aside[empty]


def test_a_missing_run_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*nope"):
        offline.choose([tmp_path / "nope"], last=1)


def test_missing_steps_are_counted(tmp_path: Path) -> None:
    for step in (10, 20):
        torch.save({"w": torch.ones(2)}, tmp_path / f"step-{step}.pt")
    with pytest.raises(ValueError, match=r"steps 30, .*, 100 and 2 more are missing"):
        offline.choose(tmp_path, steps=(10, 120, 10))


def test_a_folder_of_model_and_optimizer_is_the_weights(tmp_path: Path) -> None:
    """As OLMo-core writes it, with the states of ranks beside."""
    for step in (10, 20):
        within = tmp_path / f"step{step}" / "model_and_optim"
        within.mkdir(parents=True)
        save_file({"w": torch.ones(2)}, within / "model.safetensors")
        (tmp_path / f"step{step}" / "train").mkdir()
        torch.save({"step": step}, tmp_path / f"step{step}" / "train" / "rank0.pt")
        torch.save({"w": torch.ones(2)}, tmp_path / f"step{step}" / "ema.pt")
    choice = offline.choose(tmp_path, last=2)
    assert [file.path.name for file in choice.files] == ["step10", "step20"]
    out = tmp_path / "mean.safetensors"
    done = command("average", tmp_path, "--last", 2, "--out", out)
    assert "not used: ema.pt, train/rank0.pt" in done.stderr


def test_a_run_of_fairseq2(tmp_path: Path) -> None:
    """The parts of a model lie three folders below each step; a score is a file with one number."""
    fairseq2(tmp_path)
    choice = offline.choose(tmp_path, best=2, by="score", better="higher")
    assert [(file.at, file.quality) for file in choice.files] == [(1000, -0.2), (1500, -0.4)]
    assert float(offline.average(choice.files)["w"][0]) == 1250
    told = {path.name: why for path, why in choice.aside.items()}
    assert told == {"step_2000.tmp": "its save was interrupted, or is not done"}
    with pytest.raises(ValueError, match="whether a lower or a higher score is better"):
        offline.choose(tmp_path, best=2, by="score")


def test_the_folder_of_a_run_is_not_its_last_weights(tmp_path: Path) -> None:
    """The trainer left them in it, beside its checkpoints."""
    transformers_trainer(tmp_path)
    refused = command("average", tmp_path, "--out", tmp_path / "it.safetensors")
    assert refused.exit_code == 2
    assert "is the folder of a run with 3 checkpoints" in refused.stderr


TRAIN, VALID = ("step,loss\n10,1\n20,2\n30,3\n", "step,loss\n10,3\n20,2\n30,9\n")
EPOCHS = "epoch,loss\n1,9\n2,8\n3,1\n"


def lines(records: str, *losses: float) -> str:
    """A record for each step and loss, with the keys of `records`, one of them for each step or one for all."""
    each = records.split("|") if "|" in records else [records] * len(losses)
    return "".join(
        f'{{"step": {10 * i}, {own}"loss": {loss}}}\n'
        for i, (own, loss) in enumerate(zip(each, losses, strict=True), 1)
    )


SPLIT = lines('"split": "valid", |"split": "valid", |"split": "train", ', 9, 2, 1)
BOTH = lines('"KEY": "train", ', 1, 2, 3) + lines('"KEY": "valid", ', 3, 2, 9)
PHASES = lines('"phase": "a", "split": "valid", |"phase": "b", "split": "valid", ', 3, 2) + lines(
    '"split": "train", ', 1, 5
)
STAGES = BOTH.replace('"KEY"', '"mode": "finetune", "stage"')
TWICE = {"log.json": lines("", 1, 2, 3), "log.jsonl": lines("", 3, 2, 1)}
NESTED = "".join(
    f'{{"mode": "val", "at": {{"step": {s}}}, "loss": {n}}}\n' for s, n in ((10, 2), (20, 1))
)
DEEP = lines(
    '"split": "v", "a": {"b": {"c": {"wer": 3}}}, |"split": "v", "a": {"b": {"c": {"wer": 2}}}, ',
    1,
    1,
)
CAPITAL = (
    "step,Split,loss\n10,train,1\n10,valid,3\n20,train,2\n20,valid,2\n30,train,3\n30,valid,9\n"
)
UNITS = {"train.csv": "step,epoch,loss\n10,1,1\n20,2,2\n30,3,3\n", "dev.csv": EPOCHS}
BETWEEN = {"train.csv": "step,loss\n9,1\n19,2\n29,3\n", "dev.csv": VALID}
RESUMED = {"log_9.csv": "step,loss\n10,3\n20,2.01\n", "log_10.csv": "step,loss\n20,3.5\n30,3.2\n"}
CLOSE = {"train.csv": "step,acc\n10,.9995\n20,.9994\n", "dev.csv": "step,acc\n10,.9994\n20,.9996\n"}
DATA_SETS = lines('"dataset": "a", "split": "test", ', 1, 2, 3) + lines(
    '"dataset": "b", "split": "test", ', 3, 2, 9
)
TABLES: dict[str, tuple[dict[str, str], str, float | None]] = {
    # the files, the metric as typed, the step of the best checkpoint; None: the metric is one of two
    "two files": ({"train.csv": TRAIN, "dev.csv": VALID}, "dev.loss", 20),
    "the other file": ({"train.csv": TRAIN, "dev.csv": VALID}, "train.loss", 10),
    "neither file": ({"train.csv": TRAIN, "dev.csv": VALID}, "loss", None),
    "files of two units": (UNITS, "loss", None),
    "files of two units, named": (UNITS, "dev.loss", 30),
    "files of steps between each other": (BETWEEN, "loss", None),
    "files of steps between each other, named": (BETWEEN, "dev.loss", 20),
    "files of other steps": ({"train.csv": "step,loss\n10,1\n30,3\n", "dev.csv": "step,loss\n20,5\n"}, "loss", None),
    "files that are nearly equal": (CLOSE, "acc", None),
    "files with one stem": (TWICE, "loss", None),
    "files with one stem, named": (TWICE, "log.jsonl.loss", 30),
    "a log.txt beside a table": ({"log.json": lines("", 1, 2, 3), "log.txt": lines("", 3, 2, 1)}, "loss", 10),
    "a log.txt of another metric": ({"metrics.csv": "step,acc\n10,1\n", "log.txt": lines("", 3, 2, 1)}, "loss", 30),
    "files of ranks": ({"rank0.csv": TRAIN, "rank1.csv": VALID}, "loss", None),
    "a rounded copy": ({"it.csv": "step,loss\n10,1.23456\n20,1.13456\n", "log.jsonl": lines("", 1.2346, 1.1346)}, "loss", 20),
    "two files that continue": ({"1.csv": "step,loss\n10,3\n20,2\n", "2.csv": "step,loss\n20,2\n30,4\n"}, "loss", 20),
    "files of a resumed run": (RESUMED, "loss", 10),
    "a file's name": ({"valid.csv": VALID}, "valid.loss", 20),
    "a file's name, with a copy": ({"valid.csv": VALID, "train.csv": VALID}, "valid.loss", 20),
    "records of several splits": ({"log.jsonl": SPLIT}, "valid.loss", 20),
    "records of either split": ({"log.jsonl": SPLIT}, "loss", None),
    "records of one split": ({"log.jsonl": lines('"split": "valid", ', 3, 1, 2)}, "valid.loss", 20),
    "records of phases": ({"log.jsonl": lines('"phase": "warmup", |"phase": "main", |"phase": "main", ', 3, 2, 1)}, "loss", 30),
    "records of trainings": ({"log.jsonl": lines('"stage": "pre-training", |"stage": "fine-tuning", ', 3, 2)}, "loss", 20),
    "phases in a file of a split": ({"valid.jsonl": lines('"phase": "warmup", |"phase": "main", ', 3, 2)}, "valid.main.loss", 20),
    "one metric of phases in a file of a split": ({"valid.jsonl": lines('"phase": "warmup", |"phase": "main", ', 3, 2)}, "loss", 20),
    "a split with a slash": ({"log.jsonl": lines('"subset": "mmlu/anatomy", ', 3, 1, 2)}, "loss", 20),
    "a split with a dot": ({"log.csv": "step,split,loss\n10,dev.clean,3\n20,dev.clean,1\n"}, "loss", 20),
    "phases of a split": ({"log.jsonl": PHASES}, "valid.loss", 20),
    "a stage of a mode": ({"log.jsonl": STAGES}, "loss", None),
    "a stage of a mode, named": ({"log.jsonl": STAGES}, "valid.loss", 20),
    "a key dataset": ({"log.jsonl": BOTH.replace("KEY", "dataset")}, "loss", None),
    "data sets of one split": ({"log.jsonl": DATA_SETS}, "loss", None),
    "data sets of one split, named": ({"log.jsonl": DATA_SETS}, "b_test.loss", 20),
    "a column of splits": ({"log.csv": "step,loss,split\n10,9,valid\n20,2,valid\n30,1,train\n"}, "valid.loss", 20),
    "a column with a capital": ({"log.csv": CAPITAL}, "loss", None),
    "a column with a capital, named": ({"log.csv": CAPITAL}, "valid.loss", 20),
    "a nested clock beside a split": ({"log.jsonl": NESTED}, "loss", 20),
    "a deep metric beside a split": ({"log.jsonl": DEEP}, "wer", 20),
    "a mark of the byte order": ({"metrics.csv": f"\ufeff{VALID}"}, "loss", 20),
    "a last line that is cut": ({"log.jsonl": f'{lines("", 3, 2)}{{"step": 30, "lo'}, "loss", 20),
    "a last cell that is cut": ({"log.csv": "step,loss\n10,3\n20,2\n30,1"}, "loss", 20),
    "a last step that is cut": ({"log.csv": "step,loss\n10,3\n20,2\n3"}, "loss", 20),
    "log.txt": ({"log.txt": lines("", 3, 2)}, "loss", 20),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "metrics"),
    [
        ("epoch=3-model1_loss=0.5-model2_loss=0.7.ckpt", {"model1_loss": 0.5, "model2_loss": 0.7}),
        ("epoch=3-loss_model1=0.5.ckpt", {"loss_model1": 0.5}),
        ("epoch=3-val_step1_acc=0.5.ckpt", {"val_step1_acc": 0.5}),
        ("mystep1_loss=0.5.ckpt", {"mystep1_loss": 0.5}),
        ("step_100_loss=0.5.ckpt", {"loss": 0.5}),
    ],
)
def test_a_metric_in_a_name_keeps_its_whole_key(name: str, metrics: dict[str, float]) -> None:
    assert named(Path(name)).metrics == metrics


@pytest.mark.parametrize("kind", TABLES)
def test_tables_that_people_have(kind: str, tmp_path: Path) -> None:
    files, by, step = TABLES[kind]
    for count in (10, 20, 30):
        put(tmp_path / f"step-{count}.pt", {"model": weights(count), "epoch": count // 10})
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    if step is None:
        with pytest.raises(
            ValueError, match=rf"is '{by}', which fits [\w.]+ and [\w.]+: give one of"
        ):
            offline.choose(tmp_path, best=1, by=by)
        return
    (best,) = offline.choose(tmp_path, best=1, by=by).files
    assert best.at == step
