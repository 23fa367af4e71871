"""A causal transformer of two blocks, in functions that vmap."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CONTEXT, WIDTH, HEADS = 32, 48, 4


def transformer() -> nn.Module:
    """Two blocks; the first layer embeds a character and its place."""
    return nn.Sequential(Embedding(), Block(), Block(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 128))


class Embedding(nn.Module):
    """The sum of a vector of the character and a vector of its place."""

    def __init__(self) -> None:
        super().__init__()
        self.characters = nn.Embedding(128, WIDTH)
        self.places = nn.Parameter(0.02 * torch.randn(CONTEXT, WIDTH))

    def forward(self, rows: Tensor) -> Tensor:
        embedded: Tensor = self.characters(rows) + self.places
        return embedded


class Block(nn.Module):
    """Causal attention and an MLP, each after a layer norm and added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.heads, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 192), nn.GELU(), nn.Linear(192, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.heads(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = heads
        # torch's fused attention has no rule for vmap
        scores = query @ key.transpose(-1, -2) / key.shape[-1] ** 0.5
        later = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(later, -torch.inf).softmax(-1) @ value
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        added: Tensor = self.mlp(self.norms[1](x))
        return x + added
