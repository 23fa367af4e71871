"""polyak beside what people average with in the Trainer of transformers: prints a table.

    python benchmarks/trainer_averages.py

diffusers' `EMAModel` and ema-pytorch's `EMA` stand in a callback, as their documentation uses them: an
update after each step, and an evaluation between `store`, `copy_to` and `restore`, or of `ema_model`. TRL's
`BEMACallback` is a column if trl is installed. Time is the processor's, so that other programs change
it little; it and memory are given as a ratio to the training without an average.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from shutil import rmtree
from typing import Any

warnings.simplefilter("ignore")

import torch  # noqa: E402
import transformers  # noqa: E402
from diffusers.training_utils import EMAModel  # noqa: E402
from ema_pytorch import EMA  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.data import Dataset, SequentialSampler  # noqa: E402
from transformers import (  # noqa: E402
    BertConfig,
    BertForSequenceClassification,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from in_training import State, furthest, held, in_turns  # noqa: E402
from polyak.integrations.transformers import AveragerCallback  # noqa: E402

DECAY, STEPS, EVERY, ROUNDS = 0.9, 20, 5, 3


class Rows(Dataset[dict[str, Tensor]]):
    """Random tokens; the label is whether the first is among the lower half."""

    def __init__(self, size: int) -> None:
        self._tokens = torch.randint(0, 64, (size, 16), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = self._tokens[index]
        return {"input_ids": tokens, "labels": (tokens[0] < 32).long()}


class InOrder(Trainer):
    """A Trainer that takes the rows in order."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


class Clock(TrainerCallback):
    """Notes the processor's time when a step begins."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.marks.append(time.process_time())


def model(*, frozen: bool = False) -> BertForSequenceClassification:
    """A transformer of 1.0 M weights without dropout."""
    torch.manual_seed(0)
    size: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4}
    none: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    made = BertForSequenceClassification(
        BertConfig(vocab_size=64, num_hidden_layers=5, max_position_embeddings=16, **size, **none)
    )
    made.bert.embeddings.requires_grad_(not frozen)
    return made


class Diffusers(TrainerCallback):
    """`EMAModel` as the training scripts of diffusers use it."""

    def attach(self, trainer: Trainer) -> None:
        net, evaluate = trainer.model, trainer.evaluate
        assert isinstance(net, nn.Module)
        self.ema = EMAModel(net.parameters(), decay=DECAY)

        def evaluating(*args: Any, **kwargs: Any) -> dict[str, float]:
            self.ema.store(net.parameters())
            self.ema.copy_to(net.parameters())
            found = evaluate(*args, **kwargs)
            self.ema.restore(net.parameters())
            return found

        trainer.evaluate = evaluating  # type: ignore[method-assign]
        trainer.add_callback(self)

    def on_step_end(self, *_: Any, model: nn.Module, **__: Any) -> None:  # type: ignore[override]
        self.ema.step(model.parameters())

    def average(self, net: nn.Module) -> State:
        names = [name for name, _ in net.named_parameters()]
        return dict(zip(names, self.ema.shadow_params, strict=True))


class EmaPytorch(TrainerCallback):
    """`EMA` of ema-pytorch, whose `ema_model` is evaluated in place of the model."""

    def attach(self, trainer: Trainer) -> None:
        evaluate = trainer.evaluate
        self.ema = EMA(trainer.model, beta=DECAY, update_after_step=0, update_every=1)

        def evaluating(*args: Any, **kwargs: Any) -> dict[str, float]:
            live, trainer.model = trainer.model, self.ema.ema_model
            found = evaluate(*args, **kwargs)
            trainer.model = live
            return found

        trainer.evaluate = evaluating  # type: ignore[method-assign]
        trainer.add_callback(self)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ema.update()

    def average(self, _: nn.Module) -> State:
        return dict(self.ema.ema_model.named_parameters())


class Ours(AveragerCallback):
    """polyak's callback."""

    def __init__(self) -> None:
        super().__init__({"ema": f"exponential({DECAY})"})

    def average(self, _: nn.Module) -> State:
        assert self.averager is not None
        return self.averager.average("ema")


MAKE: dict[str, Callable[[], Any]] = {
    "no average": lambda: None,
    "polyak": Ours,
    "`EMAModel`": Diffusers,
    "ema-pytorch": EmaPytorch,
}
if find_spec("trl"):
    from trl import BEMACallback  # type: ignore[import-not-found,unused-ignore]

    class Bema(BEMACallback):  # type: ignore[misc,unused-ignore]
        """TRL's callback."""

        def attach(self, trainer: Trainer) -> None:
            trainer.add_callback(self)

        def average(self, _: nn.Module) -> State:
            return dict(self.running_model.named_parameters())

    MAKE["`BEMACallback`"] = lambda: Bema(update_freq=1)


class Fails(TrainerCallback):
    """Raises in the first evaluation, in the pass whose number it is given."""

    def __init__(self, at: int) -> None:
        self._left = at

    def on_prediction_step(self, *_: Any, **__: Any) -> None:
        self._left -= 1
        if self._left == 0:
            raise KeyError("in an evaluation")


