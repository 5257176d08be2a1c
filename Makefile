# `make` lists the targets. They set up everything: packages, virtual environment, images.

VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SHELL := /bin/sh

.PHONY: help deps venv lab demo check test test-fast migration relay-campaign lab-kernels torture interrupted bench bench-lab bench-looking bench-relay differential differential-short differential-full browser spark fuzz fuzz-short deb wheels test-deb deb-short test-wheels clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' Makefile | expand -t 14

deps: ## install the Debian packages that tests and development need
	@tools/deps

venv: $(STAMP) ## create .venv with mtetool and its development tools

$(STAMP): pyproject.toml setup.py mtetool/__init__.py mtetool/_loops.c
	@tools/deps --only venv
	@$(BIN)/python -c '' 2>/dev/null || rm -rf $(VENV)
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $(STAMP)

lab: deps venv ## build the lab's images, if they are not cached
	$(BIN)/python -m tests.lab build

demo: venv ## save, look at and restore the tags of an emulated guest
	@PATH="$(CURDIR)/$(BIN):$$PATH" examples/demo.sh

check: venv ## check style, types and scripts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	shellcheck examples/*.sh tools/* debian/*.p[or]* .ci/run

ifdef T
test: deps venv
	$(BIN)/python -m pytest $(T)
else
test: deps venv ## run everything: checks, tests, the lab on a real kernel; T=PATH: only that test
	@# Tests that need the lab wait for its images.
	@# The short test of the packages needs root, which CI is; it takes what time the others leave.
	@{ make --no-print-directory -j 2 -O check lab && $(if $(CI),nice make --no-print-directory deb-short,:); } & checking=$$!; \
	MTETOOL_DEATH_STRIDE=7 $(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder --durations=30 -m 'not long'; \
	tested=$$?; wait $$checking && exit $$tested
	$(MAKE) --no-print-directory -j 2 differential-short fuzz-short
endif

test-fast: venv ## run the tests that need no lab
	$(BIN)/python -m pytest -n 2 --ignore tests/lab --ignore tests/deb

migration: deps venv ## run the acceptance test: a guest moves between two QEMUs with its tags
	$(BIN)/python -m pytest tests/lab -k migration

relay-campaign: deps venv ## move a guest that hammers its tags live, ten times in a row (half an hour)
	MTETOOL_MIGRATIONS=10 $(BIN)/python -m pytest -rP tests/lab/test_relay.py -k again_and_again -m long

lab-kernels: deps venv ## run all tests of the lab, including the long ones, on each of its kernels
	$(BIN)/python -m pytest -n 2 --dist worksteal tests/lab --lab-kernel 6.12
	$(BIN)/python -m pytest -n 2 --dist worksteal tests/lab --lab-kernel 6.12-16k
	$(BIN)/python -m pytest -n 2 --dist worksteal tests/lab --lab-kernel 7.3

torture: deps venv ## kill mtetool a thousand times at work on a busy VMM (half an hour)
	MTETOOL_DEATHS=1000 $(BIN)/python -m pytest -n 2 -rP tests/lab/test_torture.py

interrupted: deps venv ## make every system call of mtetool fail, or be its last (ten minutes)
	$(BIN)/python -m tests.interrupted

bench: deps venv ## measure speed and size against zstd, lz4 and cp, with charts (twenty minutes)
	$(BIN)/python -m tests.bench

bench-lab: deps venv ## measure what attaching, saving and restoring cost in the lab
	$(BIN)/python -m tests.bench.lab

bench-looking: deps venv ## measure what dump, diff and stats cost beside xxd and cmp (some minutes)
	$(BIN)/python -m tests.bench.looking

bench-relay: deps venv ## measure streams through relays, chains of calls, and live migrations in the lab (an hour)
	$(BIN)/python -m tests.bench.stream
	$(BIN)/python -m tests.bench.ending
	$(BIN)/python -m tests.bench.chains
	$(BIN)/python -m tests.bench.relay 3

differential: deps venv ## compare two thousand calls on each real kernel with the emulated one
	$(BIN)/python -m tests.differential --calls 2000 --seed 1

differential-short: deps venv ## the same on one kernel
	$(BIN)/python -m tests.differential --calls 2000 --seed 1 --kernel 6.12

differential-full: deps venv ## the same with 100,000 calls on each kernel, and a new seed each time
	$(BIN)/python -m tests.differential --calls 100000

browser: venv ## use a report in a real browser (needs Debian's chromium), by keyboard, light and dark
	$(BIN)/python -m tests.formats.browser

spark: venv ## run the example's queries in Spark too (PySpark, half a gigabyte, needs Java)
	$(BIN)/pip install --quiet --disable-pip-version-check pyspark
	$(BIN)/python -m tests.formats.spark

fuzz: venv ## try two million hostile snapshots, guided by coverage (about twenty minutes)
	$(BIN)/python -m tests.fuzz --executions 2000000

fuzz-short: venv ## try a few thousand hostile snapshots, always the same
	$(BIN)/python -m tests.fuzz --executions 8000 --seed 1

deb: ## build the Debian packages for amd64 and arm64, in dist/ (needs root)
	@tools/deps --only packages
	tools/deb

wheels: ## build the source distribution and the wheels, in dist/ (needs root)
	@tools/deps --only packages
	tools/wheels

test-deb: lab deb ## install, upgrade and remove the Debian packages in fresh systems (half an hour)
	$(BIN)/python -m pytest -rP tests/deb/test_deb.py tests/deb/test_lab.py -k 'not wheel'

deb-short: venv ## build the package for this machine, install and remove it (five minutes, needs root)
	@tools/deps --only packages
	$(BIN)/python -m pytest -rP tests/deb/test_short.py

test-wheels: lab wheels ## install and run the wheels and the source distribution (ten minutes)
	$(BIN)/python -m pytest -rP tests/deb/test_wheels.py tests/deb/test_lab.py -k wheel

clean: ## remove everything that make created here, but not the cache elsewhere
	rm -rf $(VENV) build dist demo fuzz-findings *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f mtetool/*.so
