"""Averages in Lightning: a callback that averages, evaluates, saves and resumes.

    average = AveragerCallback({"ema": "exponential(half_life=500)"})
    best = ModelCheckpoint(monitor="val_loss/ema")
    Trainer(callbacks=[average, best]).fit(model)

A module that logs `val_loss` then has `val_loss` of the live weights and `val_loss/ema` of the average.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

from polyak import checkpoints
from polyak._checks import require
from polyak.averager import Averager
from polyak.integrations import _lightning_files as files
from polyak.integrations._arguments import checked, is_named
from polyak.integrations._extra import extra
from polyak.integrations._lightning_optimizers import attach_all, warn_if_waiting
from polyak.integrations._measures import tell
from polyak.integrations._states import require_apart, take
from polyak.rules import Rule

with extra("lightning", "lightning"):
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

    from polyak.integrations._lightning_passes import Contents, renaming, unnoticed, wrap

__all__ = ["AveragerCallback"]


class AveragerCallback(Callback):
    """Average the module's weights after each optimizer step, and evaluate live weights and averages.

    Args:
        rule: a rule or its spec, or a mapping name -> rule. Several callbacks need different names.
        every: optimizer steps per update, as for `Averager`.
        start: optimizer steps (`trainer.global_step`) before the first update.
        separator: the text between a metric's name and the average's: `val_loss/ema`.
        change_rule: whether a resumed run may have another rule, as `polyak.load` takes it.
        options: the other arguments of `Averager`, such as `select`, `dtype`, `device` and `pull`.

    Every validation and test runs once for each average, without other callbacks, and then with the live
    weights and all callbacks. A `.ckpt` has the live weights under their plain names and the averages'
    state. Beside it each average is exported: `best.ckpt` and `best.ema.safetensors`.

    Raises `ValueError` or `TypeError` for bad arguments. When a run begins it raises `ValueError` for
    a name that another callback has, for DeepSpeed and FSDP 1, for a checkpoint of other averages or
    rules, and for one without averages after step `start`.
    """

    def __init__(
        self,
        rule: Rule | str | Mapping[str, Rule | str],
        *,
        every: int = 1,
        start: int = 0,
        separator: str = "/",
        change_rule: bool = False,
        **options: Any,
    ) -> None:
        # LightningCLI reads the source to find the options of `Averager`; it follows `dict(...)` alone.
        self._options = dict(every=every, **options)
        self._rules, self.start = checked(rule, start, self._options)
        require(bool(separator), "separator", separator, "a string that is not empty")
        self.names, self.separator, self._change_rule = list(self._rules), separator, change_rule
        self.averager: Averager | None = None
        """The averager, once training has begun or a checkpoint with averages was evaluated."""
        self._module: LightningModule | None = None
        self._state: dict[str, Any] = {}  # of a checkpoint, until there is a model to load it for
        self._attachment: Any = None
        self._metrics: dict[str, Contents] = {}
        self._owners: dict[str, str] = {}  # metric, as the module logged it, -> average

    def exported(self, checkpoint: Path | str, name: str | None = None) -> Path:
        """Return the file beside a checkpoint in which an average is exported.

        `name` is needed if there are several averages. Raises `ValueError` for an unknown name.
        """
        return files.exported(checkpoint, files.chosen(self.names, name))

    @property
    def state_key(self) -> str:
        return f"{type(self).__qualname__}({', '.join(self.names)})"

    def __getstate__(self) -> dict[str, Any]:
        """A copy has the state instead of the averager, which is bound to its model."""
        unbound = dict.fromkeys(("averager", "_module", "_attachment"))
        return {**vars(self), **unbound, "_metrics": {}, "_state": deepcopy(self.state_dict())}

    def setup(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        others = [each.names for each in _callbacks(trainer) if each is not self]
        require_apart(self.names, others, "two callbacks")
        if is_named(trainer.strategy, "DeepSpeedStrategy", "FSDPStrategy"):
            raise ValueError("DeepSpeed and FSDP 1 hide weights; use ModelParallelStrategy (FSDP2)")
        # Whether this run's checkpoint has a state of it is not known yet.
        self._restored, self._metrics = False, {}
        in_fit = trainer.fit_loop.epoch_loop.val_loop
        for loop in (in_fit, trainer.validate_loop, trainer.test_loop):
            wrap(loop, "run", partial(_evaluate, trainer, loop))
        wrap(trainer.strategy, "save_checkpoint", partial(_save, trainer))
        wrap(trainer.strategy, "remove_checkpoint", partial(_remove, trainer))

    def on_load_checkpoint(self, trainer: Trainer, _: Any, checkpoint: dict[str, Any]) -> None:
        prefix, ours = type(self).__qualname__, {each.state_key for each in _callbacks(trainer)}
        states = checkpoint["callbacks"]
        others = [key for key in states if key.startswith(prefix) and key not in ours]
        if others and self.state_key not in states:
            raise ValueError(
                f"{trainer.ckpt_path} has the averages of {', '.join(others)}, and none of "
                f"{self.state_key}; give the averages the names that they had"
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state, self._restored = state_dict, True
        self._owners |= state_dict.get("metrics", {})

    def state_dict(self) -> dict[str, Any]:
        if self.averager is None:
            return self._state
        state = {"sharded": True} if self.averager.sharded else self.averager.state_dict()
        return state | {"metrics": dict(self._owners)}

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.ckpt_path and not self._restored and trainer.global_step > self.start:
            raise ValueError(
                f"{trainer.ckpt_path} has no averages and is of step {trainer.global_step}, but they "
                f"start at step {self.start}; pass start={trainer.global_step} to begin them here"
            )
        tell(trainer.loggers, self._bound(trainer), trainer.estimated_stepping_batches - self.start)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if self._attachment is None and trainer.global_step >= self.start:
            self._attachment = attach_all(self._bound(trainer), trainer)

    def on_fit_end(self, trainer: Trainer, *_: Any) -> None:
        for line in files.bests(trainer.checkpoint_callbacks, self._owners):
            rank_zero_info(line)

    def teardown(self, *_: Any, **__: Any) -> None:
        if self._attachment is not None:
            self._attachment.remove()
            self._attachment = None

    on_exception = teardown

    def _bound(self, trainer: Trainer) -> Averager:
        """The averager of the trainer's model, with the state that a checkpoint had for it."""
        module = trainer.lightning_module
        if self.averager is None or self._module is not module:
            self.averager, self._module = Averager(module, self._rules, **self._options), module
        if self._state.get("sharded"):
            path = files.parts(str(trainer.ckpt_path), self.names)
            checkpoints.load(path, self.averager, change_rule=self._change_rule)
        elif self._state:
            take(self._state, self.averager, trainer.ckpt_path, change_rule=self._change_rule)
        self._state = {}
        return self.averager

    def _ready(self, trainer: Trainer) -> Averager | None:
        """The averager, if it has averages of the weights that are evaluated."""
        if trainer.state.fn != "fit" and trainer.ckpt_path and not self._restored:
            rank_zero_warn(f"{trainer.ckpt_path} has no averages: only live weights are evaluated")
            return None
        averager = self._bound(trainer) if self._state else self.averager
        if averager is not None and self._module is not trainer.lightning_module:
            raise ValueError(
                "the averages belong to another model; pass ckpt_path to use those of a checkpoint"
            )
        warn_if_waiting(averager, self._attachment)
        return averager if averager and averager.count else None

    def _passes(self, trainer: Trainer, loop: Any, run: Any, seen: dict[str, str]) -> Iterator[Any]:
        """Evaluate every average; yield what the loop returns. `seen` gets metric -> average."""
        if (averager := self._ready(trainer)) is None:
            return
        for name in self.names:

            def rename(metric: str, name: str = name) -> str:
                full = f"{metric}{self.separator}{name}"
                self._owners[full] = other = seen.setdefault(full, name)
                wanted = f"a name that no metric of {other!r} has: rename one of them"
                require(other == name, f"a metric of the average {name!r}", full, wanted)
                return full

            own = self._metrics.setdefault(name, [])
            alone = unnoticed(trainer, loop, [*_callbacks(trainer)], own)
            with alone, averager.applied(name), renaming(trainer.lightning_module, rename):
                result = run()
            yield result


