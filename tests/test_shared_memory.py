"""Tensors that share memory: one tied tensor, views that are apart, or an error that names both.

A new kind joins a table by one line: `TIED`, `APART`, `OVERLAPPING`, `UNTIED_LATER`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from itertools import combinations, product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from models import assert_same
from polyak import EMA, Averager, Exponential, Uniform, Window
from polyak._engine import memory
from quick import first_quick

ROWS = 600  # of 600 float32 numbers: more than the MiB that is exchanged at once


def holding(**tensors: Tensor) -> nn.Module:
    """A module of parameters and, where the name begins with b, of buffers ("c": not saved)."""
    module = nn.Module()
    for name, tensor in tensors.items():
        if name[0] in "bc":
            module.register_buffer(name, tensor, persistent=name[0] == "b")
        else:
            is_parameter = isinstance(tensor, nn.Parameter)
            setattr(module, name, tensor if is_parameter else nn.Parameter(tensor))
    return module


def base(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(*(shape or (ROWS, ROWS))).to(dtype)


def as_numpy(tensor: Tensor) -> Tensor:
    """Another storage object on the same memory."""
    return torch.from_numpy(tensor.numpy())


def within(**modules: nn.Module) -> nn.Module:
    return nn.ModuleDict(modules)


def shared(make: Callable[[Tensor], Any], *shape: int) -> Any:
    return make(base(*shape))


TIED: dict[str, Any] = {
    "one object": shared(lambda t: holding(v=(p := nn.Parameter(t)), w=p)),
    "two parameters": shared(lambda t: holding(v=nn.Parameter(t), w=nn.Parameter(t))),
    "a parameter of a parameter": shared(lambda t: holding(v=(p := nn.Parameter(t)), w=nn.Parameter(p))),
    "a parameter and a buffer": shared(lambda t: holding(v=t, b=t)),
    "a buffer in an earlier module": shared(lambda t: within(m=holding(b=t), n=holding(v=t))),
    "an unsaved buffer": shared(lambda t: within(m=holding(c=t), n=holding(v=t))),
    "a detached alias": shared(lambda t: {"v": t, "w": t.detach()}),
    "a view of all": shared(lambda t: {"v": t, "w": t[:]}),
    "a reshaped row": shared(lambda t: {"v": t, "w": t.view(-1).view(ROWS, ROWS)}),
    "another storage object": shared(lambda t: {"v": t, "w": as_numpy(t)}),
    "twice transposed": shared(lambda t: {"v": t.t(), "w": t.detach().t()}),
    "three names": shared(lambda t: {"u": t, "v": t[:], "w": t.detach()}),
    "complex": shared(lambda t: {"v": (z := torch.view_as_complex(t.view(-1, 2))), "w": z[:]}),
    "strides of size 1 differ": shared(lambda t: {"v": t[:1], "w": t.as_strided((1, ROWS), (7, 1))}),
}  # fmt: skip

APART: dict[str, Any] = {
    "equal values": {"v": base(), "w": base()},
    "slices of a flat buffer": shared(lambda t: {f"w{i}": part for i, part in enumerate(t.view(-1).split(ROWS * 200))}),
    "even and odd columns": shared(lambda t: {"v": t[:, ::2], "w": t[:, 1::2]}),
    "left and right": shared(lambda t: {"v": t[:, :200], "w": t[:, 200:]}),
    "top and bottom": shared(lambda t: holding(v=t[:300], w=t[300:])),
    "every third": shared(lambda t: {n: t.view(-1)[i::3] for i, n in enumerate("uvw")}),
    "a chessboard": shared(lambda t: {"v": t.view(-1)[::2], "w": t.view(-1)[1::2].view(300, ROWS)}),
    "real and imaginary": shared(lambda t: {"v": (z := torch.view_as_complex(t.view(-1, 2))).real, "w": z.imag}),
    "other dtypes side by side": shared(lambda t: {"v": t[:300], "w": t[300:].view(torch.float64).zero_()}),
    "many columns": shared(lambda t: {f"v{i}": t[:, i] for i in range(ROWS)}),
    "empty ones": {"u": base(), "v": torch.empty(0, 3), "w": torch.empty(0, 3)},
    "a slice that is not selected": shared(lambda t: holding(v=t[:300], c=t)),
}  # fmt: skip

OVERLAPPING: dict[str, tuple[Any, str]] = {
    "a flat buffer and a slice": (shared(lambda t: {"flat": t.view(-1), "w": t[3]}), "flat and w share"),
    "slices that meet": (shared(lambda t: {"v": t[:301], "w": t[300:]}), "v and w share memory"),
    "another shape": (shared(lambda t: {"v": t, "w": t.view(-1)}), "share memory"),
    "transposed": (shared(lambda t: {"v": t, "w": t.t()}), "share memory"),
    "another dtype": (shared(lambda t: {"v": t, "w": t.view(torch.float64)}), "share memory"),
    "complex and real": (shared(lambda t: {"v": t.view(-1, 2), "w": torch.view_as_complex(t.view(-1, 2))}), "share"),
    "conjugated": (shared(lambda t: {"v": (z := torch.view_as_complex(t.view(-1, 2))), "w": z.conj()}), "w is a conjugate view"),
    "the imaginary part of a conjugate": ({"w": base(2).to(torch.complex64).conj().imag}, "w is a negative view"),
    "columns 0, 2.. and 0, 3..": (shared(lambda t: {"v": t[:, ::2], "w": t[:, ::3]}), "share memory"),
    "a parameter and a copied buffer": (shared(lambda t: holding(v=t, b=t[0])), "b and v share memory"),
    "another storage object": (shared(lambda t: {"v": t, "w": as_numpy(t[5])}), "v and w share memory"),
    "one of many columns": (shared(lambda t: {**{f"v{i}": t[:, i] for i in range(ROWS)}, "w": t[7]}), "w share"),
    "expanded": ({"w": base(3, 1).expand(3, 4)}, r"w has elements that share memory \(strides"),
    "sliding windows": ({"w": base(9).unfold(0, 3, 1)}, "w has elements that share memory"),
    "a parameter is expanded": (shared(lambda t: holding(w=t[0].expand(5, ROWS))), "elements that share"),
    "a copied buffer is expanded": (shared(lambda t: holding(v=t, b=base(1).expand(5))), "b has elements"),
}  # fmt: skip


def contents(model: Any) -> dict[str, Tensor]:
    if isinstance(model, nn.Module):
        found = (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
        return dict(found)
    assert isinstance(model, Mapping)
    return dict(model)


@torch.no_grad()
def walk(model: Any) -> None:
    """Moves what the model holds; a tied tensor by its first name alone."""
    seen: set[object] = set()
    for tensor in contents(model).values():
        if tensor.numel() and memory.identity(tensor) not in seen:
            tensor.add_(torch.randn_like(tensor))
        seen.add(memory.identity(tensor))


def assert_the_average_comes_and_goes(model: Any) -> None:
    """The mean of two states inside the block, and the live weights after it, bit for bit."""
    averager = Averager(model, Uniform())
    averager.update()
    first = {name: tensor.detach().clone() for name, tensor in contents(model).items()}
    walk(model)
    averager.update()
    live = {name: tensor.detach().clone() for name, tensor in contents(model).items()}
    average = averager.average()
    with averager.applied():
        for name in average:
            assert torch.equal(contents(model)[name], average[name]), name
    for name, tensor in contents(model).items():
        assert torch.equal(tensor, live[name]), name
    for name in average:
        torch.testing.assert_close(average[name], first[name].lerp(live[name], 0.5))


@pytest.mark.parametrize("kind", TIED)
def test_tied_tensors_are_one(kind: str) -> None:
    model = TIED[kind]
    averager = Averager(model, Uniform())
    assert [item.policy for item in averager.tracked] == ["average"]
    averager.update()
    saved = [name for name in contents(model) if not name.endswith("c")]
    assert sorted(averager.average()) == sorted(saved)
    assert len(set(map(id, averager.average().values()))) == 1
    if isinstance(model, nn.Module):
        model.load_state_dict(averager.average())
    assert_the_average_comes_and_goes(model)


@pytest.mark.parametrize("kind", APART)
def test_tensors_that_are_apart_are_averaged_apart(kind: str) -> None:
    model = APART[kind]
    averager = Averager(model, Uniform())
    assert not any(item.aliases for item in averager.tracked)
    assert_the_average_comes_and_goes(model)


@pytest.mark.parametrize("kind", [kind for kind in APART if isinstance(APART[kind], Mapping)])
def test_a_block_on_one_lets_the_others_be_updated(kind: str) -> None:
    model = APART[kind]
    first, *rest = [item.name for item in Averager(model, Uniform()).tracked if item.stored]
    one, other = Averager(model, Uniform(), select=first), Averager(model, Uniform(), select=rest)
    one.update()
    with one.applied():
        other.update()
    assert other.count == 1


@pytest.mark.parametrize("kind", OVERLAPPING)
def test_tensors_that_overlap_are_refused_by_name(kind: str) -> None:
    model, message = OVERLAPPING[kind]
    with pytest.raises(ValueError, match=message):
        Averager(model, Uniform(), buffers="auto")


def test_the_law_fails_where_ties_are_told_by_object(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: two objects on one storage, averaged apart, lose the live weights."""
    model = TIED["two parameters"]
    monkeypatch.setattr("polyak._engine.tracking.identity", id)
    with pytest.raises(ValueError, match="v and w share memory"):
        Averager(model, Uniform())
    monkeypatch.setattr("polyak._engine.refusals.overlap", lambda _: None)
    with pytest.raises(AssertionError):
        assert_the_average_comes_and_goes(model)


