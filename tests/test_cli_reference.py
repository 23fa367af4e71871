"""docs/cli.md is what `--help` says, every command and option says what it does, examples run."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from cli_runs import finished, run
from polyak.cli import app
from polyak.cli._reference import reference
from quick import some_quick

__all__ = ["finished"]  # fixtures

PAGE = Path(__file__).parent.parent / "docs/cli.md"


def commands(command: Any = None, name: str = "") -> Iterator[tuple[str, Any]]:
    """All commands by the words after `polyak`, groups too."""
    command = get_command(app) if command is None else command
    yield name, command
    for word, subcommand in getattr(command, "commands", {}).items():
        yield from commands(subcommand, f"{name} {word}".strip())


COMMANDS = dict(commands())


def test_the_page_is_what_help_says() -> None:
    wanted = "`python -m polyak.cli._reference > docs/cli.md` writes it anew"
    assert PAGE.read_text() == reference(), wanted


def options(text: str) -> set[str]:
    """The options in a help text, each with its help, as one line."""
    listed = re.findall(r"^  (--\w.*(?:\n {5,}.*)*)", text, re.MULTILINE)
    return {" ".join(option.split()) for option in listed}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_on_the_page_as_its_help(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a terminal that is wider than the page, too."""
    monkeypatch.setenv("COLUMNS", "200")
    get_command(app).main([*name.split(), "--help"], "polyak", standalone_mode=False)
    said = capsys.readouterr().out
    section, *_ = PAGE.read_text().partition(f"## polyak {name}".rstrip() + "\n")[2].split("\n## ")
    about = said.partition("\n\n")[2].partition("Options:")[0].rstrip()
    assert section.startswith(f"\n```text\n{about}\n")
    shared = dict(re.findall(r"^Options (.*):\n((?: .*\n)*)", PAGE.read_text(), re.MULTILINE))
    (named,) = re.findall(r"^Shared options: (.*)\.$", section, re.MULTILINE) or [""]
    told = options(section).union(*(options(shared[title]) for title in named.split("; ") if title))
    everywhere = {"--help Show this message and exit."}
    if name and not name.startswith("study"):
        everywhere.add("--json Print JSON.")
    assert told | everywhere == options(said)
    assert not told & everywhere


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_says_what_it_does(name: str) -> None:
    assert COMMANDS[name].help
    for parameter in COMMANDS[name].params:
        assert parameter.help, f"polyak {name}: {parameter.name}"


@pytest.mark.parametrize("group", [[], ["study"]])
def test_no_summary_of_a_command_is_cut_off(group: list[str]) -> None:
    said = CliRunner().invoke(app, [*group, "--help"], env={"COLUMNS": "80"}).stdout
    assert "Commands:" in said
    assert not [line for line in said.splitlines()[1:] if line.endswith("...")]
    assert max(map(len, said.splitlines())) <= 80


EXAMPLES = re.findall(r"^ +(polyak (?:.+\\\n)?.+)$", PAGE.read_text(), re.MULTILINE)


HEAVY = ("explain", "advise", "sweep")  # they have quick tests of their own


@pytest.mark.parametrize("line", some_quick(EXAMPLES, lambda line: line.split()[1] not in HEAVY))
def test_the_examples_run_as_written(
    line: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    _, command, *arguments = shlex.split(line.replace("\\\n", " "))
    done = run(command, *arguments)
    assert done.exit_code == (1 if command == "diff" else 0), done.output
    assert done.stdout


def test_every_command_on_files_has_an_example() -> None:
    with_examples = {shlex.split(line)[1] for line in EXAMPLES}
    plain = {name for name, each in COMMANDS.items() if name and not hasattr(each, "commands")}
    missing = plain - with_examples
    wanted = "the docstring has an Example:, which runs in the folder that tests/cli_runs.py makes"
    assert {name for name in missing if not name.startswith("study ")} == set(), wanted


def test_exit_codes_are_told() -> None:
    said = CliRunner().invoke(app, ["--help"]).stdout
    assert all(re.search(rf"^ +{code}  ", said, re.MULTILINE) for code in (0, 1, 2, 130))
