"""The order of offloading, on a simulated device that runs its streams as badly as it is allowed to.

Work is queued on two streams and run as late or as early as their waits permit. Whatever is not held
back by a wait then goes wrong, which the negative controls show. A real CUDA device is not needed,
and the real streams are tested where there is one.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from models import assert_same
from patience import HANG
from polyak import Averager, Exponential, Window
from polyak._engine.offload import Courier

RULES = {"ema": Exponential(0.5), "window": Window(3)}


class Point:
    """A point in a stream's work."""

    def __init__(self, device: Device, stream: str) -> None:
        self.device, self.stream, self.reached = device, stream, False

    def synchronize(self) -> None:
        self.device.run(self.stream, until=self)


class Device:
    """Two queues of work. `early` is the stream that runs as soon as it may; the other lags."""

    def __init__(self, early: str, *, begins: bool = True, holds: bool = True) -> None:
        self.early, self.begins, self.holds = early, begins, holds
        self.queues: dict[str, deque[Callable[[], None] | Point]] = {
            "compute": deque(),
            "side": deque(),
        }
        self.lock = threading.RLock()

    def queue(self, stream: str, work: Callable[[], None] | Point) -> None:
        with self.lock:
            self.queues[stream].append(work)
            self.run(self.early)

    def run(self, stream: str, until: Point | None = None) -> None:
        """Runs a stream to a point, or to its end; a point of the other stream is waited for."""
        with self.lock:
            while self.queues[stream] and not (until and until.reached):
                work = self.queues[stream].popleft()
                if not isinstance(work, Point):
                    work()
                elif work.stream == stream:
                    work.reached = True
                elif not work.reached:
                    self.run(work.stream, until=work)

    # What the courier asks for

    def begin(self) -> None:
        if self.begins:
            point = Point(self, "compute")
            self.queue("compute", point)
            self.queue("side", point)

    def copy(self, host: Tensor, device: Tensor) -> None:
        def copy() -> None:
            host.copy_(device.detach())

        self.queue("side", copy)

    def mark(self) -> Point:
        point = Point(self, "side")
        self.queue("side", point)
        return point

    def hold(self, arrival: object) -> None:
        assert isinstance(arrival, Point)
        if self.holds:
            self.queue("compute", arrival)


def averages_on(
    device: Device, monkeypatch: pytest.MonkeyPatch, *, attached: bool
) -> dict[str, dict[str, Tensor]]:
    """Averages of weights that a simulated device trains, offloaded to the host."""
    courier = Courier(device)
    monkeypatch.setattr("polyak._engine.updating.courier_for", lambda *_: courier)
    weights = {"w": torch.zeros(5), "v": torch.zeros(3, 2), "count": torch.tensor(0)}
    averager = Averager(weights, RULES, device="cpu", every=2)
    for step in range(12):
        if attached:
            averager._updating.before_step()
        device.queue("compute", lambda step=step: train(weights, step))  # type: ignore[misc]
        averager.update()
        if step == 6:
            averager.average("ema")  # a reader in between waits for what is under way
    return {name: averager.average(name) for name in RULES}


