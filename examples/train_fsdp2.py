"""A small transformer sharded by FSDP2: averaged, checkpointed, resumed, exported, judged from the export.

    torchrun --standalone --nproc-per-node 2 examples/train_fsdp2.py --out run

It learns Python's own documentation, byte by byte. The same command goes on from the newest complete
checkpoint in `run`, and on as many ranks ends with the same weights, bit for bit, as a run that
nothing stopped. For torchrun to restart killed ranks by itself, add `--max-restarts 3` and set
TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment: otherwise restarted ranks may find the
addresses of dead ones in the store that they share with it, and wait for them (pytorch#135712).

On GPUs the same lines are meant to run over NCCL; only the CPU way, over gloo, has been run.
"""

from __future__ import annotations

import argparse
import os
import shutil
from datetime import timedelta
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import load_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import polyak
from polyak import checkpoints

LAYERS, HEADS, WIDTH, CONTEXT = 2, 4, 64, 64
BATCH, RATE, WARMUP = 32, 3e-3, 10  # windows a step, over all ranks; of the learning rate, in steps


class Block(nn.Module):
    """Causal attention, then a network of two layers, each added to what comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.heads = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.joined = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        split = self.heads(self.norm_1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*split, is_causal=True)
        x = x + self.joined(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class Transformer(nn.Module):
    """Bytes in, logits of the next bytes out; the embedding is the last layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, WIDTH)
        self.position = nn.Parameter(torch.zeros(CONTEXT, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 256, bias=False)
        self.head.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """The summed cross-entropy of each next byte, in nats."""
    logits = model(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="sum")


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=Path, required=True, help="checkpoints, then model.safetensors")
parser.add_argument("--steps", type=int, default=400)
parser.add_argument("--every", type=int, default=50, help="steps from one checkpoint to the next")
options = parser.parse_args()

# The ranks that torchrun started; one that has waited ten minutes for another gives up.
cuda = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
if cuda:
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=10))
rank, world = dist.get_rank(), dist.get_world_size()
if BATCH % world:
    raise SystemExit(f"{world} ranks do not divide {BATCH} windows a step")

# The text: 465 kB of English, the last tenth for validation.
text = torch.frombuffer(bytearray("\n".join(topics.values()).encode()), dtype=torch.uint8).long()
windows = text.unfold(0, CONTEXT + 1, 1)
train, validation = windows[: len(text) * 9 // 10 - CONTEXT], windows[len(text) * 9 // 10 :: 360]


def batch(step: int) -> Tensor:
    """This rank's windows of a step: a function of the step, so that a resumed run sees the same."""
    chosen = torch.randint(len(train), (BATCH,), generator=torch.Generator().manual_seed(step))
    return train[chosen[rank::world]].to(device)


# The model: every rank makes it whole and alike, and keeps its shards.
torch.manual_seed(0)
model = Transformer().to(device)
mesh = init_device_mesh(device.type, (world,))
for block in model.blocks:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.1)

# Its averages, sharded like it: an EMA, and the mean of all weights of the last quarter of the run.
averager = polyak.Averager(
    model,
    {
        "ema": polyak.Exponential.from_half_life(max(1, options.steps // 20)),
        "tail": polyak.Tail(polyak.Uniform(), start=options.steps * 3 // 4),
    },
)


def state(step: int) -> dict[str, object]:
    """All that a resumed run needs, saved and loaded together."""
    adam = get_optimizer_state_dict(model, optimizer)
    return {"model": model, "optimizer": adam, "average": averager, "step": step}


# Where an earlier run stopped.
first = 0
if newest := checkpoints.latest(options.out, group=dist.group.WORLD):
    found = state(0)
    checkpoints.load_distributed(newest, found)
    set_optimizer_state_dict(model, optimizer, found["optimizer"])
    first = found["step"]
    if rank == 0:
        print(f"resumed at step {first} from {newest}", flush=True)


@torch.no_grad()
def judged() -> float:
    """The validation loss of whatever the model carries; all ranks share the work."""
    model.eval()
    total = loss_of(model, validation[rank::world].to(device))
    dist.all_reduce(total)
    model.train()
    return total.item() / (len(validation) * CONTEXT)


for step in range(first, options.steps):
    for group in optimizer.param_groups:
        group["lr"] = RATE * min(1, (step + 1) / WARMUP)
    loss = loss_of(model, batch(step)) * world / (BATCH * CONTEXT)  # FSDP2 takes the ranks' mean
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    averager.update()

    done = step + 1
    if done % options.every == 0 or done == options.steps:
        losses = {"live": judged()}
        for name in averager.rules:
            with averager.applied(name):
                losses[name] = judged()
        if rank == 0:
            told = ", ".join(f"{name} {value:.6f}" for name, value in losses.items())
            print(f"step {done}: validation loss: {told}", flush=True)
        # All of it or nothing: a run killed in here goes on from the checkpoint before.
        checkpoints.save_distributed(options.out / f"step-{done:06}", state(done))
        if rank == 0:
            for old in sorted(options.out.glob("step-*"))[:-2]:
                shutil.rmtree(old)

# One file of plain weights, as any other model's: judged by a model that knows of no shards.
exported = options.out / "model.safetensors"
checkpoints.export(exported, averager, "ema", overwrite=True)
if rank == 0:
    plain = Transformer()
    load_model(plain, exported)
    with torch.no_grad():
        loss = loss_of(plain.eval(), validation).item() / (len(validation) * CONTEXT)
    print(f"exported: {exported}: validation loss: ema {loss:.6f}", flush=True)
dist.barrier()  # a rank that left while another was still at work has been seen to abort, under gloo
dist.destroy_process_group()
