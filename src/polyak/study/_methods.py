"""The section of a page that says how it was made, and the rule of its verdicts."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from typing import Any

from polyak.study._page import Code, Section, Terms
from polyak.study._statistics import BOOTSTRAP_SEED, CONFIDENCE, FEWEST_SEEDS, RESAMPLES

PACKAGES = ("polyak", "torch", "numpy", "scipy", "scikit-learn", "altair", "joblib")
RULE = (
    f"A claim holds if the {100 * CONFIDENCE:.0f} % interval over seeds lies inside the claimed range, does not hold "
    "if it lies outside, and is undecided otherwise. A claim of several parts holds if all of them hold, and does not "
    "hold if one of them does not. With fewer than "
    f"{FEWEST_SEEDS} seeds every claim is undecided. Means and medians have percentile bootstrap intervals "
    f"({RESAMPLES} resamples of the seeds, generator seed {BOOTSTRAP_SEED}). Shares of seeds have exact "
    "binomial (Clopper-Pearson) intervals."
)


def made(command: str, values: Mapping[str, Any]) -> Section:
    """The command, the values given, the machine, the versions and the state of the git checkout."""
    machine = f"{platform.machine()}, {os.cpu_count()} processors, {platform.system()}, Python {platform.python_version()}"
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    terms = {**values, "machine": machine, "versions": versions, "git": git_state()}
    return Section("made", "How it was made", (Code(command), Terms(terms)))


def git_state() -> str:
    """The commit of the current folder's checkout, and how many tracked files differ from it."""
    commit = _git("rev-parse", "HEAD")
    if not commit:
        return "the command ran outside a git checkout"
    changed = len(_git("status", "--porcelain", "--untracked-files=no").splitlines())
    return (
        f"commit {commit[:12]}, {changed} tracked files changed"
        if changed
        else f"commit {commit[:12]}, no tracked file changed"
    )


def _git(*arguments: str) -> str:
    """The output of git; empty where git is not installed, or the folder is not a checkout."""
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, encoding="utf-8", check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
