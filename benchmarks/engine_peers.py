"""The measured libraries: each builds its average of a model and returns its update."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import ModuleType

import torch
from diffusers.training_utils import EMAModel
from ema_pytorch import EMA
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn
from torch_ema import ExponentialMovingAverage

from polyak import Averager, Exponential

DECAY = 0.999

Update = Callable[[], object]
Build = Callable[[nn.Module, bool], Update]
"""(model, whether bfloat16 weights get a float32 average) -> update."""


def polyak(model: nn.Module, _wide: bool) -> Update:
    """This library with its defaults: the average of bfloat16 weights is float32."""
    return Averager(model, Exponential(DECAY)).update


def _ema_pytorch(*, use_foreach: bool) -> Build:
    def build(model: nn.Module, wide: bool) -> Update:
        ema = EMA(
            model,
            ema_model=deepcopy(model).float() if wide else None,
            beta=DECAY,
            update_after_step=0,
            update_every=1,
            use_foreach=use_foreach,
            coerce_dtype=wide,
        )
        return lambda: ema.update()

    return build


def _torch_ema(model: nn.Module, wide: bool) -> Update:
    ema = ExponentialMovingAverage(model.parameters(), DECAY)
    if wide:
        ema.to(dtype=torch.float32)
    return lambda: ema.update()


def _averaged_model(*, multi: bool) -> Build:
    def build(model: nn.Module, wide: bool) -> Update:
        averaged = (
            AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
            if multi
            else AveragedModel(model, avg_fn=get_ema_avg_fn(DECAY))
        )
        if wide:
            averaged.module.float()
        return lambda: averaged.update_parameters(model)

    return build


def _diffusers(*, foreach: bool) -> Build:
    def build(model: nn.Module, wide: bool) -> Update:
        ema = EMAModel(model.parameters(), decay=DECAY, foreach=foreach)
        if wide:
            ema.to(dtype=torch.float32)
        parameters = list(model.parameters())
        return lambda: ema.step(parameters)

    return build


def _timm(module: ModuleType) -> Build:
    def build(model: nn.Module, wide: bool) -> Update:
        ema = module.ModelEmaV3(model, decay=DECAY, dtype=torch.float32 if wide else None)
        return lambda: ema.update(model)

    return build


def _load_timm() -> ModuleType | None:
    """timm's module of averages, alone because the package needs torchvision; None without timm."""
    package = importlib.util.find_spec("timm")
    if package is None or not package.submodule_search_locations:
        return None
    path = Path(package.submodule_search_locations[0]) / "utils" / "model_ema.py"
    spec = importlib.util.spec_from_file_location("timm_model_ema", path)
    if spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def libraries() -> dict[str, Build | None]:
    """name -> how to build the library's average; None if it is not installed."""
    timm = _load_timm()
    return {
        "polyak": polyak,
        "ema_pytorch": _ema_pytorch(use_foreach=False),
        "ema_pytorch, foreach": _ema_pytorch(use_foreach=True),
        "torch_ema": _torch_ema,
        "AveragedModel, avg_fn": _averaged_model(multi=False),
        "AveragedModel, multi_avg_fn": _averaged_model(multi=True),
        "diffusers": _diffusers(foreach=False),
        "diffusers, foreach": _diffusers(foreach=True),
        "timm ModelEmaV3": None if timm is None else _timm(timm),
    }
