"""The machine of the plan: published bandwidths, and the seconds that bytes take by them.

No run can be faster than these seconds, and a real one is slower: nothing here is measured.
"""

from __future__ import annotations

from plan_bytes import FLOAT32, Layout, elements, moved
from plan_models import Model

MEMORY = 80e9
MEMORY_BANDWIDTH = 3.35e12
LINK_TO_HOST = 64e9
HOST_BANDWIDTH = 614e9 / 8
NETWORK = 50e9
ARITHMETIC = 400e12
TOKENS = 8192
RANK_WRITES, ALL_WRITE = 1e9, 200e9
MACHINE = """\
A rank is an H100 SXM: 80 GB at 3.35 TB/s, 64 GB/s to the host in one direction (PCIe 5.0 x16; NVIDIA's
data sheet). Eight of them share a host's 614 GB/s (16 channels of DDR5-4800), and have 50 GB/s of network
each (400 Gb/s). A step is 8192 tokens a rank at 400 TFLOP/s and 6 operations a token and active parameter
(Llama 3 reached 380 to 430 TFLOP/s: arXiv 2407.21783, table 4). A rank writes 1 GB/s to the file system,
all of them 200 GB/s: an assumption."""


def step_seconds(model: Model) -> float:
    """A training step."""
    return 6 * model.active * TOKENS / ARITHMETIC


def update_seconds(model: Model, layout: Layout, averages: int, itemsize: int) -> float:
    """An update of averages in slots of so many bytes an element, on the fullest rank."""
    most = elements(model, layout, 0)
    return moved(most * FLOAT32, most * itemsize, averages) / MEMORY_BANDWIDTH


def host_seconds(model: Model, layout: Layout) -> float:
    """An update of one average in the host's memory: the weights travel, then they are averaged."""
    live = elements(model, layout, 0) * FLOAT32
    return live / LINK_TO_HOST + moved(live, live, 1) / HOST_BANDWIDTH


def write_seconds(model: Model, layout: Layout, itemsize: int) -> float:
    """A file of so many bytes an element: the fullest rank's part, or all parts together."""
    fullest = elements(model, layout, 0) * itemsize
    return max(fullest / RANK_WRITES, model.numel * itemsize / ALL_WRITE)
