"""Averages of the weights of PyTorch models, with the theory computed by the code that averages.

    averager = polyak.Averager(model, polyak.Exponential(0.999))
    averager.update()                   after each optimizer step
    with averager.applied(): ...        the model has the average's weights inside the block

Names are imported when first used: `import polyak.theory` needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polyak import checkpoints as checkpoints
    from polyak import decays as decays
    from polyak import offline as offline
    from polyak import theory as theory
    from polyak.averager import Averager as Averager
    from polyak.averager import Pull as Pull
    from polyak.checkpoints import load as load
    from polyak.checkpoints import save as save
    from polyak.ema import EMA as EMA
    from polyak.norms import recalibrate as recalibrate
    from polyak.offline import sweep as sweep
    from polyak.offline import synthesize as synthesize
    from polyak.rules import ArticleEMA as ArticleEMA
    from polyak.rules import Bema as Bema
    from polyak.rules import Exponential as Exponential
    from polyak.rules import Power as Power
    from polyak.rules import Rule as Rule
    from polyak.rules import Tail as Tail
    from polyak.rules import Uniform as Uniform
    from polyak.rules import Window as Window
    from polyak.snapshots import Recorder as Recorder
    from polyak.specs import parse as parse

__version__ = "0.1.0"

_HOMES = {
    "Averager": "averager",
    "EMA": "ema",
    "ArticleEMA": "rules",
    "Bema": "rules",
    "Exponential": "rules",
    "Power": "rules",
    "Pull": "averager",
    "Recorder": "snapshots",
    "Rule": "rules",
    "Tail": "rules",
    "Uniform": "rules",
    "Window": "rules",
    "checkpoints": "",
    "decays": "",
    "load": "checkpoints",
    "offline": "",
    "parse": "specs",
    "recalibrate": "norms",
    "save": "checkpoints",
    "sweep": "offline",
    "synthesize": "offline",
    "theory": "",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'polyak' has no attribute {name!r}")
    home = _HOMES[name]
    return (
        getattr(import_module(f"polyak.{home}"), name) if home else import_module(f"polyak.{name}")
    )


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
