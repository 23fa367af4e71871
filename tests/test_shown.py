"""Tables of text: they fit the terminal, are plain elsewhere, and keep numbers and intervals whole."""

from __future__ import annotations

import re
import struct
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyak._shown import Table

WORDS = st.lists(st.sampled_from(["a", "mean", "of", "weights", "(each)"]), max_size=6).map(
    " ".join
)
NUMBERS = st.sampled_from(
    ["", "1", "0.0055 [0.0040, 0.0060]", "−1.1 % [−14.5 %, 10.2 %]", "3 .. 4"]
)


@st.composite
def tables(draw: st.DrawFn) -> Table:
    left, right = draw(st.integers(1, 3)), draw(st.integers(0, 3))
    kinds = [*[WORDS | NUMBERS] * left, *[NUMBERS] * right]
    rows = draw(st.lists(st.tuples(*kinds), min_size=1, max_size=4))
    return Table(draw(st.tuples(*[WORDS.filter(bool)] * len(kinds))), rows, left)


@settings(max_examples=200)
@given(tables(), st.integers(40, 120))
def test_a_table_fits_and_breaks_no_number(table: Table, width: int) -> None:
    lines = table.lines(width)
    assert max(map(len, lines)) <= width
    text = " ".join(line.strip() for line in lines)
    for row in table.rows:
        for cell in row[table.left :]:
            assert any(cell in line for line in lines)
        for cell in row[: table.left]:
            for interval in re.findall(r"\S+ \[[^]]*\]", cell):
                assert any(interval in line for line in lines)
            assert all(word in text for word in cell.split())


@settings(max_examples=50)
@given(tables())
def test_without_a_terminal_a_row_is_a_line(table: Table) -> None:
    lines = table.lines()
    assert len(lines) == 1 + len(table.rows)
    for row, line in zip(table.rows, lines[1:], strict=True):
        assert line.split() == " ".join(row).split()


def test_html_is_escaped() -> None:
    html = Table(("<b>", "n"), [("a & b", "<script>")]).html()
    assert "&lt;script&gt;" in html and "a &amp; b" in html and "<script>" not in html


# A new command is one line.
COMMANDS = {
    "explain": ["explain", "exponential(half_life=1000)", "power(relative_std=0.1)", "window(2000)", "--steps", "20000"],
    "recipes": ["study", "list"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_commands_fit_eighty_columns_and_are_plain_in_a_pipe(command: list[str]) -> None:
    narrow, piped = on_a_terminal(command, 80), in_a_pipe(command)
    assert max(map(len, narrow)) <= 80 < max(map(len, piped))
    assert "\x1b" not in "".join(piped)


def in_a_pipe(command: list[str]) -> list[str]:
    run = [sys.executable, "-m", "polyak", *command]
    return subprocess.run(run, capture_output=True, text=True, check=True).stdout.splitlines()


def on_a_terminal(command: list[str], width: int) -> list[str]:
    """What a command prints on a terminal of some width."""
    import fcntl
    import os
    import pty
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    run = [sys.executable, "-m", "polyak", *command]
    read = b""
    with subprocess.Popen(run, stdout=theirs, stderr=subprocess.PIPE, env=environment) as process:
        os.close(theirs)
        while True:
            try:
                part = os.read(ours, 1 << 16)
            except OSError:  # the process has ended
                break
            if not part:
                break
            read += part
    os.close(ours)
    assert process.returncode == 0
    return read.decode().replace("\r\n", "\n").splitlines()
