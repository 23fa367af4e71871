"""Tensors that cannot be averaged rightly, each with what to do about it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from polyak._engine.memory import is_freed, overlap, overlaps_itself
from polyak._ranks.sharding import local

CHANGE_FIRST = (
    "add or resize layers, prune, parametrize (weight_norm, spectral_norm) or shard the model before you "
    "make the averager, or make a new one afterwards; to prune while it trains, call prune.identity before"
)


def refuse_strange(name: str, found: Tensor) -> None:
    """Raises `ValueError` for a tensor that has no content, or none that can be moved in place."""
    tensor = local(found)
    if is_lazy(tensor):
        raise ValueError(
            f"{name} is not materialised yet (a lazy module): run one forward pass, then make the "
            "averager"
        )
    if tensor.is_meta:
        raise ValueError(
            f"{name} is on the meta device and has no content: materialise the model "
            "(to_empty, load its weights), then make the averager"
        )
    if tensor.is_nested:
        raise ValueError(
            f"{name} is nested, wanted torch.strided: give the model its .unbind() parts"
        )
    if tensor.layout != torch.strided:
        raise ValueError(
            f"{name} has layout {tensor.layout}, wanted torch.strided: give the model its .to_dense()"
        )
    if tensor.numel() == 0 and hasattr(found, "ds_id"):
        raise ValueError(
            f"{name} is partitioned by DeepSpeed ZeRO-3 and is empty between its uses: use "
            "ZeRO 1 or 2, or fully_shard (FSDP2)"
        )
    if tensor.is_inference():
        raise ValueError(
            f"{name} was made under torch.inference_mode() and cannot be written to outside: build "
            "the model outside it, or under torch.no_grad()"
        )
    if is_freed(tensor):
        raise ValueError(
            f"{name} has no memory: its storage was freed (resize_(0)); make the average, and update "
            "it, while the weights are there"
        )


def refuse_sign_view(name: str, tensor: Tensor) -> None:
    """Raises `ValueError` for a tensor that torch reads with the opposite sign of what is stored."""
    if tensor.is_conj() or tensor.is_neg():
        view, call = ("conjugate", "conj") if tensor.is_conj() else ("negative", "neg")
        raise ValueError(
            f"{name} is a {view} view: torch stores it with the opposite sign, so it cannot exchange "
            f"contents with an average: give the model a .resolve_{call}() of it, or leave it out "
            "with `select`"
        )


def require_apart(stored: Sequence[tuple[str, Tensor]]) -> None:
    """Raises `ValueError` for tensors that share memory, or with elements that do."""
    for name, tensor in stored:
        if overlaps_itself(local(tensor)):
            raise ValueError(
                f"{name} has elements that share memory (strides {tensor.stride()} for shape "
                f"{tuple(tensor.shape)}, as expand makes them), and cannot be written element by "
                "element: give the model a .clone() of it, or leave it out with `select`"
            )
    if (pair := overlap(stored)) is not None:
        raise ValueError(
            f"{pair[0]} and {pair[1]} share memory without being the same tensor: averaged separately, "
            "each would overwrite the other. Give one of them memory of its own (.clone()), or "
            "leave one out with `select`"
        )
