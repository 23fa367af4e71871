"""Pickles read as data: nothing that they name is imported, called or changed.

A pickle is a program for a small machine. Python's own machine (`pickle.Unpickler`, in C) runs it
here, after two changes that make it harmless:

1. A name means what the reader's table says. Any other name becomes an `Aside`, in place of the
   object that only its own code could make.
2. The program is checked first (`_torch_save.programs`). Dictionaries and sets become ones that refuse deep
   keys: the hash of `(t, t)` with `t = (u, u)`, and so on 60 times, would never end.
"""

from __future__ import annotations

import gc
import io
import pickle
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from polyak.checkpoints._torch_save.programs import checked

_KEY_PARTS = 16
_MOST_NAMES = 10_000
_DEPTH = 100
LEAST_VALUES = 1_000_000
"""How many values a pickle may have when written out, beside 8 for each of its bytes."""
_SCALARS = frozenset({str, int, float, bool, bytes, type(None)})


class Sealed(type):
    """The type of every class that a pickle can name: no instruction can set its attributes."""

    def __setattr__(cls, name: str, value: object) -> None:
        raise ValueError(f"it sets an attribute of {cls.__qualname__[:200]}")


class Inert(metaclass=Sealed):
    """An object that a pickle can refer to, and do nothing with."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        # Without this, BUILD would set attributes, also those in `__slots__`, after they were checked.
        raise ValueError(f"it sets attributes of a {type(self).__name__}")


class Maker(Inert):
    """A function that a pickle can call by its name."""

    __slots__ = ("_function", "name")

    def __init__(self, name: str, function: Callable[..., object]) -> None:
        self.name = name
        self._function = function

    def __call__(self, *arguments: object) -> object:
        return self._function(*arguments)


class Dictionary(dict[Any, Any]):
    """A dictionary of a pickle; the attributes of a subclass are left out."""

    __slots__ = ()

    def __setitem__(self, name: object, value: object) -> None:
        dict.__setitem__(self, name if type(name) in _SCALARS else key(name), value)

    def __setstate__(self, state: object) -> None:
        pass


class Aside(Dictionary, metaclass=Sealed):
    """An object of an unknown class: its name, what it was made of, its items if it has any.

    `tensor` says that it is a tensor.
    """

    __slots__ = ("parts",)
    __hash__ = object.__hash__  # type: ignore[assignment]
    name = ""
    tensor = False
    parts: list[Any]

    def __new__(cls, *arguments: object, **named: object) -> Aside:
        made = super().__new__(cls)
        made.parts = [arguments, named]
        return made

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__()

    def __eq__(self, other: object) -> bool:
        return self is other

    def __call__(self, *arguments: object) -> Aside:
        return type(self)(self, *arguments)

    def __setstate__(self, state: object) -> None:
        self.parts.append(state)

    append = extend = add = __setstate__


def aside(name: str, *, tensor: bool = False) -> type[Aside]:
    """The class of the objects of an unknown name."""
    names = {"__slots__": (), "name": name[:200], "tensor": tensor}
    made: Any = Sealed(name.rpartition(".")[2] or "_", (Aside,), names)
    return cast("type[Aside]", made)


def name_of(value: object) -> str:
    """Name a value of a pickle: by the name of the object that was set aside, or by its type."""
    if isinstance(value, (Aside, Maker, Sealed)):
        return str(getattr(value, "name", "an object"))
    return "dict" if isinstance(value, dict) else type(value).__name__


def key(value: Any) -> Any:
    """The value, if it may be a key: small and flat, since the hash of a deep tuple may never end."""
    kind = type(value)
    if kind in _SCALARS or isinstance(kind, Sealed) or kind is Sealed:
        return value  # objects and classes of ours have the plain hash of an object
    if kind is tuple and len(value) <= _KEY_PARTS and all(type(v) in _SCALARS for v in value):
        return value
    if kind.__module__ == "torch" and isinstance(value, Hashable):  # a dtype, a device
        return value
    raise ValueError(f"the pickle has a key of type {kind.__name__}")


def load(
    data: bytes,
    known: Mapping[str, object],
    elsewhere: Callable[[object], object] | None = None,
    start: int = 0,
) -> tuple[object, int]:
    """The value of the pickle that begins at a place in the data, and where it ends.

    `known` says what names mean: a class or a `Maker`, to be called, or a value. `elsewhere` gives what
    lies outside the pickle, from what the pickle says of it.

    >>> load(pickle.dumps({"a": [1, 2.5, None]}), {})[0]
    {'a': [1, 2.5, None]}
    >>> load(pickle.dumps(print), {})[0].name
    'builtins.print'

    Raises `ValueError` for a damaged pickle and for one that asks for too much, `EOFError` if the data
    end before the pickle.
    """
    with _explained():
        program, end = checked(data, start)
    with no_collection(), _explained(EOFError):
        return _Unpickler(program, known, elsewhere).load(), end


@contextmanager
def _explained(*others: type[Exception]) -> Iterator[None]:
    """Errors of a pickle say what to do."""
    errors: tuple[type[Exception], ...] = (
        pickle.UnpicklingError, LookupError, TypeError, AttributeError, ValueError, *others,
    )  # fmt: skip
    try:
        yield
    except errors as error:
        raise ValueError(
            f"its pickle is damaged, or torch.save did not write it ({str(error)[:200]}): copy or fetch the file "
            "again, or save its weights anew where it can be loaded"
        ) from None


class _Unpickler(pickle.Unpickler):
    """Python's unpickler, whose names and persistent objects are ours."""

    def __init__(
        self,
        program: bytes,
        known: Mapping[str, object],
        elsewhere: Callable[[object], object] | None,
    ) -> None:
        super().__init__(io.BytesIO(program), encoding="latin1")
        self._known = known
        self._elsewhere = elsewhere
        self._asides: dict[str, type[Aside]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in NAME_MAPPING:  # Python 2's names, which protocol 2 keeps
            module, name = NAME_MAPPING[module, name]
        text = f"{IMPORT_MAPPING.get(module, module)}.{name}"
        if text in self._known:
            return self._known[text]
        if text not in self._asides:
            if len(self._asides) == _MOST_NAMES:
                raise ValueError(f"the pickle names more than {_MOST_NAMES} unknown objects")
            self._asides[text] = aside(text)
        return self._asides[text]

    def persistent_load(self, identity: object) -> object:
        if identity is None:
            return Dictionary()
        if identity is True:
            return set()
        if type(identity) is tuple and len(identity) == 2:
            return _set(*identity)
        if self._elsewhere is None:
            raise ValueError("the pickle has tensor storages, which are not expected here")
        return self._elsewhere(identity)


def _set(target: Any, items: Any) -> object:
    """Add items to a set; items with None make a frozen set."""
    if type(target) is set and type(items) is tuple:
        target.update(map(key, items))
        return target
    if type(target) is tuple and items is None:
        return frozenset(map(key, target))
    raise ValueError("the pickle describes a set in an unknown way")


@contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection: it would look through a growing pile of objects again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def survey(value: object, size: int) -> dict[str, int]:
    """Count the objects that were set aside, by name.

    Raises `ValueError` for a structure that contains itself, is deeper than 100 levels, or would be far
    larger than the `size` bytes of its pickle if it were written out.
    """
    asides: Counter[str] = Counter()
    sizes: dict[int, int] = {}

    def measure(value: object, depth: int) -> int:
        """How many values it is when written out; each part is visited once."""
        if isinstance(value, (str, bytes, bytearray)):
            return len(value)
        if isinstance(value, (Sealed, Maker)):
            asides[name_of(value)] += 1
        if not isinstance(value, (dict, list, tuple, set, frozenset)):
            return 1
        if id(value) not in sizes:
            if depth == _DEPTH:
                raise ValueError(f"it is nested in more than {_DEPTH} levels, or contains itself")
            if isinstance(value, Aside):
                asides[value.name] += 1
            parts = value.values() if isinstance(value, dict) else value
            sizes[id(value)] = 1 + sum(1 + measure(part, depth + 1) for part in parts)
            if sizes[id(value)] > LEAST_VALUES + 8 * size:
                raise ValueError("it repeats the same parts over and over")
        return sizes[id(value)]

    with _explained():
        measure(value, 0)
    return dict(asides)
