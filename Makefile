# Every target works in a fresh clone: the first one creates .venv, later ones start at once.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2
# One thread per process: the test workers share the cores.
SINGLE := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: help setup demo test coverage lint format bench clean

help:
	@echo "make setup   create .venv and install the package with its tools"
	@echo "make demo    run the main job end to end and write a report"
	@echo "make test    run every test and doctest"
	@echo "make coverage  the same, with coverage of lines: half as long again"
	@echo "make lint    format, lint, types, layers, sizes"
	@echo "make format  rewrite the files in the project's format"
	@echo "make bench   measure against Adam, IPOPT, torchdiffeq and, where installed, crocoddyl and mpc.pytorch"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later is needed: make setup PYTHON=/path/to/python3"; exit 1; }
	@echo "Installing into $(VENV) from constraints.txt: one to four minutes, 2 GB on disk"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt --editable '.[data,dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/ocnopt demo

test: $(STAMP)
	@$(SINGLE) $(BIN)/python -m pytest --quiet --numprocesses=$(WORKERS) --dist=worksteal $(ARGS)

coverage: $(STAMP)
	@$(MAKE) --no-print-directory test ARGS="--cov --cov-report=term $(ARGS)"

lint: $(STAMP)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy -p ocnopt
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/python tests/style/sizes.py

format: $(STAMP)
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: $(STAMP)
	@$(SINGLE) $(BIN)/python -m tests.benchmarks $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .coverage* .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find ocnopt problems solvers tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
