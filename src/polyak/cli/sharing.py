"""Sharing: the processes that torchrun has started for a command divide its work."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@contextmanager
def shared() -> Iterator[ProcessGroup | None]:
    """The group of all processes under torchrun, of which the first alone prints; else None."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("WORLD_SIZE") == "1":
        yield None
        return
    import torch.distributed as dist

    dist.init_process_group("gloo")
    with ExitStack() as stack:
        stack.callback(dist.destroy_process_group)
        if dist.get_rank() != 0:
            nowhere = stack.enter_context(Path(os.devnull).open("w"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        yield dist.group.WORLD
        dist.barrier()  # one that left while another was at work has been seen to abort, under gloo
