"""Fingerprints tell tensors apart whose bits a plain sum would not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from polyak._ranks.replicas import _CHUNK, fingerprint

CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "all signs": Tensor.neg,
    "order": lambda t: t.flip(0),
    "nothing is left": torch.zeros_like,
    "two are exchanged": lambda t: torch.cat([t[2048:2049], t[1:2048], t[:1], t[2049:]]),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex128])
@pytest.mark.parametrize("change", CHANGES)
def test_changes_that_leave_a_sum_of_bits_alone_are_seen(dtype: torch.dtype, change: str) -> None:
    for values in (torch.arange(1, 4097), torch.tensor([1.0, -1.5] * 2048).cumsum(0)):
        tensor = values.to(dtype)
        assert fingerprint(tensor) == fingerprint(tensor.clone())
        assert fingerprint(CHANGES[change](tensor)) != fingerprint(tensor)


def test_what_lies_beyond_one_chunk_counts_by_its_place() -> None:
    ones = torch.ones(2 * _CHUNK)
    assert fingerprint(ones) != fingerprint(torch.zeros(2 * _CHUNK))
    ones[5] = 2
    first = fingerprint(ones)
    ones[[5, _CHUNK + 5]] = torch.tensor([1.0, 2.0])
    assert fingerprint(ones) != first


@given(
    st.lists(st.floats(width=32), min_size=1, max_size=40), st.integers(0, 39), st.integers(0, 31)
)
def test_every_bit_counts(values: list[float], place: int, bit: int) -> None:
    tensor = torch.tensor(values)
    changed = tensor.clone()
    changed.view(torch.int32)[place % len(values)] ^= torch.tensor(1 << bit).to(torch.int32)
    assert fingerprint(changed) != fingerprint(tensor)


def test_strides_do_not_count() -> None:
    tensor = torch.randn(6, 4, 5, 5)
    assert fingerprint(tensor.to(memory_format=torch.channels_last)) == fingerprint(tensor)
    assert fingerprint(torch.empty(0, 3)) == 0
