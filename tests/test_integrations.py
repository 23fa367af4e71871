"""What every integration keeps: one file, one framework, words for a framework that is missing."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest

from polyak import integrations

FRAMEWORKS: dict[str, str] = {}
"""integration -> the package that it needs, and that its extra installs."""


def test_every_integration_is_in_the_table() -> None:
    assert set(integrations.__all__) == set(FRAMEWORKS)


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_missing_framework_is_one_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [m for m in sys.modules if m.partition(".")[0] == FRAMEWORKS[name]]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, FRAMEWORKS[name], None)
    monkeypatch.delitem(sys.modules, f"polyak.integrations.{name}", raising=False)
    with pytest.raises(ModuleNotFoundError) as caught:
        import_module(f"polyak.integrations.{name}")
    assert f'pip install "polyak[{name}]"' in str(caught.value)


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_an_integration_is_one_short_file(name: str) -> None:
    source = Path(integrations.__file__).parent / f"{name}.py"
    assert len(source.read_text().splitlines()) < 150
