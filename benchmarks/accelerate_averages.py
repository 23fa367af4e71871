"""polyak beside what people average with in a loop of Accelerate: prints a table.

    python benchmarks/accelerate_averages.py

Accelerate has no average of its own. `EMAModel` stands as in diffusers' training scripts: a step after each
optimizer step, an evaluation between `store`, `copy_to` and `restore`, and hooks that save and load the
folder `unet_ema`. ema-pytorch's `EMA` is given to `register_for_checkpointing`, and its `ema_model` is
evaluated. Time is the processor's, in rounds that take turns, as a ratio to the loop without an average.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")

import torch  # noqa: E402
from accelerate import Accelerator  # type: ignore[import-untyped] # noqa: E402
from diffusers import UNet2DModel  # noqa: E402
from diffusers.training_utils import EMAModel  # noqa: E402
from diffusers.utils.logging import set_verbosity_error  # noqa: E402
from ema_pytorch import EMA  # noqa: E402
from torch import Tensor  # noqa: E402

import polyak  # noqa: E402
from in_training import State, furthest, held, in_turns  # noqa: E402
from polyak.integrations.accelerate import register  # noqa: E402

DECAY, STEPS, ROUNDS = 0.9, 16, 5


class Nothing:
    """A loop without an average."""

    def __init__(self, accelerator: Any, net: Any, optimizer: Any) -> None:
        self.accelerator, self.net, self.optimizer = accelerator, net, optimizer

    def step(self) -> None: ...

    @contextmanager
    def evaluated(self) -> Iterator[Any]:
        yield self.net

    def average(self) -> State:
        return dict(self.net.named_parameters())


class Ours(Nothing):
    """polyak."""

    def __init__(self, accelerator: Any, net: Any, optimizer: Any) -> None:
        super().__init__(accelerator, net, optimizer)
        self.averager = polyak.Averager(net, {"ema": f"exponential({DECAY})"})
        self.averager.attach(optimizer)
        register(accelerator, self.averager)

    @contextmanager
    def evaluated(self) -> Iterator[Any]:
        with self.averager.applied():
            yield self.net

    def average(self) -> State:
        return self.averager.average()


class Diffusers(Nothing):
    """`EMAModel` as the training scripts of diffusers use it."""

    def __init__(self, accelerator: Any, net: Any, optimizer: Any) -> None:
        super().__init__(accelerator, net, optimizer)
        made = EMAModel(
            net.parameters(), decay=DECAY, model_cls=UNet2DModel, model_config=net.config
        )
        self.ema: Any = made

        def saving(_models: Any, _weights: Any, folder: str) -> None:
            made.save_pretrained(f"{folder}/unet_ema")

        def loading(_models: Any, folder: str) -> None:
            found = EMAModel.from_pretrained(f"{folder}/unet_ema", UNet2DModel)
            made.load_state_dict(found.state_dict())

        accelerator.register_save_state_pre_hook(saving)
        accelerator.register_load_state_pre_hook(loading)

    def step(self) -> None:
        self.ema.step(self.net.parameters())

    @contextmanager
    def evaluated(self) -> Iterator[Any]:
        self.ema.store(self.net.parameters())
        self.ema.copy_to(self.net.parameters())
        yield self.net
        self.ema.restore(self.net.parameters())

    def average(self) -> State:
        names = [name for name, _ in self.net.named_parameters()]
        return dict(zip(names, self.ema.shadow_params, strict=True))


class EmaPytorch(Nothing):
    """`EMA` of ema-pytorch among the objects that Accelerate saves."""

    def __init__(self, accelerator: Any, net: Any, optimizer: Any) -> None:
        super().__init__(accelerator, net, optimizer)
        self.ema = EMA(
            net, beta=DECAY, update_after_step=0, update_every=1, include_online_model=False
        )
        accelerator.register_for_checkpointing(self.ema)

    def step(self) -> None:
        self.ema.update()

    @contextmanager
    def evaluated(self) -> Iterator[Any]:
        yield self.ema.ema_model

    def average(self) -> State:
        return dict(self.ema.ema_model.named_parameters())


MAKE: dict[str, type[Nothing]] = {
    "no average": Nothing, "polyak": Ours, "`EMAModel`": Diffusers, "ema-pytorch": EmaPytorch,
}  # fmt: skip


class Run:
    """A small U-Net that learns to predict noise, always from the same weights and batches."""

    def __init__(self, make: type[Nothing]) -> None:
        torch.manual_seed(0)
        net: Any = UNet2DModel(
            8, 1, 1, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
        self.accelerator = Accelerator(cpu=True)
        optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
        self.net, self.optimizer = self.accelerator.prepare(net, optimizer)
        self.averaged = make(self.accelerator, self.net, self.optimizer)
        self.marks: list[float] = []

    def loss(self, net: Any, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        noise, levels = (torch.randn(16, 1, 8, 8, generator=generator) for _ in range(2))
        predicted = net(noise + levels, torch.full((16,), step)).sample
        return torch.nn.functional.mse_loss(predicted, noise)

    def train(self, first: int = 0, last: int = STEPS) -> Run:
        for step in range(first, last):
            begun = time.process_time()
            self.accelerator.backward(self.loss(self.net, step))
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.averaged.step()
            self.marks.append(1e3 * (time.process_time() - begun))
        return self


def copied(state: State) -> State:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def after_exception(make: type[Nothing]) -> str:
    """What the model has after an exception in the evaluation of the average."""
    run = Run(make).train()
    before = copied(dict(run.net.named_parameters()))
    with suppress(KeyError), run.averaged.evaluated():
        raise KeyError("in an evaluation")
    return "live" if furthest(dict(run.net.named_parameters()), before) == 0 else "the average"


def resumed(make: type[Nothing], folder: Path) -> float:
    """How far the average of a resumed run is from that of one without a stop, at most."""
    whole = copied(Run(make).train().averaged.average())
    Run(make).train(0, STEPS // 2).accelerator.save_state(str(folder))
    run = Run(make)
    run.accelerator.load_state(str(folder))
    return furthest(run.train(STEPS // 2).averaged.average(), whole)


def crossed(saves: type[Nothing], loads: type[Nothing], folder: Path) -> str:
    """What happens to a folder that a run of another kind has saved."""
    Run(saves).train(0, 2).accelerator.save_state(str(folder))
    try:
        Run(loads).accelerator.load_state(str(folder))
    except Exception as error:
        return type(error).__name__
    return "loads"


ROWS: dict[str, Callable[[type[Nothing], Path], str]] = {
    "an exception in an evaluation leaves in the model": lambda make, _: after_exception(make),
    "the average of a resumed run differs by at most": lambda make, at: f"{resumed(make, at):.1g}",
    "its folder, in a run without averages": lambda make, at: crossed(make, Nothing, at),
    "a folder of a run without averages": lambda make, at: crossed(Nothing, make, at),
}


def main() -> None:
    set_verbosity_error()
    torch.set_num_threads(1)
    clocks = in_turns(MAKE, ROUNDS, lambda make: Run(make).train().marks[4:])
    bytes_held = {name: held(Run(make).train) for name, make in MAKE.items()}
    base, *names = MAKE
    one = sum(tensor.nbytes for tensor in Run(Nothing).averaged.average().values())
    ratios = [f"{clocks[name] / clocks[base]:.2f}" for name in names]
    copies = [f"{(bytes_held[name] - bytes_held[base]) / one:.1f}" for name in names]
    print(f"| | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    print(f"| time of a step, to that without an average | {' | '.join(ratios)} |")
    print(f"| copies of the weights held | {' | '.join(copies)} |")
    for title, measure in ROWS.items():
        with tempfile.TemporaryDirectory() as folder:
            cells = [measure(MAKE[name], Path(folder, str(at))) for at, name in enumerate(names)]
        print(f"| {title} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
