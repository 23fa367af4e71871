"""Tests of what torch has since a version."""

from __future__ import annotations

import pytest
import torch
from torch.torch_version import TorchVersion


def since(version: str, what: str) -> pytest.MarkDecorator:
    """Runs a test only where torch has `what` it needs."""
    old = TorchVersion(torch.__version__) < version
    return pytest.mark.skipif(old, reason=f"torch has {what} since {version}")
