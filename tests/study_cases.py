"""Cases that the tests of the study share: small settings, the plain script, synthetic records."""

from __future__ import annotations

import importlib.util
import sys
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from polyak.study._settings import Settings

# five steps an epoch, and long enough for every window of the report
SMALL = Settings(
    rows=200, features=5, hidden=(8, 4), max_epochs=24, stop_patience=4, lr_patience=2,
    ema_update_after_step=10, epochs_after_stop=5,
)  # fmt: skip


@lru_cache
def plain_article() -> ModuleType:
    """The plain script, which is no part of any package."""
    path = Path(__file__).parents[1] / "benchmarks" / "plain_article.py"
    specification = importlib.util.spec_from_file_location("plain_article", path)
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    sys.modules["plain_article"] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


def record(seed: int, live: Any, average: Any, after: Any = (0.004,) * 25) -> dict[str, Any]:
    """A record with the given validation losses; R² and MAE follow from them."""
    live, average, after = (np.asarray(curve, dtype=float) for curve in (live, average, after))
    at_stop = {"live": _metrics(live[-1]), "average": _metrics(average[-1])}
    best = {
        name: {"epoch": int(curve.argmin()) + 1, **_metrics(curve.min())}
        for name, curve in (("live", live), ("average", average))
    }
    return {
        "seed": seed, "stop_epoch": len(live), **at_stop, "best": best,
        "arms": {"live": at_stop["live"], "article_ema": at_stop["average"]},
        "history": _history(live, average), "after_stop": _history(after, after),
    }  # fmt: skip


def _metrics(mse: float) -> dict[str, float]:
    return {"mse": float(mse), "mae": float(0.8 * mse**0.5), "r2": float(1 - mse)}


def _history(live: Any, average: Any) -> dict[str, list[float]]:
    return {
        "train_loss": [0.03] * len(live),
        "val_loss_original": live.tolist(),
        "val_loss_ema": average.tolist(),
        "r2_original": (1 - live).tolist(),
        "r2_ema": (1 - average).tolist(),
    }
