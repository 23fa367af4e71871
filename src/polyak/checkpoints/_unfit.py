"""Weights of which no average is meaningful: placeholders, packed numbers, most adapters.

They are known by names, shapes and dtypes: no content is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch

from polyak._lazy import TensorSpec
from polyak.checkpoints._adapter_kinds import of_adapter

_PACKED = frozenset({torch.int8, torch.uint8, torch.int32, torch.uint32, torch.int16, torch.uint16})
_FLOAT8 = frozenset(
    {torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz}
)
_SCALES = re.compile(
    r"(^|[._:]|q|weight)(scales?|scale_inv|absmax|scb|zeros|zero_points?|zero|quant_map|quant_state\w*)($|[._])",
    re.IGNORECASE,
)
_WEIGHT = re.compile(
    r"weight|data|packed|blocks|kernel|codes|(^|_)w(_|$)|(^|_)q(_|$)", re.IGNORECASE
)
_FEW = 4  # so many numbers alone are a small model's, not placeholders


def unfit(specs: Mapping[str, TensorSpec], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Why weights cannot be averaged, and what to do; "" if they can.

    `shapes` are those that the file tells beside its tensors, as DeepSpeed does.
    """
    if name := placeholder(specs, shapes):
        return (
            f"{name} has shape {specs[name].shape}: DeepSpeed ZeRO-3 saved placeholders instead of weights. "
            "Run its zero_to_fp32.py in the checkpoint's folder, or save with "
            "stage3_gather_16bit_weights_on_model_save"
        )
    if name := next(_packed(specs), ""):
        return (
            f"{name} ({specs[name]}) holds quantised numbers with scales beside them, whose mean is not "
            "the mean of the weights. Dequantise the model, and average that"
        )
    return of_adapter(specs)


def placeholder(specs: Mapping[str, TensorSpec], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The name of a tensor that holds nothing of the weight that it stands for, or ""."""
    for name, shape in shapes.items():
        if name in specs and specs[name].shape != shape and specs[name].numel <= 1:
            return name
    floats = {name: spec for name, spec in specs.items() if spec.dtype.is_floating_point}
    empty = [name for name, spec in floats.items() if spec.shape == (0,)]
    if any(name.endswith("weight") for name in empty) or 2 * len(empty) > len(floats):
        return empty[0]
    single = [name for name, spec in floats.items() if spec.shape == (1,)]
    weights = [name for name in single if name.endswith("weight")]
    alone = len(single) == len(floats) >= _FEW and len(weights) > 1
    return weights[0] if alone else ""


def _packed(specs: Mapping[str, TensorSpec]) -> Iterator[str]:
    """The tensors of integers or of 8-bit floats that have scales beside them."""
    scaled: set[str] = set()
    for name in filter(_SCALES.search, specs):
        module, _, leaf = name.rpartition(".")
        scaled |= {module, f"{module}.{_SCALES.split(leaf)[0].rstrip('_:')}"}
    for name, (shape, dtype) in specs.items():
        module, _, leaf = name.rpartition(".")
        narrow = dtype in _PACKED or dtype in _FLOAT8
        if not narrow or not shape or _SCALES.search(leaf):
            continue
        if name in scaled or (module in scaled and _WEIGHT.search(leaf)):
            yield name
