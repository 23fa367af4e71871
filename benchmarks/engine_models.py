"""The models for the measurements. Only the shapes of their tensors matter; GPT-2 also trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY, CONTEXT, WIDTH, HEADS, BLOCKS = 50257, 1024, 768, 12, 12
TINY_ELEMENTS = 64


@dataclass(frozen=True)
class Workload:
    """A model to average, and the number of updates in one timing."""

    name: str
    make: Callable[[], nn.Module]
    calls: int


def tiny(count: int = 1000, elements: int = TINY_ELEMENTS) -> nn.Module:
    """`count` parameters of a few elements each, so that the work per tensor dominates."""
    return nn.ParameterList(torch.randn(elements) for _ in range(count))


def resnet50() -> nn.Module:
    """The layers of ResNet-50, not connected: 161 parameters (25.6 M) and 159 BatchNorm buffers."""
    layers: list[nn.Module] = _convolution(3, 64, 7)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            if block == 0:
                layers += _convolution(inputs, 4 * width, 1)
            layers += _convolution(inputs, width, 1)
            layers += _convolution(width, width, 3)
            layers += _convolution(width, 4 * width, 1)
            inputs = 4 * width
    return nn.ModuleList([*layers, nn.Linear(inputs, 1000)])


def _convolution(inputs: int, outputs: int, size: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, size, bias=False), nn.BatchNorm2d(outputs)]


class Block(nn.Module):
    """One transformer block with the layout of GPT-2: 12 parameters."""

    def __init__(self, width: int, wide: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, wide), nn.Linear(wide, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) -> the same."""
        x = x + self.project(self._attend(self.mix(self.norm1(x))))
        out: Tensor = x + self.narrow(functional.gelu(self.widen(self.norm2(x))))
        return out

    def _attend(self, mixed: Tensor) -> Tensor:
        batch, tokens, _ = mixed.shape
        query, key, value = mixed.view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return seen.transpose(1, 2).reshape(batch, tokens, -1)


class Gpt2(nn.Module):
    """GPT-2 small: 148 parameters (124 M), with the embedding tied to the head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block(WIDTH, 4 * WIDTH, HEADS) for _ in range(BLOCKS)))
        self.norm = nn.LayerNorm(WIDTH)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.places.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, tokens) -> logits over the vocabulary."""
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        logits: Tensor = self.norm(self.blocks(x)) @ self.tokens.weight.T
        return logits


TINY = Workload("1000 tiny tensors", tiny, calls=5)
RESNET = Workload("ResNet-50", resnet50, calls=1)
GPT2 = Workload("GPT-2 small", Gpt2, calls=1)
WORKLOADS = (TINY, RESNET, GPT2)


def floating(model: nn.Module) -> list[Tensor]:
    """A model's parameters and floating-point buffers: the tensors that are averaged."""
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    return [parameter.detach() for parameter in model.parameters()] + buffers
