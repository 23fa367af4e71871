"""Tests run two at a time: one thread each."""

from __future__ import annotations

import os
import signal

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


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
