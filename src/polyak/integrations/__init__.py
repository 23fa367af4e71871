"""Averages in training frameworks: hooks that call an `Averager`, one module for each framework.

A module imports its framework, and no other module of polyak does: `polyak.integrations.lightning`
needs the extra `lightning`.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

__all__ = ["accelerate", "fabric", "ignite", "lightning", "transformers"]


def __getattr__(name: str) -> ModuleType:
    if name not in __all__:
        raise AttributeError(f"module 'polyak.integrations' has no attribute {name!r}")
    return import_module(f"polyak.integrations.{name}")
