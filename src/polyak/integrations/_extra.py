"""The words for a framework that is not installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(name: str, *packages: str) -> Iterator[None]:
    """A block that imports packages; if one is missing, the error names the extra to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in packages:
            raise
        raise ModuleNotFoundError(
            f"polyak.integrations.{name} needs {error.name}, which is not installed: "
            f'install polyak with its extra "{name}"',
            name=error.name,
        ) from None
