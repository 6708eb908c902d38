# make demo: digits from scratch to a report. make test: all tests. Both make .venv first, once.

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin

.PHONY: demo test clean

demo: $(VENV)/.installed
	@echo "== flowar demo: about five minutes on two CPU cores =="
	@$(RUN)/flowar demo

test: $(VENV)/.installed
	@echo "== tests: several minutes =="
	@$(RUN)/ruff check .
	@$(RUN)/mypy
	@$(RUN)/pytest

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "flowar needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + "; try make PYTHON=python3.12")'
	@echo "== setting up $(VENV): downloads and installs about 5 GB, some minutes =="
	@$(PYTHON) -m venv $(VENV)
	@$(RUN)/pip install --progress-bar off --disable-pip-version-check -e '.[dev]' | sed -u -n -e 's/^Collecting \([^ <>=!;]*\).*/  fetching \1/p' -e 's/^Installing collected.*/  installing, a minute or two/p' -e '/^ERROR/p'
	@touch $@

clean:
	rm -rf $(VENV) runs
