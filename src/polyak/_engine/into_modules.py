"""An average in a module of its own, copied into another module, or pulled into the model."""

from __future__ import annotations

from torch import nn

from polyak._engine import copying, open_swaps
from polyak._engine.averages import Averages
from polyak._engine.pulling import require_fraction
from polyak._engine.tracking import Source
from polyak._engine.twins import plain_copy
from polyak._modes import no_grad
from polyak._ranks.agreement import digest
from polyak._ranks.sharding import local


class IntoModules(Averages):
    """Averages that modules can have."""

    @open_swaps.in_turn
    def module(self, name: str | None = None, *, copy: bool = False) -> nn.Module:
        """Return the average as a module to call beside the model: a teacher, a target network.

        Its parameters and buffers are the average's own tensors, so it follows every update without a
        copy, inside `applied()` too. It has the model's structure without wrappers, is in eval mode
        and requires no gradients. Frozen and unselected tensors are the model's. BatchNorm normalises
        by the batch in train mode and never writes. A call returns the same module while it is
        referenced; a deep copy or a pickle of it is a plain module.

        It needs a rule with one slot in the weights' dtype and on their device. With `copy` it is a
        module of its own for every rule: `copy_to(module)` refreshes it.

        Raises `TypeError` for an averager of a mapping, `ValueError` for an average that no module
        can share and for a sharded model, `RuntimeError` before the first update, inside `applied()`,
        and for a model that cannot be copied. Writes to the module (an optimizer, `.to`, `.half`)
        raise at the next update.
        """
        model = self._live.model
        if not isinstance(model, nn.Module):
            raise TypeError(f"module: the averager is of a {type(model).__name__}, wanted a module")
        self._ready("module", self._get(name))
        if copy:
            copied = plain_copy("module", model, {id(self): None}).requires_grad_(False).eval()
            self.copy_to(copied, name)
            return copied
        module = self._twins.module(model, self._swapper.label(name), {id(self): None})
        self._call = self._with_pull(self._twins.call)
        return module

    @no_grad
    def copy_to(self, model: Source, name: str | None = None) -> None:
        """Write the average into a model for good, by name, rounded to the model's dtypes.

        The model may be the live one (training then continues from the average: Switch-EMA, Hare
        and Tortoise) or another with the same names and shapes, wrapped or not.

        Raises `ValueError` with the names that are missing, extra or of another shape, and
        `RuntimeError` before the first update and inside `applied()`. Collective with `shard`.
        """
        with self._together("copy_to") as agreement, open_swaps.TURN:
            whole = self._weights("copy_to", name).beside()
            average = {name: local(tensor) for name, tensor in whole.items()}
            found = copying.places(model, self._choice, self._live, average)
            forms = copying.gathered_forms(self._live, found)
            agreement.details = (
                f"{self._swapper.label(name)!r}, {self._get(name).tick}, {digest(forms)}"
            )
        copying.write_(found, average, self._live, self._mesh)

    @open_swaps.in_turn
    def pull(self, fraction: float, name: str | None = None) -> None:
        """Move the live weights towards the average: `live <- lerp(live, average, fraction)`.

        It moves what is averaged, and leaves copied buffers and the average as they are. After updates,
        `Averager(pull=Pull(...))` does it: Switch-EMA, Hare and Tortoise, Lookahead. Between `backward`
        and the optimizer's step, every step: PACE. `theory.feedback` has their variances.

        Raises `ValueError` for a fraction outside (0, 1] and with `shard`, and `RuntimeError` before the
        first update and inside `applied()`.
        """
        self._pull(require_fraction(fraction), name)
