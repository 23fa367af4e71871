"""What `polyak average` does with an average: it writes, compares and prints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from polyak._shown import size_text
from polyak.cli._output import (
    Progress,
    left_text,
    note,
    note_left,
    note_norms,
    print_json,
    print_table,
    say,
)

if TYPE_CHECKING:
    import torch

    from polyak.checkpoints import Checkpoint
    from polyak.offline import Combination, Soup

    Read = Callable[[Path], Checkpoint]

_FEW = 20


def dtypes_of(like: Path | None, which: str | None, read: Read) -> dict[str, torch.dtype] | None:
    """The dtypes of the checkpoint that the result resembles."""
    if like is None:
        return None
    weights = _reader(like, read)(like).weights(which)
    return {name: spec.dtype for name, spec in weights.specs.items()}


def write_like(
    out: Path,
    like: Path,
    made: Combination,
    which: str | None,
    read: Read,
    *,
    overwrite: bool,
    progress: Progress | None,
) -> None:
    """Writes the average in the form of another checkpoint, and notes what was not copied."""
    from polyak import checkpoints

    left = checkpoints.write_like(
        out, like, made, which, read=_reader(like, read), overwrite=overwrite, progress=progress
    )
    if left:
        note(f"not copied from {like}: {', '.join(left)}")
    elif kept := _reader(like, read)(like).left:
        note(
            f"kept as in {like}: {left_text(kept)}; an optimizer's own copy of the weights there is the old one"
        )


def verified(made: Combination, out: Path, which: str | None, like: Path | None, read: Read) -> int:
    """Reads the result back, and compares; the number of tensors."""
    from polyak import checkpoints, offline

    if like is None:
        written = checkpoints.read(out)
        weights = written.weights()
    else:
        written = _reader(out, read)(out)
        weights = written.weights(which)
    written.verify()
    return offline.verify(made, weights)


def _reader(like: Path, read: Read) -> Read:
    """The reader of the inputs, if it reads this checkpoint too; else the plain one.

    A folder of Hugging Face's has no prefix that the inputs may have.
    """
    from polyak import checkpoints

    try:
        read(like)
    except ValueError:
        return checkpoints.read
    return read


def print_forecast(
    files: Sequence[Path], made: Combination, soup: Soup | None, *, json: bool
) -> None:
    from polyak import offline

    about = offline.forecast(made)
    note_left(made.left)
    if json:
        print_json({**about._asdict(), "tensors": len(made), "terms": _terms(files, made, soup)})
        return
    _print_terms(files, made, soup)
    sizes = f"{size_text(about.read_bytes)} to read, {size_text(about.written_bytes)} to write"
    say(f"{len(made)} tensors of {len(files)} files: {sizes}, about {about.seconds:.1f} s")


def print_written(
    files: Sequence[Path],
    made: Combination,
    soup: Soup | None,
    out: Path,
    seconds: float,
    checked: int | None,
    *,
    json: bool,
) -> None:
    size = sum(spec.nbytes for spec in made.specs.values())
    if json:
        about = {"out": str(out), "tensors": len(made), "bytes": size, "seconds": seconds}
        about |= {} if checked is None else {"verified": checked}
        terms = _terms(files, made, soup)
        print_json(
            {**about, "copied": made.copied, "left": made.left, "norms": made.norms, "terms": terms}
        )
    else:
        if len(files) <= _FEW:
            _print_terms(files, made, soup)
        done = f"{len(made)} tensors of {len(files)} files, {size_text(size)}, {seconds:.1f} s"
        said = "" if checked is None else f"; verified: {checked} tensors are the direct sums"
        say(f"{out}: {done}{said}")
    _note_findings(made)
    note_spoiled(made)


def _note_findings(made: Combination) -> None:
    """What was done to tensors that have no mean, and which files are the same."""
    from polyak.offline._findings import duplicates

    if made.copied:
        size = sum(spec.nbytes for spec in made.specs.values())
        share = 100 * sum(made.specs[name].nbytes for name in made.copied) / max(size, 1)
        note(
            f"{len(made.copied)} of {len(made)} tensors ({share:{'.0f' if share >= 10 else '.2g'}} % of the bytes) are the "
            f"last file's: integers and booleans have no mean ({_some(made.copied)})"
        )
    for file, other in duplicates(made.sources):
        note(f"{file} holds the same weights as {other}, which so count twice")


def note_spoiled(made: Combination) -> None:
    """Notes what in the files spoils their sum, what was left aside, and which norms no longer fit."""
    for name, files in list(made.nonfinite.items())[:_FEW]:
        if shown := ", ".join(f"{n} in {file}" for file, n in files.items()):
            note(f"{name} has values that are infinite or NaN, {shown}")
    if made.negative:
        note(f"negative coefficients made variances negative: {_some(sorted(made.negative))}")
    note_left(made.left)
    note_norms(made.norms)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _terms(files: Sequence[Path], made: Combination, soup: Soup | None) -> list[dict[str, object]]:
    """Each file with its coefficient; of a soup, with its quality alone."""
    pairs = zip(files, made.coefficients.tolist(), strict=True)
    terms: list[dict[str, object]] = [{"file": str(f), "coefficient": c} for f, c in pairs]
    for term, quality in zip(terms, () if soup is None else soup.qualities, strict=False):
        term["quality"] = quality
    return terms


def _print_terms(files: Sequence[Path], made: Combination, soup: Soup | None) -> None:
    header = ("file", "coefficient", *(() if soup is None else ("quality alone",)))
    rows = [
        tuple(cell if isinstance(cell, str) else f"{cell:.6g}" for cell in term.values())
        for term in _terms(files, made, soup)
    ]
    print_table(header, rows)