class StopAt(TrainerCallback):
    """Stops the training after a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        control.should_training_stop |= state.global_step >= self._step


def trainer_of(
    callback: Any, folder: Path, *more: TrainerCallback, frozen: bool = False, **options: Any
) -> Trainer:
    """A Trainer of `STEPS` steps on the same rows in the same order."""
    told: dict[str, Any] = {"max_steps": STEPS, "learning_rate": 1e-3, "max_grad_norm": 0.0}
    told |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_strategy": "no"}
    told |= {"per_device_train_batch_size": 16, "per_device_eval_batch_size": 64}
    told |= {"eval_steps": EVERY, "save_steps": EVERY, "save_strategy": "no"}
    args = TrainingArguments(str(folder), **(told | options))
    rows: dict[str, Any] = {"train_dataset": Rows(16 * STEPS), "eval_dataset": Rows(64)}
    trainer = InOrder(model(frozen=frozen), args, callbacks=list(more), **rows)
    trainer.remove_callback(PrinterCallback)
    if callback is not None:
        callback.attach(trainer)
    return trainer


def live(net: Any) -> State:
    return {name: tensor.detach().clone() for name, tensor in net.named_parameters()}


def after_exception(make: Callable[[], Any], folder: Path) -> str:
    """What the Trainer's model has after an exception in the evaluation of an average."""
    callback = make()
    at = 2 if isinstance(callback, AveragerCallback) else 1  # the live weights come first
    trainer = trainer_of(callback, folder, Fails(at), eval_strategy="steps")
    with suppress(KeyError):
        trainer.train()
    plain = trainer_of(None, folder, StopAt(EVERY))
    plain.train()
    return "live" if furthest(live(trainer.model), live(plain.model)) == 0 else "the average"


def resumed(make: Callable[[], Any], folder: Path) -> float:
    """How far the average of a resumed run is from that of one without a stop, at most."""
    found = []
    for stops in ([], [StopAt(STEPS // 2)], None):
        trainer = trainer_of(callback := make(), folder, *stops or (), save_strategy="steps")
        trainer.train(resume_from_checkpoint=stops is None)
        found.append({n: t.detach().clone() for n, t in callback.average(trainer.model).items()})
        if stops == []:
            rmtree(folder)
    return furthest(found[0], found[2])


def best(make: Callable[[], Any], folder: Path, metric: str) -> str:
    """Whether the model that was loaded as the best has the metric by which it was chosen."""
    every: dict[str, Any] = {"eval_strategy": "steps", "save_strategy": "steps"}
    trainer = trainer_of(
        make(), folder, load_best_model_at_end=True, metric_for_best_model=metric, **every
    )
    trainer.train()
    got, wanted = Trainer.evaluate(trainer)["eval_loss"], trainer.state.best_metric
    return "yes" if got == wanted else f"no: {got:.3f}, chosen by {wanted:.3f}"


def frozen(make: Callable[[], Any], folder: Path) -> str:
    """What a training with frozen embeddings does."""
    try:
        trainer_of(make(), folder, frozen=True).train()
    except Exception as error:
        return type(error).__name__
    return "trains"


def column(name: str, folder: Path) -> list[str]:
    make = MAKE[name]
    trainer = trainer_of(make(), folder / "metrics")
    trainer.train()
    found, of_live = trainer.evaluate(), Trainer.evaluate(trainer)
    metrics = [key for key in found if key.endswith("_loss")]
    what = "live" if found["eval_loss"] == of_live["eval_loss"] else "of the average"
    return [
        ", ".join([f"`eval_loss` ({what})", *(f"`{key}`" for key in metrics[1:])]),
        after_exception(make, folder / "exception"),
        f"{resumed(make, folder / 'resumed'):.1g}",
        best(make, folder / "best", metrics[-1]),
        frozen(make, folder / "frozen"),
    ]


TITLES = (
    "metrics of an evaluation",
    "an exception in it leaves in `trainer.model`",
    "the average of a resumed run differs by at most",
    "the model of `load_best_model_at_end` has the metric that chose it",
    "with frozen embeddings it",
)


def step_times(folder: Path, make: Callable[[], Any]) -> list[float]:
    """The processor's milliseconds of the steps of a training, but the first."""
    clock = Clock()
    trainer_of(make(), folder, clock).train()
    return [1e3 * (b - a) for a, b in pairwise(clock.marks)][5:]


def trained(folder: Path, make: Callable[[], Any]) -> object:
    """A Trainer after its training."""
    trainer = trainer_of(make(), folder)
    trainer.train()
    return trainer


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        clocks = in_turns(MAKE, ROUNDS, partial(step_times, at / "times"))
        bytes_held = {n: held(partial(trained, at / "held", make)) for n, make in MAKE.items()}
        columns = [column(name, at / name) for name in list(MAKE)[1:]]
    one = sum(tensor.nbytes for tensor in live(model()).values())
    first = next(iter(MAKE))
    print(f"| | {' | '.join(list(MAKE)[1:])} |\n|---|{'---|' * (len(MAKE) - 1)}")
    ratios = [f"{clocks[name] / clocks[first]:.2f}" for name in list(MAKE)[1:]]
    copies = [f"{(bytes_held[name] - bytes_held[first]) / one:.1f}" for name in list(MAKE)[1:]]
    print(f"| time of a step, to that without an average | {' | '.join(ratios)} |")
    print(f"| copies of the weights held | {' | '.join(copies)} |")
    for title, *cells in zip(TITLES, *columns, strict=True):
        print(f"| {title} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
