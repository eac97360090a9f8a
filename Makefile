# The developer's verbs. Each sets up what it needs; a second call is fast.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
export WANDB_SILENT ?= true

.PHONY: quickstart setup dev check format test test-all bench clean

quickstart: setup  ## pretrain, hand over, fine-tune, compare: prints the table and where the pictures are
	$(BIN)/baton chain configs/chains/quickstart.yaml

setup: $(VENV)/.installed
dev: $(VENV)/.installed-dev

$(VENV)/bin/python:
	$(PYTHON) -m venv "$(VENV)"

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch "$@"

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch "$(VENV)/.installed" "$@"

check: dev  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: dev  ## the tests of every day
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-all: dev  ## everything: DDP, kills, notebooks
	$(BIN)/python -m pytest -n 2

bench: dev  ## ratios, side by side; takes a while
	for file in benchmarks/*.py; do $(BIN)/python "$$file"; done

clean:
	rm -rf "$(VENV)" .pytest_cache .mypy_cache .ruff_cache
