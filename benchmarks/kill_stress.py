"""SIGKILL at random moments of saving, over and over: `python benchmarks/kill_stress.py --kills 200`.

One run goes on through all kills: each process loads what the one before left. Every file must be
whole, no older than the killed process said, and hold the right averages; at the end nothing lies
beside it but what the last process was writing.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

from rich.progress import track

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from killing import kill


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    moments, count, midway = random.Random(options.seed), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        for _ in track(range(options.kills), description="kills"):
            count = kill(path, moments, count)
            midway += any(part.suffix == ".part" for part in Path(folder).iterdir())
        left = [part.name for part in Path(folder).iterdir() if part != path]
    assert len(left) <= 1, left
    print(
        f"{options.kills} kills, {midway} of them while a file was being written; {count} updates"
    )
    print("every file was whole and the newest that had been promised")


if __name__ == "__main__":
    main()
