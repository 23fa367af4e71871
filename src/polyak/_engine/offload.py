"""Slots in the host's memory while the weights are on a CUDA device.

The weights are copied on a separate stream into pinned memory, and a thread moves the slots when they
have arrived. The order that keeps this right:

1. the side stream begins after all work queued so far, so that it reads the weights of this step;
2. the next write to the weights waits, on the device, for the copy (`before_write`);
3. the staging memory is written again only when the slots have taken what it held (`join`).

The host waits only in `join`: at the next update, or when the average is read.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from polyak._tensors import Groups


class Arrival(Protocol):
    """A point in a device's work that the host can wait for."""

    def synchronize(self) -> None: ...


class Streams(Protocol):
    """The operations of a device that the courier needs."""

    def begin(self) -> None:
        """Lets the side stream begin after the work queued on the compute stream so far."""

    def copy(self, host: Tensor, device: Tensor) -> None:
        """Queues a copy on the side stream."""

    def mark(self) -> Arrival:
        """The point that the side stream has reached once all queued copies are done."""

    def hold(self, arrival: Arrival) -> None:
        """Lets the compute stream wait, on the device, for that point."""


class CudaStreams:
    """The streams of a CUDA device; the host never waits in any of these."""

    def __init__(self, device: torch.device) -> None:
        self._side = torch.cuda.Stream(device)
        self._device = device

    def begin(self) -> None:
        self._side.wait_stream(torch.cuda.current_stream(self._device))

    def copy(self, host: Tensor, device: Tensor) -> None:
        with torch.cuda.stream(self._side):
            host.copy_(device, non_blocking=True)
        device.record_stream(self._side)  # the allocator does not reuse its memory while it is read

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(self._side)
        return event

    def hold(self, arrival: Arrival) -> None:
        assert isinstance(arrival, torch.cuda.Event)
        torch.cuda.current_stream(self._device).wait_event(arrival)


class Courier:
    """Brings tensors to the host and runs a job on them there, beside the training.

    `held`, set anew before each `send`, says that `before_write` will be called before the tensors
    are written to; without that, the compute stream waits for the copy at once.
    """

    def __init__(self, streams: Streams) -> None:
        self.held = False
        self._streams = streams
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="polyak-offload")
        self._staging: Groups = []
        self._arrival: Arrival | None = None
        self._delivery: Future[None] | None = None

    def send(self, tensors: Groups, job: Callable[[Groups], None]) -> None:
        """Queues the copies, and the job on what arrives; waits for the job before."""
        self.join()
        self._stage(tensors)
        self._streams.begin()
        for hosts, devices in zip(self._staging, tensors, strict=True):
            for host, device in zip(hosts, devices, strict=True):
                self._streams.copy(host, device)
        arrival = self._arrival = self._streams.mark()
        if not self.held:
            self.before_write()
        self.held = False
        self._delivery = self._thread.submit(_deliver, arrival, job, self._staging)

    def before_write(self) -> None:
        """Keeps the device's next work from overtaking a copy that is under way."""
        if self._arrival is not None:
            self._streams.hold(self._arrival)
            self._arrival = None

    def join(self) -> None:
        """Waits until the last job is done; raises what it raised."""
        delivery, self._delivery = self._delivery, None
        if delivery is not None:
            delivery.result()

    def _stage(self, tensors: Groups) -> None:
        """Pinned memory in the tensors' shapes and dtypes, kept from one time to the next."""
        forms = [[(t.shape, t.dtype, t.stride()) for t in group] for group in tensors]
        if forms != [[(t.shape, t.dtype, t.stride()) for t in group] for group in self._staging]:
            self._staging = [[_pinned_like(t) for t in group] for group in tensors]


def _deliver(arrival: Arrival, job: Callable[[Groups], None], staging: Groups) -> None:
    arrival.synchronize()
    job(staging)


def _pinned_like(tensor: Tensor) -> Tensor:
    pinned = tensor.is_cuda
    return torch.empty_like(tensor, device="cpu", requires_grad=False, pin_memory=pinned)


def courier_for(tensors: Groups, device: torch.device | None) -> Courier | None:
    """A courier where all tensors are on one CUDA device and their slots in the host's memory."""
    places = {tensor.device for group in tensors for tensor in group}
    if device is None or device.type != "cpu" or len(places) != 1:
        return None
    (place,) = places
    return Courier(CudaStreams(place)) if place.type == "cuda" else None
