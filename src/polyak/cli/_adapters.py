"""`polyak average --lora concatenate`: the exact average of adapters, as one adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from polyak.cli._options import Writing, given
from polyak.cli._output import note, print_json, print_table, say
from polyak.cli._shares import Coefficients


def concatenated(
    files: Sequence[Path],
    rule: Coefficients,
    elapsed: Sequence[float] | None,
    writing: Writing,
    others: Mapping[str, object],
    *,
    json: bool,
) -> None:
    """Write and print one adapter made of several; `others` are options that do not go with it."""
    from polyak import offline

    if typed := given(others):
        raise ValueError(f"--lora is for whole adapters of PEFT: leave {typed} out")
    made = offline.concatenate(files, rule, elapsed=elapsed)
    if (out := writing.place) is not None:
        made.write(out, overwrite=writing.force)
    terms = [
        {"file": str(path), "coefficient": coefficient}
        for path, coefficient in zip(made.paths, made.coefficients.tolist(), strict=True)
    ]
    ranks = sorted(set(made.ranks.values()))
    if json:
        print_json({"out": out and str(out), "ranks": ranks, "tensors": len(made), "terms": terms})
        return
    print_table(
        ("adapter", "coefficient"), [(str(t["file"]), f"{t['coefficient']:.6g}") for t in terms]
    )
    of_rank = f"rank {', '.join(map(str, ranks))}: the sum of theirs"
    say(f"{out or 'would be'}: {len(made)} tensors, {of_rank}")
    if rest := len(made) - made.factors:
        note(f"{rest} tensors beside the factors are averaged as weights (biases, modules_to_save)")
