"""The state of a process that a library must not change: `python process_state.py`, in a finished run.

It runs every command in this process, and prints as JSON what each has left different.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polyak.cli import main

COMMANDS = {
    "help": ["--help"],
    "no command": [],
    "no such option": ["explain", "--no"],
    "explain": ["explain", "uniform()", "--steps", "50", "--out", "chart"],
    "explain, no folder": ["explain", "uniform()", "--steps", "50", "--out", "/dev/null/x"],
    "advise": ["advise", "--steps", "50", "--schedule", "cosine", "--out", "advice"],
    "migrate": ["migrate", "torch_ema.ExponentialMovingAverage(model.parameters(), decay=0.99)"],
    "inspect": ["inspect", "snapshots", "--json"],
    "average": ["average", "step-1.pt", "step-2.pt", "--out", "a.safetensors"],
    "average, exists": ["average", "step-1.pt", "step-2.pt", "--out", "a.safetensors"],
    "soup": ["average", "step-1.pt", "step-2.pt", "--out", "s", "--shard-size", "1kB", "--greedy", "judge:loss"],
    "synthesize": ["synthesize", "snapshots", "--rule", "uniform()", "--out", "u.safetensors"],
    "sweep": ["sweep", "snapshots", "--evaluate", "judge:loss", "--rule", "uniform()", "--out", "sweep"],
    "sweep that fails": ["sweep", "snapshots", "--evaluate", "judge:broken", "--rule", "uniform()", "--out", "b"],
    "sweep that exits": ["sweep", "snapshots", "--evaluate", "judge:leaves", "--rule", "uniform()", "--out", "l"],
    "sweep without its module": ["sweep", "snapshots", "--evaluate", "no:f", "--rule", "uniform()", "--out", "n"],
    "export": ["export", "average.safetensors", "e.safetensors"],
    "convert": ["convert", "ema.pt", "c.safetensors", "--rule", "uniform()", "--count", "1"],
    "diff": ["diff", "step-1.pt", "step-2.pt"],
    "shared by torchrun": ["average", "step-1.pt", "--out", "t.safetensors", "--torchrun"],
    "study": ["study", "article", "--seeds", "1", "--jobs", "1", "--out", "study"],
    "study list": ["study", "list"],
    "study run": ["study", "run", "noisy_quadratic", "--quick", "--seeds", "1", "--jobs", "1", "--out", "quick"],
    "study compare": ["study", "compare", "quick", "quick", "--out", "compared"],
    "study reproduce": ["study", "reproduce", "--jobs", "1", "--out", "reproduced"],
}  # fmt: skip


def open_files() -> list[str]:
    """Those with a path: gloo and vl_convert keep some sockets and pipes open."""
    links = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            links.append(str(entry.readlink()))
    return sorted(
        link for link in links if link.startswith("/") and not link.startswith(("/proc/", "/dev/"))
    )


def umask() -> int:
    os.umask(mask := os.umask(0))
    return mask


STATE: dict[str, Callable[[], Any]] = {
    "signal handlers": lambda: {str(s): str(signal.getsignal(s)) for s in signal.valid_signals()},
    "environment": lambda: dict(os.environ),
    "hooks": lambda: str([sys.excepthook, sys.displayhook, threading.excepthook, sys.unraisablehook]),
    "streams": lambda: [id(s) for s in (sys.stdin, sys.stdout, sys.stderr, sys.__stdout__)],
    "descriptors": lambda: {n: str(Path(f"/proc/self/fd/{n}").readlink()) for n in ("0", "1", "2")},
    "open files": lambda: open_files(),
    "search path": lambda: list(sys.path),
    "arguments": lambda: list(sys.argv),
    "folder": os.getcwd,
    "umask": lambda: umask(),
    "warnings": lambda: str(warnings.filters),
    "logging": lambda: str([logging.root.level, logging.root.handlers, logging.root.disabled]),
    "threads": lambda: sorted(t.name for t in threading.enumerate()),
    "random": lambda: str([random.getstate(), np.random.get_state(), torch.get_rng_state().tolist()]),
    "torch": lambda: str([
        torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(), torch.are_deterministic_algorithms_enabled(),
        torch.distributed.is_initialized(),
    ]),
    "collector": lambda: [gc.isenabled(), gc.get_threshold()],
    "recursion": sys.getrecursionlimit,
    "modules of the folder": lambda: [n for n in sys.modules if n == "judge"],
}  # fmt: skip


def state() -> dict[str, Any]:
    gc.collect()
    return {name: look() for name, look in STATE.items()}


def changed_by(arguments: list[str]) -> dict[str, str]:
    """The parts of the state that a command leaves different, each with what it was and is."""
    before = state()
    with contextlib.suppress(SystemExit):
        main(arguments)
    after = state()
    return {n: f"{before[n]} -> {after[n]}" for n in STATE if before[n] != after[n]}


def run_all() -> dict[str, dict[str, str]]:
    torch.manual_seed(1)
    torch.set_num_threads(2)
    port = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ.update(port)
    changes = {name: changed_by(arguments) for name, arguments in COMMANDS.items()}
    signal.signal(signal.SIGTERM, lambda *_: None)  # of the caller's own
    changes["with a handler of the caller's"] = changed_by(COMMANDS["diff"])
    return changes


if __name__ == "__main__":
    text = json.dumps(run_all())
    sys.stderr.write(text)
