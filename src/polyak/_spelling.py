"""The common base of rules and schedules, which print as they were typed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from typing import Any, ClassVar
from weakref import WeakValueDictionary

from polyak._checks import as_number

KNOWN: WeakValueDictionary[str, type] = WeakValueDictionary()
"""Every class by its name in a spec; of two with one name, the one that was defined last."""


class Spec:
    """A frozen dataclass that prints as it was typed: `name(first, option=value)`.

    Options at their defaults are left out. Numbers of numpy or torch are stored as Python's, so
    that equal specs print, compare and hash alike. A subclass with its own `__post_init__` calls
    this one first.

    >>> from polyak.decays import InversePower
    >>> str(InversePower(power=0.75))
    'inverse_power(power=0.75)'
    """

    INSTEAD: ClassVar[tuple[str, ...]] = ()
    """Options that may be given instead of the first field, which is then computed from them."""

    CHECKS: ClassVar[Mapping[str, Callable[[str, Any], object]]] = {}
    """Field -> the check of its value alone."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        KNOWN[cls.spec_name()] = cls

    def __post_init__(self) -> None:
        for field in self._fields():
            self._set(field.name, as_number(getattr(self, field.name)))
        for name, check in self.CHECKS.items():
            check(f"{type(self).__name__}.{name}", getattr(self, name))

    SAVABLE: ClassVar[bool] = True
    """Whether `polyak.save` takes it. A class whose fields no text can tell sets it to False."""

    def savable(self) -> bool:
        """Whether `polyak.save` takes it, and all that is nested in it."""
        nested = (getattr(self, field.name) for field in self._fields())
        return self.SAVABLE and all(each.savable() for each in nested if isinstance(each, Spec))

    @classmethod
    def spec_name(cls) -> str:
        """The name of the class in a spec: `InversePower` -> `inverse_power`."""
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()

    def __str__(self) -> str:
        typed = self._typed()
        leading = [f for f, _ in typed if f.default is MISSING or f.name == self._computable()]
        parts = [f"{v}" if f in leading else f"{f.name}={v}" for f, v in typed]
        return f"{self.spec_name()}({', '.join(parts)})"

    def __repr__(self) -> str:
        parts = [f"{field.name}={value!r}" for field, value in self._typed()]
        return f"{type(self).__name__}({', '.join(parts)})"

    def _fields(self) -> list[Field[Any]]:
        """The fields that can be typed."""
        return [field for field in fields(self) if field.init]  # type: ignore[arg-type]

    def _typed(self) -> list[tuple[Field[Any], Any]]:
        """The fields that differ from their defaults and were not computed, with their values."""
        values = [(field, getattr(self, field.name)) for field in self._fields()]
        computed = self._computable() if self._instead() else None
        return [(f, v) for f, v in values if v != f.default and f.name != computed]

    def _computable(self) -> str | None:
        """The name of the field that another option may be given instead of."""
        return self._fields()[0].name if self.INSTEAD else None

    def _instead(self) -> list[str]:
        """The options that were given instead of the first field."""
        return [option for option in self.INSTEAD if getattr(self, option) is not None]

    def _compute_first(self, *ways: Callable[[Any], Any]) -> None:
        """Compute the first field from the option given instead, by the way that belongs to it.

        Raises `ValueError` unless exactly one of them is given.
        """
        first, given = str(self._computable()), self._instead()
        typed = getattr(self, first)
        computed = [
            way(getattr(self, option))
            for option, way in zip(self.INSTEAD, ways, strict=True)
            if option in given
        ]
        # `dataclasses.replace` passes both, and then they agree.
        if len(computed) == 1 and typed in (None, computed[0]):
            self._set(first, computed[0])
        elif computed or typed is None:
            names = ", ".join((first, *self.INSTEAD))
            got = [first] * (typed is not None) + given
            wanted = f"exactly one of {names}, got {' and '.join(got) or 'none'}"
            raise ValueError(f"{type(self).__name__} takes {wanted}")

    def _set(self, name: str, value: Any) -> None:
        """Set a field while the frozen dataclass is being made."""
        object.__setattr__(self, name, value)
