"""Dtypes and classes of tensors: what can be averaged, and in which dtype."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce

import torch
from torch import Tensor

from polyak._checks import require

Kind = tuple[torch.dtype, torch.device]
SLOT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def has_mean(dtype: torch.dtype) -> bool:
    """Whether numbers of a dtype can be averaged: floating-point and complex ones.

    A dtype that packs two numbers into a byte (float4_e2m1fn_x2) cannot: torch does not convert it.
    """
    return (dtype.is_floating_point or dtype.is_complex) and not str(dtype).endswith("_x2")


def kind(tensor: Tensor) -> Kind:
    """Dtype and device: one foreach call can update tensors that agree in both."""
    return tensor.dtype, tensor.device


def slot_dtype(dtype: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """The dtype of the average of weights: `wanted`, or float32 if `dtype` is narrower than that.

    Complex averages are complex64 at least: torch has no `lerp` of narrower ones. A bfloat16 average
    with decay .999 never moves: half a unit in its last place is more than a step.

    >>> slot_dtype(torch.bfloat16, None), slot_dtype(torch.complex64, torch.float64)
    (torch.float32, torch.complex128)
    """
    if dtype.is_complex:
        wide = dtype if wanted is None else complex_of(wanted)
        return wide if wide.itemsize >= 8 else torch.complex64
    return wanted or (torch.float32 if dtype.itemsize < 4 else dtype)


def require_slot_dtype(dtype: torch.dtype | None, name: str = "dtype") -> None:
    """Raise `ValueError` for a dtype that an average cannot have."""
    require(
        dtype in (None, *SLOT_DTYPES), name, dtype, f"one of {', '.join(map(str, SLOT_DTYPES))}"
    )


def complex_of(dtype: torch.dtype) -> torch.dtype:
    """The complex dtype of such parts; complex64 for bfloat16, whose own lacks arithmetic in torch 2.14."""
    return torch.complex64 if dtype == torch.bfloat16 else dtype.to_complex()


def refuse_wrapper(name: str, tensor: Tensor) -> None:
    """Raise `ValueError` for a tensor whose class does its own arithmetic, as quantized weights do.

    The content of a class with `__torch_dispatch__` is in tensors that it wraps, not in its own memory.
    A mean of them is not the mean of the weights, and a file cannot hold them.
    """
    kind = type(tensor)
    if is_wrapper(tensor):
        raise ValueError(
            f"{name} is a {kind.__module__}.{kind.__qualname__}, a tensor class with arithmetic of its "
            "own (__torch_dispatch__); wanted plain weights: average them before they are quantized "
            "or wrapped, or leave the tensor out with `select`"
        )


def is_wrapper(tensor: Tensor) -> bool:
    """Whether a tensor's class does its own arithmetic (`__torch_dispatch__`)."""
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without its module: "float32"."""
    return str(dtype).removeprefix("torch.")


def can_hold(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether a dtype can hold all values of another."""
    try:
        return torch.promote_types(other, dtype) == dtype
    except RuntimeError:  # torch does not promote 8-bit floating-point dtypes
        return False


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype that can hold the values of all, float32 where none of them does.

    >>> widest([torch.float32, torch.bfloat16]), widest([torch.float16, torch.bfloat16])
    (torch.float32, torch.float32)
    """
    return reduce(_wider, dtypes)


def _wider(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    holds = [one for one, other in ((a, b), (b, a)) if one == other or can_hold(one, other)]
    most = max(a, b, key=lambda dtype: dtype.itemsize)
    return holds[0] if holds else most if most.itemsize >= 4 else torch.float32
