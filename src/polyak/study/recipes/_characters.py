"""Text that every Python has: the Language Reference as `help()` shows it (PSF licence), by characters."""

from __future__ import annotations

import torch
from torch import Tensor

from polyak.study import Data

SOURCE = "the standard library's pydoc_data.topics (PSF licence); the text is that of your Python"


def windows(length: int) -> Tensor:
    """The text cut into rows of `length` characters, as numbers below 128; others than ASCII are "?".

    Each article is there once, though the standard library has some under two names.
    """
    from pydoc_data.topics import topics

    text = "\n".join(sorted(set(topics.values()))).encode("ascii", "replace")
    codes = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    return codes[: len(codes) // length * length].view(-1, length)


def text(split: int, length: int, validation: int, test: int) -> Data:
    """Rows of `length` characters, split by the seed `split`."""
    rows = windows(length)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(split))]
    sizes = [len(rows) - validation - test, validation, test]
    train, selecting, judging = rows.split(sizes)
    return Data((train,), (selecting,), (judging,))
