"""Objects of unknown classes as what they hold: their attributes, and a module as its state dict."""

from __future__ import annotations

from typing import Any

from polyak.checkpoints._torch_save.pickles import LEAST_VALUES, Aside, Dictionary
from polyak.checkpoints._torch_save.tensors import Storage, StoredTensor

_LEVELS = 100
_OF_A_MODULE = ("_parameters", "_buffers", "_modules")


def opened(value: object, size: int) -> object:
    """The value of a pickle of `size` bytes, in which objects that hold tensors are mappings.

    An object is the mapping of its attributes; a module is that of its parameters, its persistent buffers and
    those of its modules, as in its `state_dict()`. Lists and dictionaries are changed in place. An object in
    a state dict stays as it is: only its own code could say which tensor it is.

    Raises `ValueError` if modules within modules repeat the same parts over and over.
    """
    return _Opening(LEAST_VALUES + 8 * size).of(value, 0)[0]


class _Opening:
    """Opens each object once; what contains itself stays as it is."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._done: dict[int, tuple[Any, bool]] = {}
        self._states: set[int] = set()
        self._kept: list[
            object
        ] = []  # so that no other object has the identity of one that is done

    def of(self, value: Any, depth: int) -> tuple[Any, bool]:
        """A value, opened, and whether it has tensors."""
        if isinstance(value, (StoredTensor, Storage)) or (
            isinstance(value, Aside) and value.tensor
        ):
            return value, True
        if not isinstance(value, (dict, list, tuple)) or depth > _LEVELS:
            return value, False
        if id(value) not in self._done:
            self._kept.append(value)
            self._done[id(value)] = value, False  # for what contains itself
            if isinstance(value, Aside) and not value:
                self._done[id(value)] = self._object(value, depth)
            elif isinstance(value, tuple):
                parts = [self.of(part, depth + 1) for part in value]
                changed = any(new is not old for (new, _), old in zip(parts, value, strict=True))
                made = tuple(new for new, _ in parts) if changed else value
                self._done[id(value)] = made, any(has for _, has in parts)
            else:
                self._done[id(value)] = value, self._items(value, depth)
        return self._done[id(value)]

    def _items(self, value: dict[Any, Any] | list[Any], depth: int) -> bool:
        """Open what a dictionary or a list holds; whether it has tensors."""
        places = list(value) if isinstance(value, dict) else range(len(value))
        parts = {place: self.of(value[place], depth + 1) for place in places}
        tensors = [new for new, _ in parts.values() if isinstance(new, StoredTensor)]
        if not any(tensor.spec.numel > 1 for tensor in tensors):
            for place, (new, _) in parts.items():
                if new is not value[place]:
                    value[place] = new
        return any(has for _, has in parts.values())

    def _object(self, value: Aside, depth: int) -> tuple[Any, bool]:
        """Its attributes, if it has tensors there; an object that was made of tensors stays as it is."""
        parts = [self.of(part, depth + 1) for part in value.parts]
        has = any(has for _, has in parts)
        attributes = _attributes([new for new, _ in parts[2:]])
        if attributes is None or not has or any(has for _, has in parts[:2]):
            return value, has
        if all(isinstance(attributes.get(key), dict) for key in _OF_A_MODULE):
            return self._state(attributes), True
        return attributes, True

    def _state(self, attributes: Dictionary) -> Dictionary:
        """The state dict of a module: its modules are opened already."""
        parameters, buffers, modules = (attributes[key] for key in _OF_A_MODULE)
        passing = attributes.get("_non_persistent_buffers_set", ())
        state = Dictionary()
        kept = {name: held for name, held in buffers.items() if name not in passing}
        for name, held in {**parameters, **kept}.items():
            if held is not None:
                state[name] = held
        for name, module in modules.items():
            if id(module) in self._states:
                for inner, held in module.items():
                    state[f"{name}.{inner}"] = held
            elif self.of(module, 0)[1]:
                state[name] = module
        self._room -= len(state)
        if self._room < 0:
            raise ValueError("it repeats the same parts over and over")
        self._kept.append(state)
        self._states.add(id(state))
        return state


def _attributes(states: list[Any]) -> Dictionary | None:
    """The attributes of an object by what sets them: a dictionary, or one for slots behind it."""
    if len(states) != 1:
        return None
    parts = states[0] if isinstance(states[0], tuple) else states
    if not all(part is None or type(part) is Dictionary for part in parts):
        return None
    made = Dictionary()
    for part in filter(None, parts):
        made.update(part)
    return made
