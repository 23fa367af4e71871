"""The second half of `polyak average`: write the average, compare it, print."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from polyak._checks import listed
from polyak._shown import size_text
from polyak.cli._options import Writing, bytes_of
from polyak.cli._output import (
    left_text,
    note,
    note_left,
    note_norms,
    note_tied,
    print_json,
    print_table,
    progress_shown,
    say,
)

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

    from polyak.checkpoints import Checkpoint
    from polyak.offline import Combination, Soup

    Read = Callable[[Path], Checkpoint]

_FEW = 20


class Form:
    """Another checkpoint, in whose form the average is written; `which` of its weights are replaced.

    It is read as the inputs are, if it can be: a folder of Hugging Face's has no prefix that the inputs
    may have.
    """

    def __init__(self, path: Path, which: str | None, read: Read) -> None:
        from polyak import checkpoints

        self.path, self.which, self.read = path, which, read
        try:
            read(path)
        except ValueError:
            self.read = checkpoints.read

    def dtypes(self) -> dict[str, torch.dtype]:
        """name -> dtype of its weights."""
        weights = self.read(self.path).weights(self.which)
        return {name: spec.dtype for name, spec in weights.specs.items()}

    def write(self, made: Combination, out: Path, **options: Any) -> None:
        """Write the average in this form, and note what was not copied."""
        from polyak import checkpoints

        if left := checkpoints.write_like(
            out, self.path, made, self.which, read=self.read, **options
        ):
            note(f"not copied from {self.path}: {', '.join(left)}")
        elif kept := self.read(self.path).left:
            note(
                f"kept as in {self.path}: {left_text(kept)}; an optimizer's own copy of the weights there "
                "is the old one"
            )


class Averaged(NamedTuple):
    """The average of files; of a soup, their qualities too."""

    files: Sequence[Path]
    made: Combination
    soup: Soup | None

    def write(self, writing: Writing, form: Form | None, group: ProcessGroup | None) -> None:
        """Write it as the options say, or in the form of another checkpoint."""
        out = writing.out
        assert out is not None
        with progress_shown(f"writing {out}") as progress:
            if form is not None:
                form.write(self.made, out, overwrite=writing.force, progress=progress)
            else:
                self.made.write(
                    out,
                    shard_bytes=bytes_of(writing.shard_size),
                    overwrite=writing.force,
                    progress=progress,
                    group=group,
                )
                note_tied(self.made)

    def verified(self, out: Path, form: Form | None) -> int:
        """Read the result back, and compare it with direct sums; the number of tensors."""
        from polyak import checkpoints, offline

        written = (checkpoints.read if form is None else form.read)(out)
        written.verify()
        return offline.verify(self.made, written.weights(None if form is None else form.which))

    def print_forecast(self, *, json: bool) -> None:
        """Print what would be read and written."""
        from polyak import offline

        about, made = offline.forecast(self.made), self.made
        note_left(made.left)
        if json:
            print_json({**about._asdict(), "tensors": len(made.written), "terms": self._terms()})
            return
        self._print_terms()
        sizes = f"{size_text(about.read_bytes)} to read, {size_text(about.written_bytes)} to write"
        say(
            f"{len(made.written)} tensors of {len(self.files)} files: {sizes}, about {about.seconds:.1f} s"
        )

    def print_written(self, out: Path, seconds: float, checked: int | None, *, json: bool) -> None:
        """Print what was written, and note what was found."""
        made, size = self.made, sum(spec.nbytes for spec in self.made.written.values())
        if json:
            about = {
                "out": str(out),
                "tensors": len(made.written),
                "bytes": size,
                "seconds": seconds,
            }
            about |= {} if checked is None else {"verified": checked}
            found = {"copied": made.copied, "left": made.left, "norms": made.norms}
            print_json({**about, **found, "terms": self._terms()})
        else:
            if len(self.files) <= _FEW:
                self._print_terms()
            done = (
                f"{len(made.written)} tensors of {len(self.files)} files, {size_text(size)}, "
                f"{seconds:.1f} s"
            )
            said = "" if checked is None else f"; verified: {checked} tensors are the direct sums"
            say(f"{out}: {done}{said}")
        _note_findings(made)
        note_faults(made)

    def _terms(self) -> list[dict[str, object]]:
        """Each file with its coefficient; of a soup, with its quality alone."""
        pairs = zip(self.files, self.made.coefficients.tolist(), strict=True)
        terms: list[dict[str, object]] = [{"file": str(f), "coefficient": c} for f, c in pairs]
        for term, quality in zip(terms, self.soup.qualities if self.soup else (), strict=False):
            term["quality"] = quality
        return terms

    def _print_terms(self) -> None:
        header = ("file", "coefficient", *(("quality alone",) if self.soup else ()))
        rows = [
            tuple(cell if isinstance(cell, str) else f"{cell:.6g}" for cell in term.values())
            for term in self._terms()
        ]
        print_table(header, rows)


def _note_findings(made: Combination) -> None:
    """Print notes: how integers and booleans were averaged, and which files are the same."""
    from polyak.offline._findings import duplicates

    if made.copied:
        size = sum(spec.nbytes for spec in made.specs.values())
        share = 100 * sum(made.specs[name].nbytes for name in made.copied) / max(size, 1)
        note(
            f"{len(made.copied)} of {len(made)} tensors ({share:{'.0f' if share >= 10 else '.2g'}} % of the bytes) are the "
            f"last file's: integers, booleans and what --copy names are not averaged ({listed(made.copied, 3)})"
        )
    if changed := made.changed:
        shown = ", ".join(f"{name} {_dtypes(changed[name])}" for name in [*changed][:3])
        written = _dtypes({made.specs[name].dtype for name in changed})
        note(
            f"{len(changed)} of {len(made)} tensors have other dtypes in the files ({shown}): written as {written}"
        )
    same: dict[str, list[str]] = {}
    for file, other in duplicates(made.sources):
        same.setdefault(other, []).append(file)
    for file, others in same.items():
        names = listed([*dict.fromkeys(others)], 3)
        note(
            f"the same weights as {file} come again, in {names}: they count {len(others) + 1} times"
        )


def _dtypes(dtypes: Iterable[torch.dtype]) -> str:
    from polyak._dtypes import dtype_name

    return " and ".join(sorted(map(dtype_name, dtypes)))


def note_faults(made: Combination) -> None:
    """Notes what makes the mean wrong, what was left out, and which norms no longer fit."""
    for name, files in list(made.nonfinite.items())[:_FEW]:
        if shown := ", ".join(f"{n} in {file}" for file, n in files.items()):
            note(f"{name} has values that are infinite or NaN, {shown}")
    if made.negative:
        note(f"negative coefficients made variances negative: {listed(sorted(made.negative), 3)}")
    note_left(made.left)
    note_norms(made.norms)