@pytest.mark.parametrize("kind", [kind for kind in TIED if isinstance(TIED[kind], nn.Module)])
def test_the_articles_class_and_copy_to_know_ties(kind: str) -> None:
    ema = EMA(TIED[kind], beta=0.5, update_after_step=0, update_every=1, min_value=0.5)
    for _ in range(3):
        walk(ema.model)
        ema.update()
    assert len(ema._average.slots["average"]) == 1
    first, *others = contents(ema.ema_model).values()
    assert all(torch.equal(first, other) for other in others)
    averager = Averager(ema.model, Uniform())
    averager.update()
    averager.copy_to(ema.ema_model)
    assert torch.equal(first, next(iter(contents(ema.model).values())))


@pytest.mark.parametrize("kind", OVERLAPPING)
def test_a_target_that_overlaps_is_refused(kind: str) -> None:
    model, message = OVERLAPPING[kind]
    source = {name: tensor.detach().clone() for name, tensor in contents(model).items()}
    averager = Averager(source, Uniform())
    averager.update()
    if isinstance(model, Mapping):
        with pytest.raises(ValueError, match=message):
            averager.copy_to(model)


def test_two_averages_do_not_go_into_one_tied_tensor() -> None:
    averager = Averager({"v": torch.zeros(3), "w": torch.ones(3)}, Uniform())
    averager.update()
    target = torch.full((3,), 7.0)
    with pytest.raises(
        ValueError, match="w is tied to v in the model, but the two have different averages"
    ):
        averager.copy_to({"v": target, "w": target[:]})
    assert target.tolist() == [7.0] * 3
    tied = Averager({"v": target, "w": target[:]}, Uniform())
    tied.update()
    apart = {"v": torch.zeros(3), "w": torch.zeros(3)}
    tied.copy_to(apart)
    assert apart["v"].tolist() == apart["w"].tolist() == [7.0] * 3


