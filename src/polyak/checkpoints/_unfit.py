"""Weights of which no average is meaningful: placeholders, packed numbers, most adapters.

They are known by names, shapes and dtypes: no content is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch

from polyak._lazy import TensorSpec
from polyak.checkpoints._adapter_kinds import of_adapter

_FLOAT8 = frozenset(
    {torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz}
)
_SCALES = re.compile(
    r"(^|[._:]|q|w|weight)(scales?|scale_inv|scale_and_zeros?|absmax|amax|scb|zeros|zero_points?|zero"
    r"|quant_map|quant_state\w*|centroids)($|[._])",
    re.IGNORECASE,
)
_WEIGHT = re.compile(
    r"weight|data|packed|blocks|compress|kernel|codes|qidx|indices|(^|_)w(_|$)|(^|_)q(_|$)",
    re.IGNORECASE,
)
_CALLED = re.compile(r"weight[^.]*$|[.]weight[._:]", re.IGNORECASE)
_BUFFER = re.compile(
    r"mask|bias|index|pos(ition)?_|(^|_)(idxs?|ids?|perm|state|tokens?|labels?|anchors?|edges?|faces|neighbou?rs?)(_|$)",
    re.IGNORECASE,
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
            f"{name} ({specs[name]}) holds quantised numbers, whose mean is not the mean of the weights "
            "that they stand for. Dequantise the model, and average that"
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
    """The tensors of integers or of 8-bit floats that are weights in another form.

    They have scales beside them, or they are integers that are called weights, or those of a module that has
    floating-point numbers but no weight of at least their size.
    """
    scaled: set[str] = set()
    for name in specs:
        if found := _SCALES.search(name):
            base = name[: found.start()].rstrip("._:").removesuffix("_quantizer")
            scaled |= {name.rpartition(".")[0], base}
    largest = _largest_floats(specs)
    for name, (shape, dtype) in specs.items():
        module, _, leaf = name.rpartition(".")
        if not shape or _SCALES.search(leaf) or _BUFFER.search(leaf):
            continue
        integers = not dtype.is_floating_point and not dtype.is_complex and dtype != torch.bool
        by_scales = name in scaled or (module in scaled and _WEIGHT.search(leaf))
        if by_scales and (integers or dtype in _FLOAT8):
            yield name
        elif integers and len(shape) > 1:
            smaller = 0 < largest.get(module, 0) < specs[name].numel
            if _CALLED.search(name) or (smaller and dtype != torch.int64):
                yield name


def _largest_floats(specs: Mapping[str, TensorSpec]) -> dict[str, int]:
    """The size of the largest floating-point tensor in each module, with those within it."""
    largest: dict[str, int] = {}
    for name, spec in specs.items():
        if spec.dtype.is_floating_point:
            parts = name.split(".")
            for module in (".".join(parts[:i]) for i in range(len(parts))):
                largest[module] = max(largest.get(module, 0), spec.numel)
    return largest
