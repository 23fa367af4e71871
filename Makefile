# `make study` runs the article's study, `make test` runs all tests; both build one .venv first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
OUT    ?= study-article
SEEDS  ?= 64

.PHONY: study test test-fast test-range check format docs constraints clean

study: $(READY)
	$(BIN)/polyak study article --seeds $(SEEDS) --out $(OUT)

test: check
	$(BIN)/pytest -n 2

test-fast: $(READY)
	$(BIN)/pytest -n 2 -m "not slow"

# Other versions of Python and torch, each in an environment of some gigabytes: docs/versions.md.
test-range:
	$(PYTHON) tools/test_range.py

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The documentation site: build/docs/site/index.html opens without a server.
docs: $(READY)
	$(BIN)/python tools/site/build.py build/docs

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "polyak needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	@$(PYTHON) -c 'import sys; print("The environment is made with", sys.executable, sys.version.split()[0])'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

# After a change of dependencies: what a fresh environment resolves to becomes the pins.
constraints:
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "torch==2.13.0" -e ".[dev]"
	$(BIN)/pip freeze --exclude-editable | sed 's/+cpu$$//' > constraints.txt
	touch $(READY)

clean:
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache .hypothesis
