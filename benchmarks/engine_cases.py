"""The measurements: other packages, several averages, `applied()`, a training step, growing work."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine_measure import (
    Call,
    Timing,
    available_bytes,
    extra_bytes,
    interleaved,
    resident_bytes,
    seconds,
)
from engine_models import VOCABULARY, Gpt2, Workload, floating, tiny
from engine_peers import DECAY, libraries
from polyak import Averager, Exponential
from polyak.theory import half_life, profile

FRACTION = 1 - DECAY
WARM_UP = 3
TRAIN_TOKENS, TRAIN_EVERY, PROFILE_STEPS = 64, 16, 16_001
SCALE_ELEMENTS = 2_500_000


@dataclass(frozen=True)
class Cost:
    """The cost of an update: time, and peak extra bytes by torch's allocator and by the kernel."""

    timing: Timing
    extra: int
    resident: int


@dataclass(frozen=True)
class PeerTable:
    """Costs by library, for float32 and for bfloat16 weights; a text if there is no cost.

    `limits` are the times of one copy, and of one change in place, of a float32 tensor as large as
    all weights.
    """

    workload: Workload
    parameters: int
    limits: dict[str, Timing]
    costs: dict[str, tuple[Cost | str, Cost | str]]


def peers(workload: Workload, rounds: int) -> PeerTable:
    """Measures every library's update against one raw float32 foreach lerp of the same shapes."""
    model = workload.make()
    live = floating(model)
    yardstick = _warm(raw_lerps(live, 1))
    flat = torch.ones(sum(tensor.numel() for tensor in live))
    other = flat.clone()
    whole = {"a copy": lambda: other.copy_(flat), "a change in place": flat.neg_}
    limits = interleaved(yardstick, whole, rounds, workload.calls)
    columns = [
        _peer_costs(model.to(dtype), dtype == torch.bfloat16, yardstick, rounds, workload.calls)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    return PeerTable(
        workload,
        sum(parameter.numel() for parameter in model.parameters()),
        limits,
        {name: (columns[0][name], columns[1][name]) for name in columns[0]},
    )


def _peer_costs(
    model: nn.Module, wide: bool, yardstick: Call, rounds: int, times: int
) -> dict[str, Cost | str]:
    updates: dict[str, Call] = {}
    costs: dict[str, Cost | str] = {}
    for name, build in libraries().items():
        costs[name] = "not installed"
        if build is not None:
            try:
                updates[name] = _warm(build(model, wide))
            except RuntimeError:
                costs[name] = "raises"
    timings = interleaved(yardstick, updates, rounds, times)
    for name, update in updates.items():
        costs[name] = Cost(timings[name], extra_bytes(update), resident_bytes(update))
    return costs


def _warm(update: Call) -> Call:
    """Makes the first calls, which copy and allocate, and returns the update."""
    for _ in range(WARM_UP):
        update()
    return update


def raw_lerps(live: Sequence[Tensor], averages: int) -> Call:
    """The yardstick: one foreach lerp for each average, over lists that were made once."""
    weights = [tensor.clone() for tensor in live] if averages == 1 else list(live)
    slots = [[tensor.clone() for tensor in live] for _ in range(averages)]

    def lerp() -> None:
        for each in slots:
            torch._foreach_lerp_(each, weights, FRACTION)

    return lerp


@dataclass(frozen=True)
class Several:
    """k averages in one pass, against k raw float32 lerps.

    `narrow` has bfloat16 weights and float32 averages.
    """

    workload: str
    k: int
    timing: Timing
    narrow: Timing

    @property
    def bytes_ratio(self) -> float:
        """The ratio of bytes moved, (1 + 2k) / 3k: the live weights are read once."""
        return (1 + 2 * self.k) / (3 * self.k)


def several(k: int, workload: Workload, rounds: int) -> Several | None:
    """Measures k averages of a model; None if they and their yardstick do not fit into memory."""
    model = workload.make()
    live = floating(model)
    if not _fits((3 * k + 2) * _bytes(live)):
        return None
    rules = {f"average {i}": Exponential(DECAY) for i in range(k)}
    models = {"wide": model, "narrow": workload.make().to(torch.bfloat16)}
    updates = {name: _warm(Averager(each, rules).update) for name, each in models.items()}
    lerp = _warm(raw_lerps(live, k))
    timings = interleaved(lerp, updates, rounds, workload.calls)
    return Several(workload.name, k, timings["wide"], timings["narrow"])


@dataclass(frozen=True)
class Applied:
    """`applied()`: each direction against a raw copy of the weights, and the peak extra memory."""

    workload: str
    copy_seconds: float
    enter: float
    leave: float
    extra: int


def applied(workload: Workload, rounds: int) -> Applied:
    """Measures entering and leaving `applied()`."""
    model = workload.make()
    averager = Averager(model, Exponential(DECAY))
    averager.update()
    live = floating(model)
    aside = [tensor.clone() for tensor in live]

    def copy() -> None:
        torch._foreach_copy_(aside, live)

    def there_and_back() -> None:
        with averager.applied():
            pass

    _warm(there_and_back)
    units, enters, leaves = [], [], []
    for _ in range(rounds):
        block = averager.applied()
        units.append(seconds(copy))
        enters.append(seconds(block.__enter__) / units[-1])
        units.append(seconds(copy))
        leaves.append(seconds(lambda b=block: b.__exit__(None, None, None)) / units[-1])  # type: ignore[misc]
    return Applied(
        workload.name,
        statistics.median(units),
        statistics.median(enters),
        statistics.median(leaves),
        extra_bytes(there_and_back),
    )


@dataclass(frozen=True)
class Share:
    """The share of training time that averaging takes, and half-lives with and without a cadence."""

    step_seconds: float
    share: float
    half_lives: tuple[float, float]


def training_share(blocks: int) -> Share:
    """Measures the share of `update()` in training GPT-2 small on one sequence with AdamW."""
    model = Gpt2()
    optimizer = torch.optim.AdamW(model.parameters())
    averager = Averager(model, Exponential(DECAY), every=TRAIN_EVERY)
    steps, shares = [], []
    for block in range(blocks + 1):
        trained = averaged = 0.0
        for _ in range(TRAIN_EVERY):
            trained += seconds(lambda: _train_step(model, optimizer))
            averaged += seconds(averager.update)
        if block > 0:  # the first update allocates
            steps.append(trained / TRAIN_EVERY)
            shares.append(averaged / (trained + averaged))
    rule = Exponential(DECAY)
    lives = [half_life(profile(rule, PROFILE_STEPS, every=every)) for every in (1, TRAIN_EVERY)]
    return Share(statistics.median(steps), statistics.median(shares), (lives[0], lives[1]))


def _train_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    tokens = torch.randint(VOCABULARY, (1, TRAIN_TOKENS + 1))
    logits = model(tokens[:, :-1])
    optimizer.zero_grad()
    functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    optimizer.step()


@dataclass(frozen=True)
class Growth:
    """Seconds per unit of work at each size, and the same relative to the yardstick."""

    unit: str
    seconds: dict[int, float]
    relative: dict[int, float]

    @property
    def spread(self) -> float:
        """The most expensive unit over the cheapest."""
        return max(self.relative.values()) / min(self.relative.values())


def growth_in_parameters(sizes: Sequence[int], rounds: int) -> Growth:
    """Measures growing numbers of parameters, in tensors of one size."""
    return _growth("parameter", sizes, _large_model, _large_model(sizes[0]), rounds)


def growth_in_tensors(sizes: Sequence[int], rounds: int) -> Growth:
    """Measures growing numbers of tiny tensors."""
    return _growth("tensor", sizes, tiny, tiny(1000), rounds)


def _large_model(parameters: int) -> nn.Module:
    tensors = parameters // SCALE_ELEMENTS
    return nn.ParameterList(torch.randn(SCALE_ELEMENTS) for _ in range(tensors))


def _growth(
    unit: str,
    sizes: Sequence[int],
    make: Callable[[int], nn.Module],
    reference: nn.Module,
    rounds: int,
) -> Growth:
    yardstick = raw_lerps(floating(reference), 1)
    found: dict[int, Timing] = {}
    for size in sizes:
        gc.collect()
        if unit == "tensor" or _fits(2 * 4 * size):
            update = _warm(Averager(make(size), Exponential(DECAY)).update)
            found[size] = interleaved(yardstick, {unit: update}, rounds, _repeats(unit, size))[unit]
            del update
    return Growth(
        unit,
        {size: timing.seconds / size for size, timing in found.items()},
        {size: timing.ratio / size for size, timing in found.items()},
    )


def _repeats(unit: str, size: int) -> int:
    """Calls per timing: enough for a timing to be long against the clock's resolution."""
    return max(1, 20_000 // size) if unit == "tensor" else 1


def _fits(needed: int) -> bool:
    return available_bytes() > 1.25 * needed


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
