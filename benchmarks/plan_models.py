"""The models of the plan: the shapes of their parameters, written down as data.

The shapes are those that transformers 5.23 builds from the published configurations, which
`tests/test_plan.py` checks name by name. Routed experts are stacked, as there and in torchtitan.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Kind = Literal["column", "row", "whole", "expert"]
"""How tensor parallelism cuts a parameter: its rows, its columns, not at all; or a stack of experts."""


@dataclass(frozen=True)
class Parameters:
    """`count` parameters of one shape and kind; `used` is the share of them that a token passes."""

    shape: tuple[int, ...]
    count: int
    kind: Kind = "whole"
    used: float = 1.0

    @property
    def numel(self) -> int:
        """The elements of all of them."""
        return self.count * math.prod(self.shape)


@dataclass(frozen=True)
class Model:
    """A model's parameters, and where its configuration is published."""

    name: str
    source: str
    parameters: tuple[Parameters, ...]

    @property
    def numel(self) -> int:
        """The elements of all parameters."""
        return sum(each.numel for each in self.parameters)

    @property
    def active(self) -> float:
        """Of these, the elements that a token passes."""
        return sum(each.numel * each.used for each in self.parameters)

    @property
    def tensors(self) -> int:
        """How many parameters there are."""
        return sum(each.count for each in self.parameters)


def _llama(
    width: int, layers: int, keys: int, hidden: int, words: int, heads: int
) -> tuple[Parameters, ...]:
    """Grouped-query attention, a gated feed-forward layer, and `heads` matrices over the words."""
    return (
        Parameters((words, width), heads, "column"),
        Parameters((width, width), layers, "column"),  # queries
        Parameters((keys, width), 2 * layers, "column"),  # keys, values
        Parameters((width, width), layers, "row"),  # outputs
        Parameters((hidden, width), 2 * layers, "column"),  # gate, up
        Parameters((width, hidden), layers, "row"),  # down
        Parameters((width,), 2 * layers + 1),  # norms
    )  # fmt: skip


def _experts(
    width: int, layers: int, hidden: int, dense: int, experts: int, chosen: int
) -> tuple[Parameters, ...]:
    """One dense feed-forward layer; in all others routed experts, a router and a shared expert."""
    rest = layers - 1
    return (
        Parameters((dense, width), 2, "column"),
        Parameters((width, dense), 1, "row"),
        Parameters((experts, 2 * hidden, width), rest, "expert", chosen / experts),  # gate and up
        Parameters((experts, width, hidden), rest, "expert", chosen / experts),  # down
        Parameters((experts, width), rest),  # router
        Parameters((hidden, width), 2 * rest, "column"),
        Parameters((width, hidden), rest, "row"),
    )


def _latent_attention(
    width: int, layers: int, heads: int, query_rank: int, key_rank: int, words: int
) -> tuple[Parameters, ...]:
    """Multi-head latent attention with heads of 128 + 64 for queries and 128 for values; and the words."""
    return (
        Parameters((words, width), 2, "column"),
        Parameters((query_rank, width), layers),
        Parameters((heads * (128 + 64), query_rank), layers, "column"),
        Parameters((key_rank + 64, width), layers),
        Parameters((heads * (128 + 128), key_rank), layers, "column"),
        Parameters((width, heads * 128), layers, "row"),
        Parameters((query_rank,), layers),
        Parameters((key_rank,), layers),
        Parameters((width,), 2 * layers + 1),  # norms
    )


LLAMA_1B = Model(
    "Llama-3.2-1B",
    "config.json of meta-llama/Llama-3.2-1B",
    _llama(width=2048, layers=16, keys=512, hidden=8192, words=128256, heads=1),
)
LLAMA_70B = Model(
    "Llama-3-70B",
    "config.json of meta-llama/Meta-Llama-3-70B; arXiv 2407.21783, table 3",
    _llama(width=8192, layers=80, keys=1024, hidden=28672, words=128256, heads=2),
)
KIMI_K2 = Model(
    "Kimi-K2",
    "config.json of moonshotai/Kimi-K2-Base; arXiv 2507.20534",
    _latent_attention(7168, 61, heads=64, query_rank=1536, key_rank=512, words=163840)
    + _experts(7168, 61, hidden=2048, dense=18432, experts=384, chosen=8),
)
MODELS = (LLAMA_1B, LLAMA_70B, KIMI_K2)
