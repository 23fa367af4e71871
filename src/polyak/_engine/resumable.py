"""Save and load averages, begin them, and continue them under another rule or on another device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from polyak import _tensors as tensors
from polyak._dtypes import require_slot_dtype, slot_dtype
from polyak._engine import changes, open_swaps
from polyak._engine.averages import Averages, as_device
from polyak._engine.rounding import require_rounding
from polyak._engine.states import STATE_FORMAT, State, checked, set_together
from polyak.rules import Rule
from polyak.specs import savable_rule


class Resumable(Averages):
    """Averages with a state: everything is checked before anything changes."""

    @open_swaps.in_turn
    def state_dict(self) -> dict[str, Any]:
        """Return rules, clocks and slots as data: plain dictionaries, numbers, strings and tensors.

        The tensors are the averager's own, as with `nn.Module.state_dict`: save or copy them before
        the next update. `torch.load(..., weights_only=True)` reads a saved state. The tensors of a
        sharded model are DTensors that share the slots' memory, for `torch.distributed.checkpoint`.
        Its `load` fills the state of an averager that has made its updates; then call
        `load_state_dict` with it.

        Raises `RuntimeError` inside `applied()`, where slots hold the live weights.
        """
        self._same_model("state_dict")
        self._twins.check("state_dict")
        for average in self._averages.values():
            average.refuse_damaged("state_dict")
        averages = {name: average.state(self._live) for name, average in self._averages.items()}
        state = {"format": STATE_FORMAT, **self._updating.state(), "averages": averages}
        state["every"] = self.every
        state |= {"run": self.run} if self.run else {}
        state |= {"pull": repr(self._options.pull)} if self._options.pull else {}
        return state | ({"mixed": True} if self.mixed else {})

    @open_swaps.in_turn
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state that `state_dict` returned; its tensors are copied into the slots' memory.

        Averages, rules, names, shapes, dtypes and the layouts of sharded tensors must agree.
        Everything is checked before anything changes. Raises `ValueError` with a list of differences.
        """
        new = self._checked(state)
        taken: list[tuple[object, dict[str, object]]] = [
            (average, average.taken(self._live, held.tick, held.slots))
            for average, held in zip(self._averages.values(), new.averages.values(), strict=True)
        ]
        updating = self._updating.taken(new.calls, new.elapsed, new.skipped, new.copies)
        own: dict[str, object] = {"run": new.run, "mixed": new.mixed}
        before = (
            [average.slots for average in self._averages.values()],
            self._updating.copies.tensors,
        )
        set_together([*taken, *updating, (self, own)])
        self._keep_memory(*before)

    @open_swaps.in_turn
    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise what `load_state_dict` would raise, and change nothing."""
        self._checked(state)

    @open_swaps.in_turn
    def begin(
        self,
        weights: Mapping[str, Tensor] | None = None,
        count: int = 1,
        name: str | None = None,
    ) -> None:
        """Begin the average from weights, as if `count` updates had made it; the weights are copied.

        Without weights it begins from the model's, so that there is an average before the first call
        of `update`. Give weights for a target network that begins apart from its model, for the
        average of another program, or after a change that `load_state_dict` refuses. Buffers that are
        not given are the model's. With several averages and no `name`, all of them begin. A rule of
        several slots takes count=1: the weights of its first update.

        Raises `ValueError` for names, shapes or dtypes that do not fit, and a count below 1;
        `RuntimeError` inside `applied()`.
        """
        labels = list(self._averages) if name is None else [self._swapper.label(name)]
        self._same_model("begin")
        given = set(weights or ())
        open_swaps.refuse_swapped(
            "begin", [i for i in self._live.stored() if given.isdisjoint(i.names)]
        )
        if weights is None:
            weights = {item.name: item.held() for item in self._live.stored()}
        copies = changes.given(weights, self._live, "copy")
        new = {
            label: changes.begun(weights, count, self._live, self._averages[label], self.every)
            for label in labels
        }
        if len(new) == len(self._averages):
            state: dict[str, Any] = {
                "format": STATE_FORMAT,
                "calls": 0,
                "elapsed": 0.0,
                "skipped": 0,
            }
            self.load_state_dict({**state, "copies": copies, "averages": new})
        else:
            state = self.state_dict()
            state["averages"] |= new
            state["copies"] = copies | state["copies"]
            self.load_state_dict(state)

    @open_swaps.in_turn
    def change_rule(self, rule: Rule | str, name: str | None = None) -> None:
        """Continue with another rule, from the present slots and clock.

        Raises `ValueError` if the rule needs other slots, `TypeError` for an object that is not a rule, and
        `RuntimeError` inside `applied()`.
        """
        average = self._get(name)
        self._same_model("change_rule")
        other = changes.ruled(average, savable_rule(rule))
        rule_and_clock = {key: getattr(other, key) for key in ("rule", "ours", "tick")}
        changed = other.rule != average.rule and average.tick.n > 0
        mixed: dict[str, object] = {"mixed": self.mixed or changed}
        set_together([(average, rule_and_clock), (self, mixed)])

    @open_swaps.in_turn
    def to(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> None:
        """Move the slots, present and future ones, to another dtype or device.

        Raises `ValueError` for a dtype or device that slots cannot have, or cannot have while `module()`
        shares them; `RuntimeError` inside `applied()`.
        """
        self._same_model("to")
        require_slot_dtype(dtype)
        place, options = as_device(device), self._options
        self._refuse_sharded(place, "allow")
        dtypes = {slot_dtype(i.local().dtype, dtype) for i in self._live.averaged}
        require_rounding(options.rounding, dtypes if dtype else set())
        averages = self._averages.values()
        new = changes.moved(self._live, averages, self._updating, dtype, place)
        options = options._replace(dtype=dtype or options.dtype, device=place or options.device)
        set_together([*new, (self, {"_options": options})])
        self._twins.settle()

    def _checked(self, state: Mapping[str, Any]) -> State:
        self._same_model("load_state_dict")
        new = checked(state, self._live, self._averages)
        for option, own in (("every", self.every), ("pull", repr(self._options.pull))):
            if (saved := state.get(option, own)) != own:
                raise ValueError(
                    f"load_state_dict: saved with {option}={saved}, this averager has {option}={own}: make "
                    "it with the same; polyak.load and the callbacks take change_rule=True to change it"
                )
        for name, average in self._averages.items():
            if average.shared() and not new.averages[name].tick.n:
                raise ValueError(
                    f"load_state_dict: average {name!r} has no update yet, and module({name!r}) has "
                    "its slots; delete that module first"
                )
        return new

    def _keep_memory(
        self, slots: Sequence[Mapping[str, list[Tensor]]], copies: list[Tensor]
    ) -> None:
        """Brings what was loaded into the memory that slots and copies had, which others may use."""
        averages = zip(self._averages.values(), slots, strict=True)
        copied = self._updating.copies
        kept: dict[str, object] = {"tensors": tensors.kept(copies, copied.tensors)}
        set_together([*((a, a.kept(before)) for a, before in averages), (copied, kept)])
        self._twins.settle()
