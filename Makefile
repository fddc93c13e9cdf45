# Everything a newcomer types. `make demo` and `make test` set up what they need in .venv first.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PMVIS := $(BIN)/pmvis
NATIVE := CMakeLists.txt $(shell find csrc -type f)

.PHONY: help demo test lint bench builds fuzz sanitize clean
help:  ## List the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: $(VENV)/ready  ## Set up, then run the whole paper on drawn pictures (minutes on a CPU)
	$(PMVIS) demo -o build/demo

test: $(VENV)/ready  ## Set up, then run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

lint: $(VENV)/ready-dev  ## Style and types
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: $(VENV)/ready  ## Speed and memory, as ratios against peers in one run
	$(BIN)/python tests/benchmarks/bench_masks.py
	$(BIN)/python tests/benchmarks/bench_deformable_attention.py
	$(BIN)/python tests/benchmarks/bench_local_attention.py
	$(BIN)/python tests/benchmarks/bench_pairwise.py
	$(BIN)/python tests/benchmarks/bench_refine.py tiny

builds: $(VENV)/ready  ## Install in the ways in which people do, each into a fresh environment (minutes)
	PYTHON=$(BIN)/python bash tests/builds.sh

fuzz:  ## Over a million broken inputs against the C++ readers, under sanitizers (minutes)
	bash tests/fuzz/run.sh

sanitize: $(VENV)/ready  ## The operators' tests on kernels built under sanitizers (minutes)
	PYTHON=$(BIN)/python bash tests/fuzz/sanitize.sh

clean:  ## Remove what was built
	rm -rf build $(VENV)

include docs/reproduce/Makefile

$(VENV)/ready: pyproject.toml $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -e '.[test]'
	touch $@

$(VENV)/ready-dev: $(VENV)/ready
	$(BIN)/python -m pip install -q -e '.[dev]'
	touch $@