# What arises after the averager was made


def tie(model: Any) -> None:
    model.w = nn.Parameter(model.v.detach())


def tie_by_data(model: Any) -> None:
    model.w.data = model.v.data


def overlap_by_data(model: Any) -> None:
    model.w.data = model.v.data.t()


def expand(model: Any) -> None:
    model.w.data = model.w.data[:1].expand(4, 4)


def negate(model: Any) -> None:
    model.w.data = torch._neg_view(model.w.data)


def untie(model: Any) -> None:
    model.w = nn.Parameter(model.v.detach().clone())


def untie_by_loading(model: Any) -> None:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def resize_one_name(model: Any) -> None:
    model.w.data = torch.zeros(2)


def move_one_name(model: Any) -> None:
    model.w.data = model.w.data.clone()


LATER: dict[str, tuple[bool, Callable[[nn.Module], None], str]] = {
    "tied": (False, tie, "tied since: w to v"),
    "tied through .data": (False, tie_by_data, "tied since: w to v"),
    "overlapping": (False, overlap_by_data, "v and w share memory"),
    "expanded": (False, expand, "w has elements that share memory"),
    "a negative view": (False, negate, "w is a negative view"),
    "no longer tied": (True, untie, "no longer tied: w to v"),
    "no longer tied, by loading": (True, untie_by_loading, "no longer tied: w to v"),
    "one name resized": (True, resize_one_name, "no longer tied: w to v"),
    "one name moved": (True, move_one_name, "no longer tied: w to v"),
}

