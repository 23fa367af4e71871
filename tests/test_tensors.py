"""In-place operations on lists: every pair of layouts, dtypes, and lengths beyond a chunk."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyak import _tensors as tensors
from polyak._dtypes import slot_dtype
from polyak._engine.exchange import Exchange
from polyak._parts import CHUNK_BYTES, Stages

LAYOUTS = {
    "dense": lambda: torch.randn(6, 8),
    "transposed": lambda: torch.randn(8, 6).t(),
    "gappy": lambda: torch.randn(6, 16)[:, ::2],
    "expanded": lambda: torch.randn(6, 1).expand(6, 8),
    "long": lambda: torch.randn(6, 8),
}


@pytest.mark.parametrize("a", ["dense", "transposed", "gappy"])
@pytest.mark.parametrize("b", ["dense", "transposed", "gappy"])
def test_exchange_of_all_layouts(a: str, b: str) -> None:
    x, y = LAYOUTS[a](), LAYOUTS[b]()
    was_x, was_y = x.clone(), y.clone()
    Exchange([x], [y]).to(True)
    assert torch.equal(x, was_y)
    assert torch.equal(y, was_x)


def test_exchange_beyond_a_chunk_and_with_nan() -> None:
    x, y = torch.randn(700_001), torch.full((700_001,), float("nan"))
    was = x.clone()
    Exchange([x], [y]).to(True)
    assert torch.equal(y, was)
    assert x.isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_lerp_across_dtypes_is_the_lerp_of_the_converted(dtype: torch.dtype, layout: str) -> None:
    live = LAYOUTS[layout]().to(dtype)
    slot = torch.randn(6, 8)
    expected = slot.lerp(live.float(), 0.3)
    tensors.lerp_([slot], [live], 0.3)
    assert torch.equal(slot, expected)


def test_lerp_across_dtypes_beyond_a_chunk() -> None:
    live, slot = torch.randn(600_000).bfloat16(), torch.randn(600_000)
    expected = slot.lerp(live.float(), 0.3)
    tensors.lerp_([slot], [live], 0.3)
    assert torch.equal(slot, expected)


# Torch 2.9 clones tensors one by one.
COPIES = {"aten._foreach_copy_.default", "aten._foreach_clone.default", "aten.clone.default"}


class FailsAt(torch.utils._python_dispatch.TorchDispatchMode):
    """Raises in place of the n-th copy or clone, or just after it."""

    def __init__(self, n: int, after: bool) -> None:
        super().__init__()
        self.n, self.after = n, after

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        copies = str(func) in COPIES
        self.n -= copies
        fails = copies and self.n == 0
        if fails and not self.after:
            raise KeyboardInterrupt
        out = func(*args, **(kwargs or {}))
        if fails:
            raise KeyboardInterrupt
        return out


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("n", range(1, 7))
def test_an_exchange_that_is_interrupted_changes_nothing(n: int, after: bool) -> None:
    x, y = torch.randn(500_000), torch.randn(500_000)  # two chunks
    was_x, was_y = x.clone(), y.clone()
    exchange = Exchange([x], [y])
    with pytest.raises(KeyboardInterrupt), FailsAt(n, after):
        exchange.to(True)
    exchange.to(False)
    assert torch.equal(x, was_x)
    assert torch.equal(y, was_y)


class Operations(torch.utils._python_dispatch.TorchDispatchMode):
    """The names of all operations, in order, and the most bytes of one new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.most_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.names.append(func.name())
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.empty.memory_format):
            self.most_bytes = max(self.most_bytes, out.nbytes)
        return out


WEIGHTS = {
    "tiny": lambda: [torch.randn(3, 5) for _ in range(40)],
    "scalars and empty ones": lambda: [torch.randn(()), torch.randn(0, 3), torch.randn(2)],
    "longer than the buffer": lambda: [torch.randn(5), torch.randn(700_001), torch.randn(7)],
    "as long as the buffer": lambda: [torch.randn(1 << 18), torch.randn(1), torch.randn(1 << 18)],
    "channels last": lambda: [
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last) for _ in range(3)
    ],
    "long, other layout than the slot": lambda: [torch.randn(700, 800).t()],
    "gappy and expanded": lambda: [LAYOUTS["gappy"](), LAYOUTS["expanded"]()],
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_staged_weights_give_the_bits_of_converted_ones(dtype: torch.dtype, weights: str) -> None:
    stages = Stages()
    wide = WEIGHTS[weights]()
    slots = [torch.randn(t.shape) if "other" in weights else torch.randn_like(t) for t in wide]
    for round_ in range(3):  # the first call makes the stage, the others use it again
        live = [(t * round_ + 1).to(dtype) for t in wide]
        expected = [s.lerp(t.float(), 0.3) for s, t in zip(slots, live, strict=True)]
        tensors.lerp_all_([slots], live, [0.3], stages)
        assert all(map(torch.equal, slots, expected))


