"""Folders of runs as trainers leave them: one function makes each, by the layout in its source."""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict_saver import save

from alone import ALONE


def weights(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((3,), float(value)), "count": torch.tensor(int(value))}


def put(path: Path, held: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(held, path)


def text(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def transformers_trainer(run: Path) -> None:
    history = [
        row
        for step, loss in ((500, 0.5), (1000, 0.2), (1500, 0.4))
        for row in (
            {"loss": 1.0, "step": step, "epoch": 0.1},
            {"eval_loss": loss, "step": step, "epoch": 0.1},
        )
    ]
    for i, step in enumerate((500, 1000, 1500), 1):
        folder = run / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        save_file(weights(i), folder / "model.safetensors")
        put(folder / "optimizer.pt", {"state": {}})
        put(folder / "rng_state.pth", {"cpu": 1})
        state = {"global_step": step, "epoch": 0.1, "log_history": history[: 2 * i]}
        text(folder / "trainer_state.json", json.dumps(state))
    save_file(weights(3), run / "model.safetensors")


def lightning(run: Path) -> None:
    """File names have the metric in two digits; the callback's state has all of them."""
    scores = {64: 0.2499, 1000: 0.2512, 128: 0.3}
    folder = run / "lightning_logs" / "version_0" / "checkpoints"
    for i, (step, score) in enumerate(scores.items(), 1):
        best = {f"/elsewhere/epoch={i}-step={step}-val_loss={score:.2f}.ckpt": torch.tensor(score)}
        callbacks = {"ModelCheckpoint{}": {"monitor": "val_loss", "best_k_models": best}}
        held = {"epoch": i, "global_step": step, "state_dict": weights(i), "callbacks": callbacks}
        put(folder / f"epoch={i}-step={step}-val_loss={score:.2f}.ckpt", held)
    put(folder / "last.ckpt", {"epoch": 2, "global_step": 1000, "state_dict": weights(2)})


def wenet(run: Path) -> None:
    for epoch in range(8, 12):
        put(run / f"{epoch}.pt", weights(epoch))
        record = {"cv_loss": (epoch - 10) ** 2 + 0.1, "epoch": epoch, "step": 100 * epoch}
        text(run / f"{epoch}.yaml", "".join(f"{key}: {value}\n" for key, value in record.items()))
    put(run / "init.pt", weights(0))
    put(run / "avg_5.pt", weights(0))
    (run / "final.pt").symlink_to("11.pt")


def espnet(run: Path) -> None:
    folder = run / "asr_train"
    stats = {
        epoch: {"train": {"loss": 1.0, "time": datetime.timedelta(1)}, "valid": {"acc": acc}}
        for epoch, acc in ((8, 0.7), (9, 0.9), (10, 0.8))
    }
    for epoch in stats:
        put(folder / f"{epoch}epoch.pth", weights(epoch))
    (folder / "valid.acc.best.pth").symlink_to("9epoch.pth")
    put(folder / "valid.acc.ave_10best.pth", weights(0))
    reporter = {"epoch": 10, "stats": stats}
    put(folder / "checkpoint.pth", {"model": weights(10), "optimizers": [{}], "reporter": reporter})


def speechbrain(run: Path) -> None:
    """The order is that of the time in the record; folders may be copied, and their names differ."""
    for day, error in ((3, 7.0), (1, 9.0), (2, 8.0)):
        folder = run / "save" / f"CKPT+2026-01-0{day}+10-00-00+00"
        put(folder / "model.ckpt", weights(day))
        put(folder / "optimizer.ckpt", {"state": {}})
        text(folder / "counter.ckpt", "3")
        record = (
            f"# yamllint disable\nWER: {error}\nend-of-epoch: true\nunixtime: {day * 86400.5}\n"
        )
        text(folder / "CKPT.yaml", record)


def nemo(run: Path) -> None:
    folder = run / "default" / "2026-01-01_10-00-00" / "checkpoints"
    for step, loss in ((100, 2.5), (1000, 2.4), (200, 2.3)):
        name = f"gpt--val_loss={loss}-step={step}-consumed_samples={8 * step}.0"
        held = {"global_step": step, "epoch": 0, "state_dict": weights(step)}
        put(folder / f"{name}.ckpt", held)
        if step == 1000:
            put(folder / f"{name}-last.ckpt", held)
            put(folder / f"{name}-EMA.ckpt", held)


def accelerate(run: Path) -> None:
    for i in (9, 10, 11):
        folder = run / "checkpoints" / f"checkpoint_{i}"
        folder.mkdir(parents=True)
        save_file(weights(i), folder / "model.safetensors")
        put(folder / "optimizer.bin", {"state": {}})
        put(folder / "custom_checkpoint_0.pkl", {"state": {}})
    text(run / "metrics.csv", "step, loss\n9, 0.1\n10, 0.2\n11, 0.3\n")


def deepspeed(run: Path) -> None:
    for step in (50, 100, 200):
        folder = run / f"global_step{step}"
        put(folder / "mp_rank_00_model_states.pt", {"module": weights(step), "global_steps": step})
        put(folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt", {"state": {}})
    text(run / "latest", "global_step200")
    text(run / "log.jsonl", "".join(f'{{"step": {s}, "loss": {s}}}\n' for s in (50, 100, 200)))


def megatron(run: Path) -> None:
    for step in (500, 1000, 1500):
        save(weights(step), checkpoint_id=run / f"iter_{step:07d}", **ALONE)
    torn = run / "iter_0002000"
    shutil.copytree(run / "iter_0001500", torn)
    (torn / ".metadata").unlink()
    text(run / "latest_checkpointed_iteration.txt", "1500")
    text(run / "log.csv", "iteration,lm loss\n500,3\n1000,2\n1500,4\n")


def fairseq(run: Path) -> None:
    for name, updates, loss in (("1", 100, 3.0), ("2", 200, 2.0), ("_2_150", 150, 2.5)):
        extra = {"epoch": 1, "val_loss": loss, "best": 2.0}
        history = [{"num_updates": updates}]
        held = {"model": weights(updates), "extra_state": extra, "optimizer_history": history}
        put(run / f"checkpoint{name}.pt", held)
    shutil.copy(run / "checkpoint2.pt", run / "checkpoint_best.pt")
    shutil.copy(run / "checkpoint2.pt", run / "checkpoint_last.pt")


def timm(run: Path) -> None:
    for epoch in (8, 9, 10):
        put(run / f"checkpoint-{epoch}.pth.tar", {"state_dict": weights(epoch), "epoch": epoch})
    put(run / "last.pth.tar", {"state_dict": weights(10), "epoch": 10})
    text(run / "summary.csv", "epoch,train_loss,eval_top1\n8,3,50\n9,2,70\n10,1,60\n")


def composer(run: Path) -> None:
    for batch in (50, 100, 200):
        put(run / f"ep1-ba{batch}-rank0.pt", {"state": {"model": weights(batch)}})
    (run / "latest-rank0.pt").symlink_to("ep1-ba200-rank0.pt")
    text(
        run / "log.jsonl",
        "".join(f'{{"trainer/global_step": {s}, "loss": {s}}}\n' for s in (50, 100, 200)),
    )


def detectron(run: Path) -> None:
    """Its metrics are one record a line, in a file that ends in .json; its steps count from 0."""
    rows = []
    for step, score in ((4999, 30.0), (9999, 35.0), (14999, 33.0)):
        put(run / f"model_{step:07d}.pth", {"model": weights(step), "iteration": step})
        rows += [{"iteration": step, "bbox/AP": score}, {"iteration": step - 19, "total_loss": 1.0}]
    put(run / "model_final.pth", {"model": weights(14999), "iteration": 14999})
    text(run / "metrics.json", "\n".join(map(json.dumps, rows)))


def espnet_1(run: Path) -> None:
    folder = run / "results"
    for epoch in (8, 9, 10):
        put(folder / f"snapshot.ep.{epoch}", {"model": weights(epoch)})
    rows = [
        {"epoch": e, "iteration": 9 * e, "validation/main/acc": a}
        for e, a in ((8, 0.5), (9, 0.7), (10, 0.6))
    ]
    text(folder / "log", json.dumps(rows))


def fairseq2(run: Path) -> None:
    """The parts of a model lie by ranks, in folders below each step's; the last save is not done."""
    folder = run / "ws_1.6e1c4c1e" / "checkpoints"
    for step, score in ((500, -0.5), (1000, -0.2), (1500, -0.4), (2000, None)):
        of_step = folder / f"step_{step}{'.tmp' if score is None else ''}"
        put(of_step / "model" / "pp_00" / "tp_00" / "sdp_00.pt", weights(step))
        put(of_step / "optimizer" / "pp_00" / "tp_00" / "sdp_00.pt", {"state": {}})
        for rank in (0, 1):
            put(of_step / "trainer" / f"rank_0{rank}.pt", {"step": step})
        if score is not None:
            text(folder / "scores" / f"step_{step}.txt", f"{score}\n")


def mmengine(
    run: Path, *, iterations: int = 8, every: int = 4, by_epoch: bool = True, epochs: int = 5
) -> None:
    """A validation after each epoch; its "step" is the epoch or the iteration. The third is the best."""
    rows = []
    for epoch in range(1, epochs + 1):
        ends = epoch * iterations
        for i in range(ends - iterations + every, ends + 1, every):
            shown = epoch if by_epoch else 1
            rows.append({"loss": 9.0 - i % 7, "epoch": shown, "iter": i, "step": i})
        rows.append({"coco/bbox_mAP": -abs(epoch - 3.1), "step": epoch if by_epoch else ends})
        held = {"meta": {"epoch": epoch, "iter": ends}, "state_dict": weights(epoch)}
        put(run / (f"epoch_{epoch}.pth" if by_epoch else f"iter_{ends}.pth"), held)
    shutil.copy(
        run / f"{'epoch_3' if by_epoch else f'iter_{3 * iterations}'}.pth",
        run / "best_coco_bbox_mAP_epoch_3.pth",
    )
    text(run / "20260101_100000" / "vis_data" / "scalars.json", "\n".join(map(json.dumps, rows)))


KINDS: dict[str, tuple[Callable[[Path], None], tuple[str, str], str, str, tuple[str, str]]] = {
    # its folder; the last two in order; a metric as typed, its full name, the best two in order
    "transformers": (transformers_trainer, ("checkpoint-1000", "checkpoint-1500"), "eval_loss", "eval_loss", ("checkpoint-1000", "checkpoint-1500")),
    "lightning": (lightning, ("epoch=3-step=128-val_loss=0.30.ckpt", "epoch=2-step=1000-val_loss=0.25.ckpt"), "val_loss", "val_loss", ("epoch=1-step=64-val_loss=0.25.ckpt", "epoch=2-step=1000-val_loss=0.25.ckpt")),
    "wenet": (wenet, ("10.pt", "11.pt"), "cv_loss", "cv_loss", ("10.pt", "11.pt")),
    "espnet": (espnet, ("9epoch.pth", "10epoch.pth"), "valid_acc", "valid.acc", ("9epoch.pth", "10epoch.pth")),
    "speechbrain": (speechbrain, ("CKPT+2026-01-02+10-00-00+00", "CKPT+2026-01-03+10-00-00+00"), "WER", "WER", ("CKPT+2026-01-02+10-00-00+00", "CKPT+2026-01-03+10-00-00+00")),
    "nemo": (nemo, ("gpt--val_loss=2.3-step=200-consumed_samples=1600.0.ckpt", "gpt--val_loss=2.4-step=1000-consumed_samples=8000.0.ckpt"), "val_loss", "val_loss", ("gpt--val_loss=2.3-step=200-consumed_samples=1600.0.ckpt", "gpt--val_loss=2.4-step=1000-consumed_samples=8000.0.ckpt")),
    "accelerate": (accelerate, ("checkpoint_10", "checkpoint_11"), "loss", "loss", ("checkpoint_9", "checkpoint_10")),
    "deepspeed": (deepspeed, ("global_step100", "global_step200"), "loss", "loss", ("global_step50", "global_step100")),
    "megatron": (megatron, ("iter_0001000", "iter_0001500"), "lm_loss", "lm loss", ("iter_0000500", "iter_0001000")),
    "fairseq": (fairseq, ("checkpoint_2_150.pt", "checkpoint2.pt"), "val_loss", "extra_state.val_loss", ("checkpoint_2_150.pt", "checkpoint2.pt")),
    "composer": (composer, ("ep1-ba100-rank0.pt", "ep1-ba200-rank0.pt"), "loss", "loss", ("ep1-ba50-rank0.pt", "ep1-ba100-rank0.pt")),
    "detectron2": (detectron, ("model_0009999.pth", "model_0014999.pth"), "bbox.AP", "bbox/AP", ("model_0009999.pth", "model_0014999.pth")),
    "mmengine": (mmengine, ("epoch_4.pth", "epoch_5.pth"), "bbox_mAP", "coco/bbox_mAP", ("epoch_3.pth", "epoch_4.pth")),
    "espnet 1": (espnet_1, ("snapshot.ep.9", "snapshot.ep.10"), "main/acc", "validation/main/acc", ("snapshot.ep.9", "snapshot.ep.10")),
    "timm": (timm, ("checkpoint-9.pth.tar", "checkpoint-10.pth.tar"), "top1", "eval_top1", ("checkpoint-9.pth.tar", "checkpoint-10.pth.tar")),
}  # fmt: skip
