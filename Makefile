# One environment, two commands. Any of: make demo, make test, make bench, make conformance, make clean.

PYTHON ?= python3
VENV := .venv
ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif
PEERS := .venv-conformance
PEERS_BIN := $(PEERS)/$(notdir $(BIN))
BUILT_FROM := pyproject.toml constraints.txt hatch_build.py kernels/sdkernels/build.py $(wildcard kernels/sdkernels/*.[ch])
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint bench conformance clean

demo: $(VENV)/.demo  ## Merge three tiny models and paint what they learned.
	$(BIN)/sdmerge demo demo

test: lint  ## Everything that CI runs.
	$(BIN)/python -m pytest -n 2 -q

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.dev  ## Full-size merges against the I/O floor (27 GB of files, once).
	$(BIN)/python -m benchmarks.bench_merge --check

conformance: $(PEERS)/.peers  ## The same merges by mergekit and sd-mecha, which have an environment of their own.
	$(PEERS_BIN)/python -m pytest -q tests/conformance

$(VENV)/bin/python $(VENV)/Scripts/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BUILT_FROM) | $(BIN)/python
	$(INSTALL) --editable '.[demo]'
	touch $@

$(VENV)/.dev: $(BUILT_FROM) | $(BIN)/python
	$(INSTALL) --editable '.[dev]'
	touch $@ $(VENV)/.demo

$(PEERS)/.peers: $(BUILT_FROM)
	$(PYTHON) -m venv $(PEERS)
	$(PEERS_BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable '.[conformance]'
	touch $@

clean:
	rm -rf $(VENV) $(PEERS) demo dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
