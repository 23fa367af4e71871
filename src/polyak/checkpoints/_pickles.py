"""Pickles read as data: nothing that they name is imported, called or changed.

A pickle is a program for a small machine. Python's own machine (`pickle.Unpickler`, in C) runs it
here, after two changes that make it harmless.

1. Every name means what a table of the reader says. A name that is not in the table becomes an
   `Aside`, which stands for the object that only its own code could make.
2. The program is checked instruction by instruction first (`_program`). Only instructions are let
   through that need no more memory than the file has bytes. Dictionaries and sets become ones of
   ours, which refuse deep keys: the hash of `(t, t)` with `t = (u, u)` and so on takes for ever.
"""

from __future__ import annotations

import gc
import io
import pickle
import re
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

_KEY_PARTS = 16
_MOST_NAMES = 10_000
_DEPTH = 100
_LEAST_VALUES = 1_000_000
_SCALARS = frozenset({str, int, float, bool, bytes, type(None)})


class Sealed(type):
    """The type of every class that a pickle can name: no instruction can set its attributes."""

    def __setattr__(cls, name: str, value: object) -> None:
        raise ValueError(f"it sets an attribute of {cls.__qualname__[:200]}")


class Inert:
    """An object that a pickle can refer to, and do nothing with."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        # Without this, BUILD would set attributes, of `__slots__` too, after they were checked.
        raise ValueError(f"it sets attributes of a {type(self).__name__}")


class Persistent(Inert):
    """What a pickle says lies elsewhere: a storage, in torch's files."""

    __slots__ = ("identity",)

    def __init__(self, identity: object) -> None:
        self.identity = identity


class Dictionary(dict[Any, Any]):
    """A dictionary of a pickle. Attributes that a subclass had are left out."""

    __slots__ = ()

    def __setitem__(self, name: object, value: object) -> None:
        dict.__setitem__(self, name if type(name) in _SCALARS else key(name), value)

    def __setstate__(self, state: object) -> None:
        pass