@pytest.mark.parametrize("count", [10, 1000])
def test_staging_takes_two_operations_for_any_number_of_tensors(count: int) -> None:
    live = [torch.randn(64).bfloat16() for _ in range(count)]
    averages = [[torch.zeros(64) for _ in live] for _ in range(2)]
    stages = Stages()
    tensors.lerp_all_(averages, live, [0.1, 0.2], stages)
    with Operations() as ran:
        tensors.lerp_all_(averages, live, [0.1, 0.2], stages)
    assert ran.names == ["aten::_foreach_copy_", *["aten::_foreach_lerp_.Scalar"] * 2]


def test_staging_holds_one_chunk_and_allocates_nothing_again() -> None:
    live = [torch.randn(n).bfloat16() for n in (3, 1_000_000, 300_000, 2, 200_000)]
    slots, stages = [torch.zeros(t.shape) for t in live], Stages()
    with Operations() as first:
        tensors.lerp_all_([slots], live, [0.1], stages)
    with Operations() as second:
        tensors.lerp_all_([slots], live, [0.1], stages)
    assert first.most_bytes == CHUNK_BYTES
    assert second.most_bytes == 0


def test_groups_of_one_kind_share_one_buffer() -> None:
    stages = Stages()
    groups = [[torch.randn(n).bfloat16()] * 2 for n in (100, 300_000, 7)]
    slots = [[torch.zeros(t.shape) for t in live] for live in groups]
    for _ in range(2):  # the second group outgrows the buffer of the first
        for g, live in enumerate(groups):
            expected = [s.lerp(t.float(), 0.3) for s, t in zip(slots[g], live, strict=True)]
            tensors.lerp_all_([slots[g]], live, [0.3], stages, g)
            assert all(map(torch.equal, slots[g], expected))
    with Operations() as again:
        for g, live in enumerate(groups):
            tensors.lerp_all_([slots[g]], live, [0.3], stages, g)
    assert again.most_bytes == 0
    held = {stage._buffer.data_ptr(): stage._buffer.nbytes for stage in stages._made.values()}
    assert list(held.values()) == [CHUNK_BYTES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_pass_over_large_and_small_is_each_alone_bit_for_bit(dtype: torch.dtype) -> None:
    sizes = [(7,), (1_500_001,), (3, 5), (1200, 1100), (1,), (2_000_000,)]
    live = [torch.randn(size).to(dtype) for size in sizes]
    live[3] = live[3].t()
    alone = [[torch.randn_like(t, dtype=torch.float32) for t in live] for _ in range(3)]
    together = [[t.clone() for t in slots] for slots in alone]
    fractions = [0.3, 1.0, 0.001]
    tensors.lerp_all_(together, live, fractions)
    for slots, fraction in zip(alone, fractions, strict=True):
        for slot, weight in zip(slots, live, strict=True):
            tensors.lerp_([slot], [weight], fraction)
    for slots, expected in zip(together, alone, strict=True):
        for slot, wanted in zip(slots, expected, strict=True):
            assert torch.equal(slot, wanted)


@pytest.mark.parametrize("count", [1, 2])
def test_a_tensor_of_another_kind_amid_a_list_is_moved_once(count: int) -> None:
    live = [torch.ones(2), torch.ones(2).double(), torch.ones(2)]
    averages = [[torch.zeros(2) for _ in live] for _ in range(count)]
    tensors.lerp_all_(averages, live, [0.25] * count)
    for slots in averages:
        assert [slot.tolist() for slot in slots] == [[0.25, 0.25]] * 3


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=8))
def test_combine_is_the_weighted_sum(weights: list[float]) -> None:
    coefficients = [w / sum(weights) for w in weights]
    parts = [torch.randn(5, dtype=torch.float64) for _ in weights]
    out = [torch.full((5,), float("nan"), dtype=torch.float64)]
    tensors.combine_(out, [([p], c) for p, c in zip(parts, coefficients, strict=True)])
    expected = sum(p * c for p, c in zip(parts, coefficients, strict=True))
    torch.testing.assert_close(out[0], expected)


@pytest.mark.parametrize(
    ("dtype", "wanted", "slot"),
    [
        (torch.float32, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.bfloat16, None, torch.float32),
        (torch.float16, None, torch.float32),
        (torch.float8_e4m3fn, None, torch.float32),
        (torch.complex64, None, torch.complex64),
        (torch.complex32, None, torch.complex64),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.complex64, torch.float64, torch.complex128),
        (torch.complex64, torch.bfloat16, torch.complex64),
        (torch.complex128, torch.float16, torch.complex64),
        (torch.complex32, torch.float16, torch.complex64),
    ],
)
def test_the_dtype_of_a_slot(
    dtype: torch.dtype, wanted: torch.dtype | None, slot: torch.dtype
) -> None:
    assert slot_dtype(dtype, wanted) == slot
