"""What averaging costs on 8 to 16 384 ranks: bytes and seconds of real models' shapes, by arithmetic.

Run: python benchmarks/plan.py

It prints its tables, writes `benchmarks/results/plan.md` with a chart beside it, and puts the tables of
`docs/distributed.md` between their marks. Nothing is measured: bytes are exact, `tests/test_plan.py`
holds them to what torch and polyak allocate; seconds are bytes over published bandwidths.
"""

from __future__ import annotations

from pathlib import Path

import plan_tables as tables
from plan_chart import save_chart
from plan_machine import MACHINE

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "distributed.md"
BEGIN = "<!-- plan: the lines down to the end mark are written by benchmarks/plan.py -->"
END = "<!-- plan: end -->"


def main() -> None:
    """Prints the plan, and writes it where it is quoted."""
    text = plan()
    print(text)
    (RESULTS / "plan.md").write_text(text)
    PAGE.write_text(quoting(PAGE.read_text()))
    save_chart(tables.points(), RESULTS)


def plan() -> str:
    """The whole plan as Markdown."""
    sections = (
        tables.models(),
        tables.memory(),
        tables.time(),
        tables.checkpoints(),
        tables.snapshots(),
        tables.synthesis(),
        tables.gathering(),
    )
    parts = "\n".join(section.markdown() for section in sections)
    return f"# The plan of a large run\n\n`python benchmarks/plan.py`. {MACHINE}\n\n{parts}"


def quoting(page: str) -> str:
    """The page with its tables between its two marks."""
    head, rest = page.split(BEGIN)
    _, tail = rest.split(END)
    sections = (tables.overview(), tables.checkpoints(), tables.snapshots(), tables.synthesis())
    between = "\n".join(f"#{section.markdown()}" for section in sections)
    return f"{head}{BEGIN}\n\n{MACHINE}\n\n{between}\n{END}{tail}"


if __name__ == "__main__":
    main()