MADE: dict[str, dict[str, Any]] = {
    "plain": {"rule": Uniform()},
    "narrow slots": {"rule": Uniform(), "dtype": torch.float16},
    "several slots": {"rule": Window(2)},
    "copied": {"rule": Uniform(), "buffers": {"v": "copy"}},
    "guarded": {"rule": Uniform(), "nonfinite": "skip"},
}
"""How the averager is made: not all tensors exchange contents with slots."""


def begun(tied: bool, made: str) -> tuple[nn.Module, Averager]:
    """A model and an averager of it, after two updates and a block."""
    first = base(4, 4)
    model = holding(v=first, w=first if tied else base(4, 4), x=base(2))
    averager = Averager(model, **MADE[made])
    averager.update()
    averager.update()
    with averager.applied():
        pass
    return model, averager


@pytest.mark.parametrize("situation", LATER)
@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("call", first_quick(["average", "state_dict", "applied", "summary"], 2))
def test_what_arises_later_is_noticed(situation: str, made: str, call: str) -> None:
    tied, change, message = LATER[situation]
    model, averager = begun(tied, made)
    change(model)
    with pytest.raises(RuntimeError, match=message):
        called = getattr(averager, call)()
        called.__enter__()


UNDONE = [situation for situation, (tied, *_) in LATER.items() if tied]


@pytest.mark.parametrize("situation", UNDONE)
@pytest.mark.parametrize("made", MADE)
def test_a_tie_that_is_undone_is_noticed_by_the_update(situation: str, made: str) -> None:
    model, averager = begun(True, made)
    LATER[situation][1](model)
    with pytest.raises(RuntimeError, match=r"update: not the tensors(?s:.*)no longer tied: w to v"):
        averager.update()
    tie(model)
    averager.update()
    assert averager.count == 3


@pytest.mark.parametrize("situation", UNDONE)
@pytest.mark.parametrize("options", [{}, {"param_or_buffer_names_no_ema": {"v"}}], ids=str)
def test_the_articles_class_notices_it_too(situation: str, options: Any) -> None:
    first = base(4, 4)
    model = holding(v=first, w=first, x=base(2))
    ema = EMA(model, update_after_step=0, update_every=1, **options)
    ema.update()
    LATER[situation][1](model)
    with pytest.raises(RuntimeError, match="no longer tied: w to v"):
        ema.update()


def add(model: Any) -> None:
    model.y = nn.Parameter(base(2))


def remove(model: Any) -> None:
    del model.w


LEFT_OUT: dict[str, tuple[bool, Callable[[nn.Module], None]]] = {
    "tied": (False, tie),
    "tied through .data": (False, tie_by_data),
    "overlapping": (False, overlap_by_data),
    "expanded": (False, expand),
    "a negative view": (False, negate),
    "no longer tied": (True, untie),
    "one name resized": (True, resize_one_name),
    "removed": (False, remove),
    "one name removed": (True, remove),
    "added": (False, add),
}


@pytest.mark.parametrize("change", LEFT_OUT)
@pytest.mark.parametrize("options", [{"select": "x"}, {"buffers": {"[vwy]": "skip"}}], ids=str)
def test_what_is_left_to_the_model_may_change(change: str, options: Any) -> None:
    if change == "added" and "buffers" in options:
        options = {"select": "x"}
    first = base(4, 4)
    tied, do = LEFT_OUT[change]
    model = holding(v=first, w=first if tied else base(4, 4), x=base(2))
    averager = Averager(model, Exponential(0.5), **options)
    averager.update()
    before = model.get_parameter("x").detach().clone()
    do(model)
    with torch.no_grad():
        model.get_parameter("x").add_(1)
    averager.update()
    assert_same(averager.average(), {"x": before + 0.5})
    with averager.applied():
        assert torch.equal(model.get_parameter("x"), before + 0.5)
    assert torch.equal(model.get_parameter("x"), before + 1)


