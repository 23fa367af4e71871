"""Two ways to let a slot change where rounding to nearest would leave it as it is.

A lerp has no effect once `fraction * |live - slot|` is below half a unit in the slot's last place:
bfloat16 never moves at decay .999, and float32 stops at a relative error of 3e-4 to 6e-4 at .9999.
A wider dtype helps; so do these two:

- stochastic rounding (`bfloat16`, `float16`): up or down at random, so that the mean is exact;
- compensation (any dtype): a second tensor keeps what rounding dropped, and adds it later (Kahan).
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Literal, get_args

import torch
from torch import Tensor

from polyak._checks import require
from polyak._modes import no_grad
from polyak._parts import chunk_length, parts
from polyak._tensors import Journal, lerp_

Rounding = Literal["nearest", "stochastic", "compensated"]
STOCHASTIC = (torch.bfloat16, torch.float16)
_TEMPORARIES = 8  # the functions below hold at most this many tensors as large as a part


def require_rounding(rounding: str, dtypes: set[torch.dtype]) -> None:
    """Raises `ValueError` for an unknown rounding, and for stochastic rounding of wide slots."""
    wanted = '"nearest", "stochastic" or "compensated"'
    require(rounding in get_args(Rounding), "rounding", rounding, wanted)
    wide = [str(dtype) for dtype in dtypes if dtype not in STOCHASTIC]
    if rounding == "stochastic" and wide:
        raise ValueError(
            f"stochastic rounding of {', '.join(sorted(wide))} slots: wanted bfloat16 or float16, "
            "such as dtype=torch.bfloat16"
        )


def seed(*place: object) -> int:
    """Deterministic: the same place in a run always gives the same seed.

    So states need no seeds, an update that is made again rounds in the same way, and ranks with the
    same part of a tensor round it alike.
    """
    return int.from_bytes(blake2b(repr(place).encode(), digest_size=4).digest(), "big")


@no_grad
def stochastic_lerp_(
    slots: list[Tensor],
    live: list[Tensor],
    fraction: float,
    generator: torch.Generator,
    journal: Journal,
) -> None:
    """`slot <- lerp(slot, live, fraction)` in float32, rounded at random to the dtype of the slot.

    Another pass with the journal draws the same numbers again from a generator of the same seed.
    """
    if fraction == 1:
        lerp_(slots, live, 1.0)
        return
    length = chunk_length([slots[0]], temporaries=2 * _TEMPORARIES)  # float32 ones
    for narrow, weights in parts([slots, live], length):
        for slot, weight in zip(narrow, weights, strict=True):
            wide = slot.float().lerp_(weight.to(slot.device, torch.float32), fraction)
            journal.copy_([([slot], [stochastic_round(wide, slot.dtype, generator)])])


def stochastic_round(
    wide: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None
) -> Tensor:
    """Rounds float32 to one of its two neighbours in `dtype`, so that the mean stays exact.

    >>> values = stochastic_round(torch.full((100_000,), 1.001), torch.bfloat16)
    >>> sorted(set(values.tolist())), round(values.float().mean().item(), 3)
    ([1.0, 1.0078125], 1.001)
    """
    near = wide.to(dtype)
    error = wide - near.float()
    other = _neighbour(near, error)
    gap = (other.float() - near.float()).abs()
    drawn = torch.rand(wide.shape, generator=generator, device=wide.device, dtype=torch.float32)
    return torch.where(drawn * gap < error.abs(), other, near)


def _neighbour(near: Tensor, error: Tensor) -> Tensor:
    """The next value of a 16-bit dtype on the side of the error.

    The bits of a float, read as an integer, count magnitudes: plus 1 is the next larger one.
    """
    bits = near.view(torch.int16)
    outward = (error > 0) == (near > 0)
    stepped = torch.where(outward, bits + 1, bits - 1)
    smallest = torch.where(error < 0, -32767, 1).to(torch.int16)  # next to 0: 1, or sign bit and 1
    return torch.where(near == 0, smallest, stepped).view(near.dtype)


@no_grad
def compensated_lerp_(
    slots: list[Tensor],
    residues: list[Tensor],
    live: list[Tensor],
    fraction: float,
    journal: Journal,
) -> None:
    """`slot + residue <- lerp(slot + residue, live, fraction)`; the residue is below half a unit.

    step = fraction (live - slot - residue) + residue; slot' = slot + step;
    residue' = step - (slot' - slot). Source: Kahan 1965, compensated summation.
    """
    if fraction == 1:
        lerp_(slots, live, 1.0)
        torch._foreach_zero_(residues)
        return
    length = chunk_length([slots[0]], temporaries=_TEMPORARIES)
    for sums, lows, weights in parts([slots, residues, live], length):
        steps = [w.to(s.device, s.dtype) - s for s, w in zip(sums, weights, strict=True)]
        torch._foreach_sub_(steps, lows)
        torch._foreach_mul_(steps, fraction)
        torch._foreach_add_(steps, lows)
        moved = list(torch._foreach_add(sums, steps))
        torch._foreach_sub_(steps, torch._foreach_sub(moved, sums))
        journal.copy_([(sums, moved), (lows, steps)])


@no_grad
def stalled(slots: list[Tensor], live: list[Tensor], fraction: float) -> tuple[int, int]:
    """How many weights a lerp with rounding to nearest would not move, and how many should move."""
    stay = move = 0
    length = chunk_length([slots[0], live[0]], temporaries=_TEMPORARIES)
    for narrow, weights in parts([slots, live], length):
        for slot, weight in zip(narrow, weights, strict=True):
            target = weight.to(slot.device, slot.dtype)
            differs = target != slot
            stays = differs & (slot.lerp(target, fraction) == slot)
            stay, move = stay + int(stays.sum()), move + int(differs.sum())
    return stay, move
