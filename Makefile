# `make` lists the targets. Everything is set up by them: packages, virtual environment, images.

VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SHELL := /bin/sh

.PHONY: help deps venv lab demo check test test-fast migration lab-kernels torture interrupted bench bench-lab differential differential-full fuzz fuzz-short clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' Makefile | expand -t 14

deps: ## install the Debian packages that tests and development need
	@tools/deps

venv: $(STAMP) ## make .venv with mtetool and its development tools

$(STAMP): pyproject.toml setup.py mtetool/__init__.py mtetool/_loops.c
	@tools/deps --only venv
	@$(BIN)/python -c '' 2>/dev/null || rm -rf $(VENV)
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $(STAMP)

lab: deps venv ## build the lab's images, where they are not cached
	$(BIN)/python -m tests.lab build

demo: venv ## save, look at and restore the tags of an emulated guest
	@PATH="$(CURDIR)/$(BIN):$$PATH" examples/demo.sh

check: venv ## style, types and scripts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	shellcheck examples/*.sh tools/deps .ci/run

ifdef T
test: deps venv
	$(BIN)/python -m pytest $(T)
else
test: deps venv ## everything: checks, tests, the lab on a real kernel; T=PATH: that test alone
	$(MAKE) --no-print-directory -j 2 -O check lab
	MTETOOL_DEATH_STRIDE=7 $(BIN)/python -m pytest -n 2 --dist worksteal --durations=30 -m 'not long'
	$(MAKE) --no-print-directory -j 2 differential fuzz-short
endif

test-fast: venv ## the tests that need no lab
	$(BIN)/python -m pytest -n 2 --ignore tests/lab

migration: deps venv ## the acceptance test: a guest moves between two QEMUs with its tags
	$(BIN)/python -m pytest tests/lab -k migration

lab-kernels: deps venv ## all tests of the lab, the long ones too, on each of its kernels
	$(BIN)/python -m pytest -n 2 --dist worksteal tests/lab --lab-kernel 6.12
	$(BIN)/python -m pytest -n 2 --dist worksteal tests/lab --lab-kernel 6.12-16k
	$(BIN)/python -m pytest -n 2 --dist worksteal tests/lab --lab-kernel 7.3

torture: deps venv ## a thousand deaths of mtetool on a busy VMM (half an hour)
	MTETOOL_DEATHS=1000 $(BIN)/python -m pytest -n 2 -rP tests/lab/test_torture.py

interrupted: deps venv ## every system call of mtetool fails, or is its last (ten minutes)
	$(BIN)/python -m tests.interrupted

bench: deps venv ## how fast and how small, beside zstd, lz4 and cp, with charts (twenty minutes)
	$(BIN)/python -m tests.bench

bench-lab: deps venv ## what attaching, saving and restoring cost in the lab
	$(BIN)/python -m tests.bench.lab

differential: deps venv ## two thousand calls on real kernels and on the emulated one: same answers
	$(BIN)/python -m tests.differential --calls 2000 --seed 1

differential-full: deps venv ## the same with 100,000 calls on each kernel, and another seed each time
	$(BIN)/python -m tests.differential --calls 100000

fuzz: venv ## two million hostile snapshots, guided by coverage (about twenty minutes)
	$(BIN)/python -m tests.fuzz --executions 2000000

fuzz-short: venv ## some thousand of them, always the same
	$(BIN)/python -m tests.fuzz --executions 8000 --seed 1

clean: ## remove what make made here; the cache outside stays
	rm -rf $(VENV) build dist demo fuzz-findings *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f mtetool/*.so