@pytest.mark.parametrize(
    ("buffers", "policy"),
    [
        ({"v": "skip"}, "skip"),
        ({"w": "skip"}, "skip"),
        ({"w": "average", "v": "skip"}, "average"),
        ({"v": "skip", "w": "average"}, "skip"),
        ({"v": "copy", "*": "skip"}, "copy"),
        ({"w": "copy", "*": "average"}, "copy"),
    ],
)
def test_the_first_pattern_that_matches_a_name_decides_for_a_tied_tensor(
    buffers: Any, policy: str
) -> None:
    first = nn.Parameter(base(4, 4))
    averager = Averager(
        holding(v=first, w=first, x=base(2)), Uniform(), buffers={"x": "average", **buffers}
    )
    assert {item.name: item.policy for item in averager.tracked}["v"] == policy


def test_the_first_name_of_a_tie_may_change_with_the_models_order() -> None:
    first = nn.Parameter(base(4, 4))
    model = holding(v=first, w=first, x=base(4, 4))
    averager = Averager(model, Uniform())
    averager.update()
    del model.v
    model.v = first
    averager.update()
    assert list(averager.average()) == ["v", "w", "x"]


# The arithmetic of overlaps

STORAGE = 96


@st.composite
def views(draw: st.DrawFn) -> Tensor:
    """A strided view of one storage of 96 bytes, of any dtype, that fits into it."""
    dtype = draw(st.sampled_from([torch.uint8, torch.float16, torch.float32, torch.complex64]))
    room = STORAGE // dtype.itemsize
    sizes = draw(st.lists(st.integers(1, 4), max_size=3))
    strides = [draw(st.integers(0, 9)) for _ in sizes]
    reach = sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
    while reach >= room:
        sizes.pop(), strides.pop()
        reach = sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
    offset = draw(st.integers(0, room - 1 - reach))
    return torch.empty(0, dtype=dtype).set_(
        BYTES.untyped_storage(), offset, tuple(sizes), tuple(strides)
    )


BYTES = torch.zeros(STORAGE, dtype=torch.uint8)


def places(tensor: Tensor) -> list[int]:
    """The byte at which each element begins, one by one."""
    ranges = (range(size) for size in tensor.shape)
    offsets = (sum(map(operator.mul, at, tensor.stride())) for at in product(*ranges))
    return [(tensor.storage_offset() + offset) * tensor.element_size() for offset in offsets]


def touched(tensor: Tensor) -> set[int]:
    size = tensor.element_size()
    return {start + i for start in places(tensor) for i in range(size)}


@pytest.mark.slow
@given(st.lists(views(), min_size=1, max_size=5), st.booleans())
@settings(max_examples=400)
def test_overlaps_are_those_found_byte_by_byte(drawn: list[Tensor], marking: bool) -> None:
    for tensor in drawn:
        starts = places(tensor)
        assert memory.overlaps_itself(tensor) == (len(set(starts)) < len(starts))
    plain = [(str(i), t) for i, t in enumerate(drawn) if not memory.overlaps_itself(t)]
    expected = {
        frozenset((a, b))
        for (a, x), (b, y) in combinations(plain, 2)
        if not touched(x).isdisjoint(touched(y))
    }
    for x, y in combinations(drawn, 2):
        assert bool(memory.meeting([x], [y])) == (not touched(x).isdisjoint(touched(y)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "FEW", 0 if marking else 32)
        found = memory.overlap(plain)
    assert (frozenset(found) in expected) if found is not None else not expected


def test_a_pair_that_takes_too_long_counts_as_overlapping(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = torch.zeros(100)
    pair = [("v", flat[::2]), ("w", flat[1::2])]
    assert memory.overlap(pair) is None
    monkeypatch.setattr(memory, "MOST_STEPS", 0)
    assert memory.overlap(pair) == ("v", "w")


@pytest.mark.parametrize("steps", [1, 2])
def test_work_on_many_tensors_is_counted(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of one flat buffer are compared with none, columns of one matrix are marked."""
    compared = 0
    overlap = memory._overlap

    def counted(*pair: Any) -> bool:
        nonlocal compared
        compared += 1
        return overlap(*pair)

    monkeypatch.setattr(memory, "_overlap", counted)
    flat = torch.zeros(2000 * steps, 2)
    assert memory.overlap((f"s{i}", part) for i, part in enumerate(flat)) is None
    columns = torch.zeros(2, 1000 * steps)
    assert memory.overlap((f"c{i}", part) for i, part in enumerate(columns.t())) is None
    assert compared == 0
