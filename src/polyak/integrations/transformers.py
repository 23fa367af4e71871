"""Averages in the Trainer of transformers: evaluated beside the live weights, saved and resumed with them.

    averages = AveragerCallback({"ema": "exponential(half_life=200)"}).attach(trainer)
    trainer.train()                                  logs eval_loss and eval_ema_loss

A checkpoint gets one more folder, `averages`. Its folder `ema` is the average as `save_pretrained`
writes a model, and its file `ema.safetensors` is the exact state.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from polyak.averager import Averager
from polyak.integrations._arguments import checked, require_kind
from polyak.integrations._card import write_card
from polyak.integrations._extra import extra
from polyak.integrations._measures import numbers
from polyak.integrations._states import AVERAGES, load_state, save_state
from polyak.integrations._trainer import hook, owner, require_possible, require_trained
from polyak.rules import Rule

with extra("transformers", "transformers", "accelerate"):
    from transformers import Trainer, TrainerCallback, TrainerState
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

__all__ = ["AveragerCallback"]


class AveragerCallback(TrainerCallback):
    """Average the weights that a `Trainer` trains; evaluate, save and resume the averages with it.

    After `attach(trainer)` the Trainer evaluates every average beside the live weights, and saves the
    averages wherever it saves the model. In `Trainer(callbacks=[...])` alone it averages, saves with
    the Trainer's checkpoints and resumes from them, but evaluates nothing.

    Args:
        rule: a `Rule` or its spec, or a mapping name -> rule. The name is in the metrics
            (`eval_<name>_loss`) and is the folder's. A single rule is called "average".
        start: optimizer steps before the first update. A run without averages is resumed with them if
            this is the step of its checkpoint.
        change_rule: whether a resumed run may have another rule, as `polyak.load` takes it.
        options: `every`, `dtype`, `select`, ... as `Averager` takes them.

    `averager` is the `Averager`. A new one is made when a training begins. Raises what `Averager` raises.
    """

    averager: Averager | None = None
    resume_from: Path | None = None
    """The checkpoint that `train` was given, if it was given a path."""

    def __init__(
        self,
        rule: Rule | str | Mapping[str, Rule | str],
        *,
        start: int = 0,
        change_rule: bool = False,
        **options: Any,
    ) -> None:
        self.rules, self._start = checked(rule, start, options)
        self._options = options
        self._change_rule = change_rule
        self.trainer: Trainer | None = None
        """The Trainer that the callback is attached to."""
        self._attachment: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy has the rules and options. It is attached to no Trainer and has no averager yet."""
        options = {"start": self._start, "change_rule": self._change_rule, **self._options}
        return vars(AveragerCallback(self.rules, **options))

    def attach(self, trainer: Trainer) -> Self:
        """Add the callback to a Trainer, which then evaluates and saves the averages.

        Raises `ValueError` if it is attached to another Trainer, and `TypeError` for another object.
        """
        require_kind("attach", "trainer", trainer, Trainer)
        if self.trainer not in (None, trainer):
            raise ValueError(
                "this callback is attached to another Trainer: give this one a deepcopy"
            )
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        self.trainer = trainer
        hook(trainer, AveragerCallback)
        return self

    def on_train_begin(self, args: Any, state: TrainerState, *_: Any, **at: Any) -> None:
        self._stop()
        self._args, self._state, self._model = args, state, at["model"]
        require_possible(self, args, state, None if self.trainer else self._best())
        self.averager = Averager(self._model, self.rules, **self._options)
        if state.global_step:
            self._load(self.resume_from or self._checkpoint(), state.global_step > self._start)
        self.on_step_begin(**at)
        if self.trainer is not None:
            self.trainer.log(numbers(self.averager, state.max_steps - self._start))

    def on_step_begin(self, *_: Any, **at: Any) -> None:
        if self.averager and self._attachment is None and self._state.global_step >= self._start:
            self._attachment = self.averager.attach(at["optimizer"])

    def on_save(self, *_: Any, **at: Any) -> None:
        if self.trainer is None:
            self.write(self._checkpoint(), at["model"].save_pretrained)

    def on_push_begin(self, *_: Any, **__: Any) -> None:
        for name in self.rules if self.averager else ():
            made = self._checkpoint() / AVERAGES / name
            if made.exists():  # the Trainer uploads `output_dir` without its checkpoints
                to = Path(self._args.output_dir, AVERAGES, name)
                shutil.copytree(made, to, dirs_exist_ok=True)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._stop()
        folder = self._state.best_model_checkpoint
        if self.averager and self._args.load_best_model_at_end and folder:
            best = self._best()  # the Trainer has loaded the live weights of that step
            self._load(Path(folder), best is not None)
            if best is not None:
                self.averager.copy_to(self._model, best)

    def ready(self) -> list[str]:
        """The names of the averages that can be evaluated or saved now."""
        if self.averager is None or self.averager.count == 0:
            return []
        require_trained(self._model, self.trainer)
        return list(self.rules)

    def write(self, folder: Path, save_model: Callable[[Path], object]) -> None:
        """Write every average to `folder/averages`, and the exact state if the folder is a checkpoint."""
        if self.averager is None:
            return
        writes = bool(self._args.should_save)
        for name in self.ready():
            made = folder / AVERAGES / name
            with self.averager.applied(name):
                save_model(made)
            if writes and made.exists():  # a Trainer that saves shards has written no model
                write_card(made, self.averager, name, self._state.global_step)
        if folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            save_state(folder, self.averager, writes=writes)

    def _stop(self) -> None:
        if self._attachment is not None:
            self._attachment.remove()
        self._attachment = None

    def _load(self, folder: Path, required: bool) -> None:
        assert self.averager is not None
        cure = f"to begin them here, pass start={self._state.global_step}"
        if self.trainer is None:
            cure += "; to resume from another folder than output_dir, call attach(trainer)"
        load_state(
            folder, self.averager, change_rule=self._change_rule, cure=cure if required else None
        )

    def _checkpoint(self) -> Path:
        return Path(self._args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self._state.global_step}")

    def _best(self) -> str | None:
        """The average whose metric decides which checkpoint is the best, if there is one."""
        metric = (self._args.metric_for_best_model or "").removeprefix("eval_")
        begun = vars(self._state).get("averages", [self])  # all callbacks of this training
        found = owner(metric, [name for each in begun for name in each.rules])
        return found if found in self.rules else None
