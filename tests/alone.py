"""Folders of torch.distributed.checkpoint by one process."""

from __future__ import annotations

from inspect import signature
from typing import Any

from torch.distributed.checkpoint.state_dict_saver import save

# Torch 2.6 has no such option: it finds out for itself.
ALONE: dict[str, Any] = {"no_dist": True} if "no_dist" in signature(save).parameters else {}
