"""Files that the real packages of composer, mmengine, timm and NeMo wrote (`make_peer_files`).

They are kept in `tests/peers`, since those packages pin other versions of torch or need many others.
Each has beside it what the library held when it saved, and how its average went on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from peer_files import State
from polyak.checkpoints import Clock, read
from polyak.rules import Exponential, Rule
from test_peers_files import assert_equal, assert_near, gone_on

FOLDER = Path(__file__).parent / "peers"
SAVED = 40
PARAMETERS = [f"net.{name}" for name in ("body.weight", "body.bias", "norm.weight", "norm.bias")]
EVERY_3 = Exponential(0.97 ** (1 / 3))
# file -> its format, its clock, the rule that the library followed and its cadence, whether it says so
FILES: dict[str, tuple[str, Clock | None, Rule, int, bool]] = {
    "composer.pt": ("composer", None, Exponential.from_half_life(20), 1, False),
    "mmengine.pth": ("mmengine", Clock(SAVED, "calls"), EVERY_3, 3, False),
    "nemo.ckpt": ("nemo", Clock(SAVED, "calls"), EVERY_3, 3, True),
    "timm.pth.tar": ("timm", None, Exponential(0.97), 1, False),
}


def noted(name: str) -> dict[str, State]:
    """What the library held: part -> name -> tensor."""
    parts: dict[str, State] = {}
    for key, tensor in load_file(FOLDER / f"{name}.safetensors").items():
        part, _, rest = key.partition("/")
        parts.setdefault(part, {})[rest] = tensor
    return parts


def later(stacked: Mapping[str, Tensor]) -> list[State]:
    steps = len(next(iter(stacked.values())))
    return [{name: tensor[i] for name, tensor in stacked.items()} for i in range(steps)]


@pytest.mark.parametrize("name", FILES)
def test_a_real_file_is_read_as_it_is_and_goes_on(name: str) -> None:
    layout, clock, rule, every, told = FILES[name]
    held = noted(name)
    found = read(FOLDER / name, PARAMETERS if layout == "nemo" else None)
    assert (found.format, found.clock) == (layout, clock)
    assert found.rules == ({"average": rule} if told else {})
    assert_equal(found.live, held["live"])
    assert_equal(found.averages["average"], held["average"])
    begun = clock or Clock(1)
    after = gone_on(found.averages["average"], rule, begun, every, later(held["later"]))
    assert_near(after, held["final"], torch.float64)


def test_the_twin_that_nemo_saves_has_the_average_by_name() -> None:
    held = noted("nemo.ckpt")
    found = read(FOLDER / "nemo-EMA.ckpt")
    assert (found.format, found.live, found.clock) == ("nemo", None, Clock(SAVED, "calls"))
    buffers = {name: t for name, t in held["live"].items() if name not in PARAMETERS}
    assert_equal(found.averages["average"], {**held["average"], **buffers})


def test_names_of_nemo_in_another_order_are_refused() -> None:
    with pytest.raises(ValueError, match=r"nemo\.ckpt: names are not in the order"):
        read(FOLDER / "nemo.ckpt", PARAMETERS[::-1])
