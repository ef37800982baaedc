# make quickstart           from raw text to BLEU with GradInit; trains as long as fits in 8 minutes here
# make quickstart-compare   against the default initialisation without and with warmup, in 12 minutes
# make test                 the fast tests: what to run before a commit
# make test-all             those and the slow ones
# make lint                 ruff and mypy
# make docs                 the documentation as a web site, in site/
# The quickstarts take options in ARGS: make quickstart ARGS="--minutes 4 --seed 2", or "--updates 500"
# All of them share one virtual environment, made on first use.

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile
STAMP := $(VENV)/.installed

.PHONY: quickstart quickstart-compare test test-slow test-all lint docs clean

quickstart: $(STAMP)
	PYTHONPATH=data-prep $(BIN)/python recipes/quickstart.py $(ARGS)

quickstart-compare: $(STAMP)
	PYTHONPATH=data-prep $(BIN)/python recipes/quickstart.py --compare $(ARGS)

test: $(STAMP)
	$(PYTEST) -m 'not slow'

test-slow: $(STAMP)
	$(PYTEST) -m slow

test-all: test test-slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/python -m mkdocs build --strict

# setup.py and the pinned versions decide what is installed: the environment is made anew with them.
$(STAMP): setup.py pyproject.toml constraints.txt
	@echo "making the virtual environment $(VENV) (a minute or two; torch is the large part)"
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || \
	    { echo "fairseq needs Python 3.11 or 3.12, and $(PYTHON) is $$($(PYTHON) --version 2>&1):" \
	      "run 'make PYTHON=python3.11 $(MAKECMDGOALS)' with one of them"; exit 1; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[fairseq,quickstart,test]'
	@touch $@

clean:
	rm -rf $(VENV) quickstart-run site
