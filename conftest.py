"""What tests and doctests leave in the system's temporary folder is removed when they end."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# A test of several processes has one folder: they inherit the path. It is short, for sockets.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())  # pytest's own stays
    FOLDER = tempfile.TemporaryDirectory(prefix="polyak-", ignore_cleanup_errors=True)
    Path(FOLDER.name).chmod(0o1777)  # as the system's: tests write as another user, too
    tempfile.tempdir = os.environ["TMPDIR"] = FOLDER.name

    def pytest_unconfigure() -> None:
        FOLDER.cleanup()
