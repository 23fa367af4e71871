"""The rule for a call of another library, and what changes.

`polyak.theory.equivalents` goes the other way.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass

from polyak._checks import require
from polyak.rules import Rule
from polyak.theory._calls import parse_call
from polyak.theory._peer_classes import CLASSES

# Arguments that do not change the average.
_NO_MATTER = {
    "allow_different_devices", "coerce_dtype", "forward_method_names", "ignore_names",
    "ignore_startswith_names", "include_online_model", "lazy_init_ema", "model_cls", "model_config",
    "move_ema_to_online_device", "param_or_buffer_names_no_ema", "use_foreach", "foreach",
    "checkpoint_folder", "checkpoint_dtype", "stochastic_rounding", "annealing_epochs",
    "annealing_strategy", "device", "ema_fp32", "ema_seed_model", "frozen", "min_ema_multiplier",
    "max_ema_multiplier",
}  # fmt: skip


@dataclass(frozen=True)
class Migration:
    """The code that replaces another library's call. It prints with comments."""

    library: str
    """The full name of the class that was recognised."""
    rule: Rule | Mapping[str, Rule]
    """The rule for `Averager`, or several by name."""
    every: int = 1
    """Calls of `update` per update."""
    buffers: str = "auto"
    changes: tuple[str, ...] = ()
    """The differences from that call, a sentence each."""

    @property
    def code(self) -> str:
        """The constructor call, as Python source.

        >>> from_library("torch_ema.ExponentialMovingAverage(p, decay=0.99, use_num_updates=False)").code
        'polyak.Averager(model, "exponential(0.99)")'
        """
        rule = self.rule
        spec = f'"{rule}"' if isinstance(rule, Rule) else _as_code(rule)
        every = f", every={self.every}" if self.every > 1 else ""
        buffers = f', buffers="{self.buffers}"' if self.buffers != "auto" else ""
        return f"polyak.Averager(model, {spec}{every}{buffers})"

    def as_dict(self) -> dict[str, object]:
        """The fields and the code, as JSON has them; rules as text."""
        rule = self.rule
        specs = str(rule) if isinstance(rule, Rule) else {n: str(each) for n, each in rule.items()}
        return {**vars(self), "rule": specs, "changes": list(self.changes), "code": self.code}

    def __str__(self) -> str:
        return "\n".join([self.code, *(f"# {change}" for change in self.changes)])


def from_library(call: str) -> Migration:
    """Translate a call of another library's average, given as source text; nothing is run.

    The average is the same at every update, for floating-point parameters, except for what `changes`
    says. Arguments that do not change the average, such as a device, are passed over.

    >>> print(from_library("ema_pytorch.EMA(model, beta=0.995, update_after_step=3, update_every=1)"))
    polyak.Averager(model, "tail(exponential(inverse_power(max_decay=0.995)), 3)", buffers="average")

    Raises `ValueError` for what is not a call, a class that is not known, an argument that the class does
    not have, and an argument that decides the average and is not a literal (`args.decay`).
    """
    parsed = parse_call(call)
    library = _library_of(parsed.name)
    function = CLASSES[library]
    try:
        bound = inspect.signature(function).bind(*parsed.args, **parsed.kwargs)
    except TypeError as error:
        raise ValueError(f"{library}: {error}") from None
    for name, value in bound.arguments.get("others", {}).items():
        require(
            name in _NO_MATTER, f"{library}: the argument {name}", value, "an argument that it has"
        )
    return Migration(library, *function(*bound.args, **bound.kwargs))


def _library_of(name: str) -> str:
    """The class that a dotted name means; its last part is enough where only one has it."""
    first, last = name.split(".")[0], name.split(".")[-1]
    same = [library for library in CLASSES if library.split(".")[-1] == last]
    if len(same) > 1:
        same = [library for library in same if library.split(".")[0] == first] or same
    if len(same) != 1:
        problem = "may be several classes" if same else "is not known"
        raise ValueError(f"{name} {problem}, wanted one of: {', '.join(same or CLASSES)}")
    return same[0]


def _as_code(rules: Mapping[str, Rule]) -> str:
    return "{" + ", ".join(f'"{name}": "{rule}"' for name, rule in rules.items()) + "}"
