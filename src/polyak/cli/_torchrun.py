"""`--torchrun`: the processes that torchrun has started share the work of a command."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def shared(torchrun: bool) -> Iterator[ProcessGroup | None]:
    """The group of all processes that torchrun started; only its first rank prints. Else None.

    The user must ask for it: torchrun's variables are also set in what a training under torchrun
    starts. Raises `ValueError` for a process that torchrun did not start.
    """
    if not torchrun:
        yield None
        return
    if missing := [name for name in _VARIABLES if name not in os.environ]:
        raise ValueError(
            f"--torchrun: {', '.join(missing)} is not set, so torchrun has not started this process; "
            "call torchrun --nproc-per-node N -m polyak ... --torchrun"
        )
    import torch.distributed as dist

    dist.init_process_group("gloo")
    with ExitStack() as stack:
        stack.callback(dist.destroy_process_group)
        if dist.get_rank() != 0:
            nowhere = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        yield dist.group.WORLD
        dist.barrier()  # a rank that leaves while another still works makes gloo abort there
