# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
# Both create .venv and install pinned versions first; a second run finds that done and costs nothing.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINTS := constraints.txt
TEST_WORKERS ?= 2
PYTEST_ARGS ?=

# The stamp carries a digest of what the installation depends on: a changed pin or kernel installs again.
SOURCES := $(CONSTRAINTS) pyproject.toml lmms-eval/pyproject.toml $(wildcard setup.py sparsemm/ops/schemas.py csrc/* csrc/*/*)
STAMP := $(VENV)/.installed-$(shell cat $(SOURCES) 2>/dev/null | sha256sum | cut -c1-16)

# Without a GPU pip may take a CPU build (torch==2.13.0+cpu) where its configuration offers one; with a GPU
# `===` insists on the release itself, which carries the CUDA libraries.
TORCH_VERSION := $(shell sed -n 's/^torch==//p' $(CONSTRAINTS))
TORCH := $(if $(shell nvidia-smi -L 2>/dev/null),torch===$(TORCH_VERSION),torch==$(TORCH_VERSION))
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help quickstart test test-oldest mutants lint format install vocabularies kernels gpu-check clean

help:  ## This list
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-12s %s\n", $$1, $$2 }'

quickstart: $(STAMP)  ## The whole method on a miniature: table, JSON and plot in results/quickstart
	PATH="$(abspath $(BIN)):$$PATH" bash scripts/quickstart.sh

# torch spreads one operation over all cores; two test processes of one thread each finish sooner.
test: lint  ## Style check and all tests
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) $(PYTEST_ARGS)

lint: $(STAMP)  ## Style check, and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: $(STAMP)  ## Apply the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(STAMP)  ## Virtual environment with pinned versions and this package

# The vocabularies of real models, out of packages that are not installed: tests that want them skip without.
VOCABULARIES := mistral-common==1.13.0 dashscope==2.0.2

vocabularies: | $(VENV)  ## Fetch vocabularies of real models for the tests of token matching (9 MB)
	$(PIP) download --no-deps --dest $(VENV)/vocabularies $(VOCABULARIES)

# lmms-eval comes without what it depends on, torchvision among it; its plug-in names what the tasks need.
$(STAMP): | $(VENV)
	$(PIP) install --constraint $(CONSTRAINTS) "$(TORCH)"
	$(PIP) install --constraint $(CONSTRAINTS) setuptools
	$(PIP) install --constraint $(CONSTRAINTS) --no-build-isolation --editable ".[dev]"
	$(PIP) install --constraint $(CONSTRAINTS) --no-deps lmms-eval
	$(PIP) install --constraint $(CONSTRAINTS) --no-build-isolation --editable "./lmms-eval[runtime]"
	-$(MAKE) vocabularies
	rm -f $(VENV)/.installed-*
	touch $@

$(VENV):
	$(PYTHON) -m venv $(VENV)

# The same pins but for transformers, at the oldest release that is supported.
OLDEST := .venv-oldest
$(OLDEST)/.installed: $(CONSTRAINTS) pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	sed -E '/^(transformers|tokenizers|huggingface[-_]hub)==/d' $(CONSTRAINTS) > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --constraint $(OLDEST)/constraints.txt "$(TORCH)" setuptools "transformers==5.17.*"
	$(OLDEST)/bin/python -m pip install --constraint $(OLDEST)/constraints.txt --no-build-isolation --editable ".[dev]"
	touch $@

test-oldest: $(OLDEST)/.installed  ## The tests of models, cache and decoding with the oldest transformers
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n $(TEST_WORKERS) $(PYTEST_ARGS) tests/models \
		tests/cache tests/decoding tests/test_patching.py

# Faults planted in a copy of the tree, drawn by seed; results/mutants is taken up again. Not part of `make test`.
MUTANTS ?= 200
SEED ?= 0
mutants: $(STAMP)  ## Which of MUTANTS=200 planted faults (SEED=0) the tests catch; goes on where it was stopped
	PYTHONPATH=tests/support $(BIN)/python -m mutation --count $(MUTANTS) --seed $(SEED) --workers $(TEST_WORKERS)

kernels: $(STAMP)  ## Compile csrc (CPU always; CUDA where nvcc is found)
	$(BIN)/python csrc/build.py

gpu-check: $(STAMP)  ## Everything that needs a GPU (DRY=1: walked through on a CPU)
	PATH="$(abspath $(BIN)):$$PATH" bash scripts/others/gpu_check.sh

clean:  ## Remove build folders and caches; results, runs and .venv stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
