# make demo       run the main experiment (make demo ARGS="--problem addition --T 100" SEED=3)
# make test       run the quick tests (make test ARGS="-k addition")
# make test-slow  run the others: whole commands, kills, compiles, wide sweeps
# make test-all   run both at once
# make lint       style, format, types
# make docs       build docs/_build/html, a warning being an error
# make bench      side-by-side measurements against peers
#
# Each makes the virtual environment $(VENV) on first use and keeps it: the stamps below are renewed only
# when the requirements change. To take a CPU-only torch, set pip's own options, e.g. PIP_EXTRA_INDEX_URL.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
SEED ?=

python := $(VENV)/bin/python
pytest := $(python) -m pytest -n auto --maxprocesses 4 --dist worksteal
install := $(python) -m pip install --quiet --disable-pip-version-check -c constraints.txt
requirements := setup.cfg setup.py pyproject.toml constraints.txt

.PHONY: help demo test test-slow test-all lint docs bench clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

demo: $(VENV)/.runs
	$(python) -m runs.demo $(if $(SEED),--seed $(SEED)) $(ARGS)

test: $(VENV)/.test
	$(pytest) -m "not slow" $(ARGS)

test-slow: $(VENV)/.test
	$(pytest) -m slow $(ARGS)

test-all: $(VENV)/.test
	$(pytest) $(ARGS)

lint: $(VENV)/.test
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy

docs: $(VENV)/.docs
	$(python) -m sphinx --quiet --fail-on-warning --keep-going -b html docs docs/_build/html

bench: $(VENV)/.bench
	$(python) -m benchmarks $(ARGS)

clean:
	rm -rf $(VENV) build dist docs/_build *.egg-info

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "hfopt needs Python 3.10 or newer; choose one with PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# The tests drive the runs as well, so theirs is the larger environment; whichever comes first, the other only adds.
$(VENV)/.runs: $(VENV)/.created $(requirements)
	$(install) -e '.[runs]'
	@touch $@

$(VENV)/.test: $(VENV)/.runs
	$(install) -e '.[test]'
	@touch $@

$(VENV)/.docs: $(VENV)/.runs
	$(install) -e '.[docs]'
	@touch $@

$(VENV)/.bench: $(VENV)/.runs
	$(install) -e '.[bench]'
	@touch $@
