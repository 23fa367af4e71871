"""The model that is averaged on several ranks: under FSDP2 in shards, under DDP in replicas."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from engine_models import Block

FSDP2, DDP = "FSDP2", "DDP"
VOCABULARY, CONTEXT, BLOCKS, HEADS = 1009, 64, 41, 4
MIXED_SIZE = 3  # rows: one rank of four has none


class Transformer(nn.Module):
    """498 parameters, from 3 numbers to a vocabulary's worth; no buffers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(CONTEXT, width)
        wide = 4 * width + 3  # rows that divide by neither 2 nor 4
        self.blocks = nn.Sequential(*(Block(width, wide, HEADS) for _ in range(BLOCKS)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.scale = nn.Parameter(torch.ones(MIXED_SIZE))

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, tokens) -> logits over the vocabulary."""
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x))) * self.scale.mean()
        return logits


@dataclass(frozen=True)
class Size:
    """A model's size: small ones show the work per parameter, large ones the memory's bandwidth."""

    name: str
    width: int


SMALL, LARGE = Size("small", 32), Size("large", 256)
SIZES = (SMALL, LARGE)


def shapes(size: Size) -> list[torch.Size]:
    """Those of a model's parameters."""
    with torch.device("meta"):
        return [parameter.shape for parameter in Transformer(size.width).parameters()]


class Run:
    """A model as one rank has it, and this rank's parts of its parameters as plain tensors."""

    def __init__(self, setting: str, size: Size) -> None:
        torch.manual_seed(0)  # replicas start equal
        self.setting, self.size = setting, size
        self.model: nn.Module = Transformer(size.width)
        if setting == FSDP2:
            shard(self.model)
        self._called = self.model if setting == FSDP2 else DistributedDataParallel(self.model)
        self.parts = [local(parameter.detach()) for parameter in self.model.parameters()]
        self._random = torch.Generator().manual_seed(1)

    def drift(self) -> None:
        """Other weights, as after a step; the same on all replicas."""
        for part in self.parts:
            part.normal_(generator=self._random)

    @torch.no_grad()
    def evaluate(self) -> None:
        """A forward pass that no backward pass follows: FSDP2 leaves the root's parameters whole."""
        self._called.eval()
        self._called(torch.arange(32).view(2, 16))


def shard(model: nn.Module) -> nn.Module:
    """FSDP2, block by block and the rest."""
    for block in model.get_submodule("blocks").children():
        fully_shard(block)
    fully_shard(model)
    return model


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor; a plain one is its own."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
