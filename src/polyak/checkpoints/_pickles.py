"""Pickles read as what they say: nothing that they name is imported, called or changed.

A pickle is a program for a small machine. Here its calls stay data: `Call("torch.Size", ((2, 3),))` is
what was to be called with what, and the reader decides what that means (`meaning`). A name that the
reader does not know is refused where it stands, whether it would have been called or not.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Container
from typing import Any, NamedTuple, Protocol

_KEY_PARTS = 16
SCALARS = (str, int, float, bool, bytes, type(None))


class Readable(Protocol):
    """What a pickle is read from."""

    def read(self, size: int, /) -> bytes: ...
    def readline(self) -> bytes: ...


class Name(NamedTuple):
    """A class or function that a pickle names: "torch._utils._rebuild_tensor_v2"."""

    text: str


class Persistent(NamedTuple):
    """What a pickle says lies elsewhere: a storage, in torch's files."""

    identity: object


class Call:
    """What a pickle would have had called: a name, arguments, then the state and items to set."""

    __slots__ = ("arguments", "items", "name", "state")

    def __init__(self, name: str, arguments: tuple[Any, ...]) -> None:
        self.name = name
        self.arguments = arguments
        self.state: object = None
        self.items: list[tuple[object, object]] = []


def read(
    file: Readable, known: Container[str], elsewhere: list[Persistent] | None = None
) -> object:
    """The pickle that begins here, as data; the file is left where it ends.

    `elsewhere` gets what it says lies elsewhere, in order.

    >>> import io, pickle
    >>> read(io.BytesIO(pickle.dumps({"a": [1, 2.5, None]})), known=())
    {'a': [1, 2.5, None]}
    >>> read(io.BytesIO(pickle.dumps(print)), known=())
    Traceback (most recent call last):
    ValueError: it asks for 'builtins.print'; polyak never runs code from a file, so save the weights
    alone, as a state_dict or in safetensors

    Raises `ValueError` for a name that is not `known`, and for what is no whole pickle of protocol
    2 to 5.
    """
    machine = _Machine(known, elsewhere if elsewhere is not None else [])
    try:
        for opcode, argument, _ in pickletools.genops(file):  # type: ignore[arg-type]
            machine.step(opcode.name, argument)
        return machine.result()
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"the pickle is damaged ({error})") from None


class _Machine:
    """The stack and the memory of the machine that a pickle is a program for."""

    def __init__(self, known: Container[str], elsewhere: list[Persistent]) -> None:
        self._known = known
        self._elsewhere = elsewhere
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memory: dict[int, Any] = {}

    def step(self, opcode: str, argument: Any) -> None:
        if opcode in _PUSHED:
            self._stack.append(argument)
        elif opcode in _CONSTANTS:
            self._stack.append(_CONSTANTS[opcode]())
        elif opcode in _CALLED:
            _CALLED[opcode](self)
        elif opcode in _CALLED_WITH:
            _CALLED_WITH[opcode](self, argument)
        elif opcode not in _IGNORED:
            raise ValueError(f"the pickle has the instruction {opcode}, which is not read")

    def result(self) -> object:
        if len(self._stack) != 1 or self._below:
            raise ValueError("the pickle is damaged (it ends in the middle)")
        return self._stack.pop()

    def mark(self) -> None:
        self._below.append(self._stack)
        self._stack = []

    def pop(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._marked()

    def pop_mark(self) -> None:
        self._marked()

    def dup(self) -> None:
        self._stack.append(self._stack[-1])

    def memoize(self) -> None:
        self._memory[len(self._memory)] = self._stack[-1]

    def put(self, place: int) -> None:
        self._memory[place] = self._stack[-1]

    def get(self, place: int) -> None:
        self._stack.append(self._memory[place])

    def append(self) -> None:
        item = self._stack.pop()
        self._target(list).append(item)

    def extend(self) -> None:
        items = self._marked()
        self._target(list).extend(items)

    def add(self) -> None:
        items = self._marked()
        self._target(set).update(map(key, items))

    def freeze(self) -> None:
        items = frozenset(map(key, self._marked()))
        self._stack.append(items)

    def set_item(self) -> None:
        value, name = self._stack.pop(), self._stack.pop()
        self._set([name, value])

    def set_items(self) -> None:
        self._set(self._marked())

    def _set(self, flat: list[Any]) -> None:
        target = self._stack[-1]
        pairs = zip(map(key, flat[::2]), flat[1::2], strict=True)
        if type(target) is Call:
            target.items.extend(pairs)
        else:
            self._target(dict).update(pairs)

    def pack(self) -> None:
        items = tuple(self._marked())
        self._stack.append(items)

    def last(self, count: int) -> None:
        if len(self._stack) < count:
            raise LookupError("the stack is too short")
        self._stack[-count:] = [tuple(self._stack[-count:])]

    def name(self, named: str) -> None:
        self._name(*named.split(" ", 1))

    def name_above(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if type(module) is not str or type(name) is not str:
            raise TypeError("a name that is no text")
        self._name(module, name)

    def _name(self, module: str, name: str) -> None:
        text = f"{_RENAMED.get(module, module)}.{name}"
        if text not in self._known:
            raise ValueError(
                f"it asks for {text[:200]!r}; polyak never runs code from a file, so save the weights "
                "alone, as a state_dict or in safetensors"
            )
        self._stack.append(Name(text))

    def call(self) -> None:
        arguments, name = self._stack.pop(), self._stack.pop()
        if type(name) is not Name or type(arguments) is not tuple:
            raise TypeError("a call of what is no name")
        self._stack.append(Call(name.text, arguments))

    def build(self) -> None:
        state = self._stack.pop()
        self._target(Call).state = state

    def elsewhere(self) -> None:
        self._elsewhere.append(Persistent(self._stack.pop()))
        self._stack.append(self._elsewhere[-1])

    def _marked(self) -> list[Any]:
        items, self._stack = self._stack, self._below.pop()
        return items

    def _target(self, kind: type) -> Any:
        if type(self._stack[-1]) is not kind:
            raise TypeError(f"a {type(self._stack[-1]).__name__} where a {kind.__name__} belongs")
        return self._stack[-1]


_PUSHED = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
    "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
    "BYTEARRAY8",
}  # fmt: skip
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_CALLED: dict[str, Callable[[_Machine], None]] = {
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "POP_MARK": _Machine.pop_mark,
    "DUP": _Machine.dup,
    "MEMOIZE": _Machine.memoize,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.extend,
    "ADDITEMS": _Machine.add,
    "FROZENSET": _Machine.freeze,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "TUPLE": _Machine.pack,
    "TUPLE1": lambda machine: machine.last(1),
    "TUPLE2": lambda machine: machine.last(2),
    "TUPLE3": lambda machine: machine.last(3),
    "STACK_GLOBAL": _Machine.name_above,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.elsewhere,
}
_CALLED_WITH: dict[str, Callable[[_Machine, Any], None]] = {
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "GLOBAL": _Machine.name,
}
_IGNORED = {"PROTO", "FRAME", "STOP"}
_RENAMED = {"__builtin__": "builtins"}  # Python 2's name, which protocol 2 keeps


def key(value: Any) -> Any:
    """The value, if it may be a key: small and flat, as the hash of a deep one takes for ever."""
    if isinstance(value, SCALARS) or type(value) in (Call, Name):
        return value
    short = type(value) is tuple and len(value) <= _KEY_PARTS
    if short and all(isinstance(part, SCALARS) for part in value):
        return value
    raise ValueError(f"the pickle has a key of type {type(value).__name__}")