class Aside(Dictionary, metaclass=Sealed):
    """Stands for an object of a class that is not known here; only its name is known.

    If it was a dictionary of that class, its items are here. `parts` is what it was made of.
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

    def append(self, item: object) -> None:
        self.parts.append(item)

    extend = add = append


def load(
    data: bytes,
    known: Mapping[str, object],
    elsewhere: Callable[[Persistent], object] | None = None,
) -> object:
    """The value of a pickle, with plain dictionaries, lists, tuples, sets and scalars.

    `known` says what names mean: a class or a `Maker`, to be called with arguments, or a value. `elsewhere` gives the value of what lies elsewhere.

    >>> import pickle
    >>> load(pickle.dumps({"a": [1, 2.5, None]}), {})
    {'a': [1, 2.5, None]}
    >>> load(pickle.dumps(print), {}).name
    'builtins.print'

    Raises `ValueError` for a damaged pickle and for one that asks for too much.
    """
    value, _ = load_first(data, known, elsewhere)
    return value


def load_first(
    data: bytes,
    known: Mapping[str, object],
    elsewhere: Callable[[Persistent], object] | None = None,
    start: int = 0,
) -> tuple[object, int]:
    """The value of the pickle that begins at a place in the data, and where it ends.

    Raises `EOFError` if the data ends before the pickle does.
    """
    program, end = _program(data, start)
    with no_collection():
        try:
            return _Unpickler(program, known, elsewhere).load(), end
        except (pickle.UnpicklingError, EOFError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"the pickle is damaged ({str(error)[:200]})") from None


class Maker(Inert, metaclass=Sealed):
    """A function that a pickle can call by its name, and do nothing else with."""

    __slots__ = ("_function", "name")

    def __init__(self, name: str, function: Callable[..., object]) -> None:
        self.name = name
        self._function = function

    def __call__(self, *arguments: object) -> object:
        return self._function(*arguments)


def aside(name: str, *, tensor: bool = False) -> type[Aside]:
    """The class that stands for objects of this name; `tensor` says that they are tensors."""
    short = name.rpartition(".")[2] or "_"
    kind: Any = Sealed(short, (Aside,), {"__slots__": (), "name": name[:200], "tensor": tensor})
    return cast("type[Aside]", kind)


def name_of(value: object) -> str:
    """What a value of a pickle is, in a word: the name of an object that was set aside, or a type."""
    if isinstance(value, (Aside, Maker, Sealed)):
        return str(getattr(value, "name", "an object"))
    return "dict" if isinstance(value, dict) else type(value).__name__


def key(value: Any) -> Any:
    """The value, if it may be a key: the hash of a deep tuple could take for ever."""
    kind = type(value)
    if kind in _SCALARS or isinstance(kind, Sealed) or kind is Sealed:
        return value  # objects and classes of ours have the plain hash of an object
    if kind is tuple and len(value) <= _KEY_PARTS and all(type(v) in _SCALARS for v in value):
        return value
    if isinstance(value, Hashable) and kind.__module__ == "torch":  # a dtype, a device
        return value
    raise ValueError(f"the pickle has a key of type {kind.__name__}")


class _Unpickler(pickle.Unpickler):
    """Python's unpickler, whose names and persistent objects are ours."""

    def __init__(
        self,
        program: bytes,
        known: Mapping[str, object],
        elsewhere: Callable[[Persistent], object] | None,
    ) -> None:
        super().__init__(io.BytesIO(program), encoding="latin1")
        self._known = known
        self._elsewhere = elsewhere
        self._asides: dict[str, type[Aside]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in NAME_MAPPING:  # Python 2's names, which protocol 2 keeps
            module, name = NAME_MAPPING[module, name]
        text = f"{IMPORT_MAPPING.get(module, module)}.{name}"
        return self._known[text] if text in self._known else self._aside(text)

    def persistent_load(self, identity: object) -> object:
        if identity is None:
            return Dictionary()
        if identity is True:
            return set()
        if type(identity) is tuple and len(identity) == 2:
            return _set(*identity)
        if self._elsewhere is None:
            raise ValueError("the pickle has storages, which do not belong here")
        return self._elsewhere(Persistent(identity))

    def _aside(self, text: str) -> type[Aside]:
        if text not in self._asides:
            if len(self._asides) == _MOST_NAMES:
                raise ValueError(f"the pickle names more than {_MOST_NAMES} unknown objects")
            self._asides[text] = aside(text)
        return self._asides[text]


def _set(target: Any, items: Any) -> object:
    """A set with more items, or from items and None a frozen one."""
    if type(target) is set and type(items) is tuple:
        target.update(map(key, items))
        return target
    if type(target) is tuple and items is None:
        return frozenset(map(key, target))
    raise ValueError("the pickle has a set that is described as no pickle does")


@contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection: it would look at a growing pile of objects again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _sized(width: int) -> bytes:
    """A pattern for a length below 256, in so many bytes, and as many bytes of content."""
    rest = rb"\0" * (width - 1)
    return b"|".join(re.escape(bytes([n])) + rest + b".{%d}" % n for n in range(256))


# Instructions that pass as they are. Those with a length of 256 or more, and those that change the
# machine's memory at a far place, are in `_RARE`. Never: PUT and GET in text, EXT, INST, OBJ, LIST,
# DICT and the other instructions of protocols 0 and 1; buffers outside the pickle.
_PLAIN = re.compile(
    rb"(?:[()012NQRabest\x81\x85-\x89\x93\x94\]u]|[Khq].|M..|[Jj].{4}|r..[\0-\3]\0|G.{8}|\x80[\0-\5]"
    rb"|[\x8c\x8aCU](?:" + _sized(1) + rb")|[XBT](?:" + _sized(4) + rb")"
    rb"|c[^\n]{0,500}\n[^\n]{0,500}\n){0,30000}",
    re.DOTALL,
)
_FIXED = {
    ord("}"): b"NQ",  # EMPTY_DICT: `persistent_load(None)`
    0x8F: b"\x88Q",  # EMPTY_SET: `persistent_load(True)`
    0x90: b"t\x86Q",  # ADDITEMS: `persistent_load((set, items))`
    0x91: b"tN\x86Q",  # FROZENSET: `persistent_load((items, None))`
    0x92: b"0\x81",  # NEWOBJ_EX without the named arguments
}
_LENGTHS = {ord("X"): 4, ord("B"): 4, ord("T"): 4, 0x8B: 4, 0x8D: 8, 0x8E: 8, 0x96: 8}
_FRAME, _STOP, _LONG_BINPUT = 0x95, ord("."), ord("r")
_RESTS = (bytes(300), b"\n\n")  # what completes an instruction that the end of the data has cut


def _program(data: bytes, start: int) -> tuple[bytes, int]:
    """The program that begins at a place in the data, made harmless, and where it ends.

    Raises `ValueError` for an instruction that is not let through, `EOFError` if the data ends.
    """
    out, place = [], start
    while True:
        end = _PLAIN.match(data, place).end()  # type: ignore[union-attr]  # it matches nothing too
        out.append(data[place:end])
        if end >= len(data):
            raise EOFError("the pickle does not end")
        code = data[end]
        if code in _FIXED:
            out.append(_FIXED[code])
            place = end + 1
        elif code == _FRAME:
            place = end + 9
        elif code == _STOP:
            break
        elif place == end:
            place = _rare_end(data, end, code)
            out.append(data[end:place])
        else:
            place = end
    body = b"".join(out) + b"."
    return b"\x80\x04\x95" + len(body).to_bytes(8, "little") + body, end + 1


def _rare_end(data: bytes, start: int, code: int) -> int:
    """Where an instruction ends that is not plain; raises for one that is not let through."""
    if code in _LENGTHS:
        content = start + 1 + _LENGTHS[code]
        end = content + int.from_bytes(data[start + 1 : content], "little")
    elif code == _LONG_BINPUT and int.from_bytes(data[start + 1 : start + 5], "little") <= start:
        end = start + 5
    elif any(_PLAIN.match(data[start:] + rest).end() for rest in _RESTS):  # type: ignore[union-attr]
        raise EOFError("the pickle does not end")  # it would pass if the data went on
    else:
        raise ValueError(f"the pickle has the instruction {bytes([code])!r}, which is not read")
    if end > len(data):
        raise EOFError("the pickle does not end")
    return end


def survey(value: object, size: int) -> dict[str, int]:
    """Counts the objects that were set aside, by name; raises `ValueError` for a hostile structure.

    That is one that contains itself, is deeper than 100 levels, or repeats its parts so often that
    written out it would be far larger than the `size` bytes of its file.
    """
    walk = _Walk(_LEAST_VALUES + 8 * size)
    walk.visit(value)
    return dict(walk.asides)


class _Walk:
    """A walk through a structure, each of its parts once."""

    def __init__(self, room: int) -> None:
        self.asides: Counter[str] = Counter()
        self._room = room
        self._path: list[object] = []
        self._open: set[int] = set()
        self._sizes: dict[int, int] = {}

    def visit(self, value: object) -> int:
        """Visit a value; returns how many values it is, written out."""
        if isinstance(value, (str, bytes, bytearray)):
            return len(value)
        parts = _parts(value)
        if parts is None:
            if isinstance(value, (Sealed, Maker)):
                self.asides[name_of(value)] += 1
            return 1
        if id(value) not in self._sizes:
            if isinstance(value, Aside):
                self.asides[value.name] += 1
            self._sizes[id(value)] = self._measure(value, parts)
        return self._sizes[id(value)]

    def _measure(self, value: object, parts: Iterable[tuple[object, object]]) -> int:
        if id(value) in self._open:
            raise ValueError(f"{self._where} contains itself")
        if len(self._open) >= _DEPTH:
            raise ValueError(f"{self._where}: nested in more than {_DEPTH} levels")
        self._open.add(id(value))
        size = 1
        for name, part in parts:
            self._path.append(name)
            size += 1 + self.visit(part)
            if size > self._room:
                raise ValueError(f"{self._where}: the same parts are repeated over and over")
            self._path.pop()
        self._open.remove(id(value))
        return size

    @property
    def _where(self) -> str:
        return ".".join(str(name)[:200] for name in self._path) or "the top"


def _parts(value: object) -> Iterable[tuple[object, object]] | None:
    """The parts of a container, with their keys or places."""
    if isinstance(value, dict):
        return value.items()
    return enumerate(value) if isinstance(value, (list, tuple, set, frozenset)) else None
