"""A section of a model card: what the weights beside it average."""

from __future__ import annotations

from pathlib import Path

from polyak.averager import Averager
from polyak.theory import explain

TITLE = "# What these weights average"


def write_card(folder: Path, averager: Averager, name: str, step: int) -> None:
    """Write into the folder's README.md what its weights average, after what is there already."""
    path = folder / "README.md"
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    kept = before.partition(TITLE)[0].rstrip()  # the section of an earlier save ends the file
    text = (f"{kept}\n\n" if kept else "") + _section(averager, name, step)
    path.write_bytes(text.encode())


def _section(averager: Averager, name: str, step: int) -> str:
    rule, every = averager.rules[name], averager.every
    found = explain(rule, max(round(averager.clock.t), 1), every=every)
    rows = "\n".join(f"| {row.name} | {row.value} | {row.unit} |" for row in found.rows())
    return (
        f"{TITLE}\n\n"
        f"The average `{name}` of the weights after each optimizer step, at step {step} of training: "
        f"`{rule}`, {averager.count} updates, made by polyak. The weights of the step itself are not "
        f"here.\n\n| measure | value | unit |\n|---|---|---|\n{rows}\n"
    )