def _callbacks(trainer: Any) -> list[AveragerCallback]:
    return [each for each in trainer.callbacks if isinstance(each, AveragerCallback)]


def _evaluate(trainer: Trainer, loop: Any, run: Callable[[], Any]) -> list[dict[str, Any]]:
    """Run an evaluation loop for every average, and last for the live weights."""
    seen: dict[str, str] = {}
    ours = [] if trainer.sanity_checking else _callbacks(trainer)
    passes = [out for each in ours for out in each._passes(trainer, loop, run, seen)]

    def own(metric: str) -> str:
        require(metric not in seen, "a metric of the module", metric, "a name that no average has")
        return metric

    # The live weights come last: EarlyStopping and ModelCheckpoint look at its end.
    with renaming(trainer.lightning_module, own):
        passes.append(run())
    return [{k: v for out in outs for k, v in out.items()} for outs in zip(*passes, strict=True)]


def _save(trainer: Trainer, save: Callable[..., None], state: Any, path: Any, **more: Any) -> None:
    place = str(trainer.strategy.broadcast(path))
    for each in _callbacks(trainer):
        files.write(place, each.averager, first=trainer.is_global_zero)
    save(state, path, **more)


def _remove(trainer: Trainer, remove: Callable[[Any], None], path: Any) -> None:
    remove(path)
    for each in _callbacks(trainer) if trainer.is_global_zero else ():
        files.remove(path, each.names)
