"""Tests run two at a time: one thread each."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Generator, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
# A process that a shell started in the background ignores Ctrl-C, and so do its children. Then the
# tests that send SIGINT would test nothing.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile(
    "polyak",
    deadline=None,  # a busy machine is no bug
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("polyak")


_TORCH = tuple(map(int, version("torch").split(".")[:2]))
# What torch itself warns of in other versions than the one that is pinned.
WARNINGS = {
    "TypedStorage is deprecated:UserWarning": _TORCH < (2, 13),  # its writer of folders
    "torch.distributed is unavailable or uninitialized:UserWarning": _TORCH < (2, 9),  # as above
    "Guards may run slower:RuntimeWarning": sys.version_info[:3] == (3, 13, 0),  # torch.compile
    "`torch.jit.\\w+` is not supported in Python 3.14:FutureWarning": sys.version_info >= (3, 14),
    # torch's writer of folders flushes a file that a failed write has closed; Python 3.13 tells that.
    "Exception ignored (in.|while finalizing file) <torch.distributed.checkpoint"
    ":pytest.PytestUnraisableExceptionWarning": sys.version_info >= (3, 13),
}


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Nearly all that a collection makes stays: to look for garbage amid it is in vain."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish() -> None:
    """What stays until the end is not looked through again by every collection of garbage."""
    gc.collect()
    gc.freeze()


def pytest_configure(config: pytest.Config) -> None:
    for message, here in WARNINGS.items():
        if here:
            config.addinivalue_line("filterwarnings", f"ignore:{message}")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _modes_stay() -> Iterator[None]:
    """A test that leaves torch's grad mode off is named, and not those that come after it."""
    import torch

    yield
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    torch.set_grad_enabled(True)
    assert modes == (True, False)


@pytest.fixture
def lone_rank(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    import torch

    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
