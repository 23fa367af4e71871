"""Models that the tests average: one of every kind of tensor, and the ways to train them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


class Everything(nn.Module):
    """Tied, frozen, 0-dim, complex and strided parameters; buffers of every kind."""

    counter: Tensor
    mask: Tensor
    spectral_u: Tensor
    cache: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.body = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.phase = nn.Parameter(torch.randn(2, dtype=torch.complex64))
        self.strided = nn.Parameter(torch.randn(3, 4).t())
        self.channels = nn.Parameter(torch.randn(2, 3, 2, 2).to(memory_format=torch.channels_last))
        self.register_buffer("counter", torch.tensor(0))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("spectral_u", torch.randn(4))
        self.register_buffer("cache", torch.randn(2), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.norm(self.body(self.embedding(tokens)))
        logits: Tensor = self.head(hidden * self.scale)
        return logits


def everything(dtype: torch.dtype = torch.float32) -> Everything:
    """The model with its real tensors in a dtype; complex ones stay complex."""
    model = Everything()
    model._apply(lambda t: t.to(dtype) if t.is_floating_point() else t)
    return model


def floats(model: nn.Module) -> Iterator[Tensor]:
    """The parameters, and the floating-point buffers, of a model."""
    yield from model.parameters()
    yield from (b for b in model.buffers() if b.is_floating_point())


@torch.no_grad()
def wander(model: nn.Module, seed: int) -> None:
    """One step of a random walk of all that floats; counters count, masks flip."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in floats(model):
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        noise = torch.randn(real.shape, generator=generator, dtype=torch.float32)
        real.add_((0.1 * noise).to(real.dtype))
    for buffer in model.buffers():
        if buffer.dtype == torch.bool:
            buffer.logical_not_()
        elif not buffer.is_floating_point():
            buffer.add_(1)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of a model's state, non-persistent buffers included."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


def pointers(model: nn.Module) -> dict[str, int]:
    """Where each tensor's content lies."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.data_ptr() for name, tensor in named}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bitwise equality of two snapshots."""
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name