def train(weights: dict[str, Tensor], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    weights["w"] += torch.randn(5, generator=generator)
    weights["v"] -= torch.randn(3, 2, generator=generator)
    weights["count"] += 1


@pytest.fixture
def expected() -> dict[str, dict[str, Tensor]]:
    weights = {"w": torch.zeros(5), "v": torch.zeros(3, 2), "count": torch.tensor(0)}
    averager = Averager(weights, RULES, every=2)
    for step in range(12):
        train(weights, step)
        averager.update()
    return {name: averager.average(name) for name in RULES}


@pytest.mark.parametrize("early", ["compute", "side"])
@pytest.mark.parametrize("attached", [False, True])
def test_offloaded_averages_are_exact_in_any_order_that_is_allowed(
    early: str,
    attached: bool,
    expected: dict[str, dict[str, Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = averages_on(Device(early), monkeypatch, attached=attached)
    for name in RULES:
        assert_same(found[name], expected[name])


@pytest.mark.parametrize(
    ("early", "broken"), [("compute", {"holds": False}), ("side", {"begins": False})]
)
def test_without_a_wait_the_same_order_goes_wrong(
    early: str,
    broken: dict[str, bool],
    expected: dict[str, dict[str, Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = averages_on(Device(early, **broken), monkeypatch, attached=True)
    assert not torch.equal(found["ema"]["w"], expected["ema"]["w"])


@pytest.mark.parametrize("early", ["compute", "side"])
def test_buffers_that_the_forward_pass_writes_are_right(
    early: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(early)
    courier = Courier(device)
    monkeypatch.setattr("polyak._engine.updating.courier_for", lambda *_: courier)
    model = nn.BatchNorm1d(2)
    averager = Averager(model, Exponential(0.5), device="cpu")

    @torch.no_grad()
    def forward(step: int) -> None:
        model.get_buffer("num_batches_tracked").add_(1)
        model.get_buffer("running_mean").fill_(float(step))

    @torch.no_grad()
    def optimize(step: int) -> None:
        model.weight.fill_(float(step))

    for step in range(1, 5):
        device.queue("compute", partial(forward, step))
        averager._updating.before_step()
        device.queue("compute", partial(optimize, step))
        averager.update()
    device.queue("compute", partial(forward, 100))
    average = averager.average()
    assert average["weight"].tolist() == average["running_mean"].tolist() == [3.125, 3.125]
    assert average["num_batches_tracked"].item() == 4


@pytest.mark.parametrize("early", ["compute", "side"])
def test_once_detached_nothing_is_put_off(early: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(early)
    courier = Courier(device)
    monkeypatch.setattr("polyak._engine.updating.courier_for", lambda *_: courier)
    weights = nn.ParameterDict({"w": torch.zeros(2)})
    averager = Averager(weights, Exponential(0.5), device="cpu", every=2)
    attached = averager.attach(torch.optim.SGD(weights.parameters(), lr=0.1))
    averager._updating.before_step()
    averager.update()
    attached.remove()
    averager.update()

    def write() -> None:
        weights["w"].data.fill_(9.0)

    device.queue("compute", write)
    assert averager.average()["w"].tolist() == [0.0, 0.0]


def test_the_host_does_not_wait_in_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """The side stream never runs on its own here: an update that waited would run it."""
    device = Device("compute")
    courier = Courier(device)
    started, go_on = threading.Event(), threading.Event()
    deliver = Point.synchronize

    def slow(point: Point) -> None:
        started.set()
        go_on.wait(HANG)
        deliver(point)

    monkeypatch.setattr(Point, "synchronize", slow)
    monkeypatch.setattr("polyak._engine.updating.courier_for", lambda *_: courier)
    weights = {"w": torch.ones(2)}
    averager = Averager(weights, Exponential(0.5), device="cpu")
    averager.update()
    assert started.wait(HANG)  # and update() is back while the delivery still waits
    go_on.set()
    assert averager.average()["w"].tolist() == [1.0, 1.0]


def test_an_error_on_the_way_reaches_the_next_reader() -> None:
    courier = Courier(Device("compute"))

    def fails(_: object) -> None:
        raise ValueError("no room")

    courier.send([[torch.ones(1)]], fails)
    with pytest.raises(ValueError, match="no room"):
        courier.join()
    courier.join()


@pytest.mark.parametrize("nonfinite", [False, True])
def test_a_masked_update_travels_with_its_verdict(
    nonfinite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    courier = Courier(Device("compute"))
    monkeypatch.setattr("polyak._engine.updating.courier_for", lambda *_: courier)
    monkeypatch.setattr("polyak._engine.guard._deferred", lambda _: True)
    weights = {"w": torch.ones(2), "n": torch.tensor(1)}
    averager = Averager(weights, Exponential(0.5), device="cpu", nonfinite="skip")
    averager.update()
    weights["w"] *= float("nan") if nonfinite else 3.0
    weights["n"] += 1
    averager.update()
    found = averager.average()
    assert found["w"].tolist() == ([1.0, 1.0] if nonfinite else [2.0, 2.0])
    assert found["n"].item() == (1 if nonfinite else 2)
    assert averager.skipped == int(nonfinite)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("attached", [False, True])
def test_on_a_real_device(attached: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(512, 512) for _ in range(8)]).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    offloaded = Averager(model, RULES, device="cpu")
    beside = Averager(model, RULES)
    if attached:
        offloaded.attach(optimizer)
    for _ in range(50):
        model(torch.randn(64, 512, device="cuda")).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if not attached:
            offloaded.update()
        beside.update()
    for name in RULES:
        for key, tensor in beside.average(name).items():
            torch.testing.assert_close(offloaded.average(name)[key], tensor.cpu())
