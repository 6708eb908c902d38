# Each target first makes .venv, if it doesn't exist. make demo: train on digits from scratch, up to a report. make check:
# style, types, structure and docs, in about a minute. make test: what CI runs. make test-all: every case and all kills, at
# night.

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin

# Two halves that take equally long: FIRST, and all other tests, with those of training.
FIRST = tests/flowar/ tests/data_prep/ tests/benchmarks/
OTHERS = $(filter-out $(FIRST) tests/data/ tests/__pycache__/,$(wildcard tests/*/)) \
	$(wildcard tests/test_*.py) tests/flowar/training

.PHONY: demo check test test-all test-flowar test-others clean

demo: $(VENV)/.installed
	@echo "== flowar demo: about five minutes on two CPU cores =="
	@$(RUN)/flowar demo

check: $(VENV)/.installed
	@$(RUN)/ruff check .
	@$(RUN)/ruff format --check .
	@$(RUN)/mypy
	@$(RUN)/pytest -q --no-header --durations=0 --durations-min=5 tests/test_structure.py
	@NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --strict --quiet

# Runs in two halves, side by side; each prints under its own name.
test: check
	@echo "== tests: about ten minutes on two CPU cores =="
	@$(MAKE) --no-print-directory -j2 test-flowar test-others

test-all: export FLOWAR_TEST_ALL := 1
test-all: check
	@FLOWAR_TEST_TIERS=1 $(MAKE) --no-print-directory test-flowar test-others

test-flowar: $(VENV)/.installed
	@$(RUN)/pytest $(FIRST) --ignore tests/flowar/training | sed -u 's/^/flowar | /'

test-others: $(VENV)/.installed
	@$(RUN)/pytest $(OTHERS) --deselect tests/test_structure.py | sed -u 's/^/others | /'

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "flowar needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + "; try make PYTHON=python3.12")'
	@echo "== setting up $(VENV): downloads and installs about 5 GB, takes some minutes =="
	@$(PYTHON) -m venv $(VENV)
	@$(RUN)/pip install --progress-bar off --disable-pip-version-check -c constraints.txt -e '.[dev]' | sed -u -n -e 's/^Collecting \([^ <>=!;]*\).*/  fetching \1/p' -e 's/^Installing collected.*/  installing, takes a minute or two/p' -e '/^ERROR/p'
	@touch $@

clean:
	rm -rf $(VENV) runs site
