# make demo | make test: all a newcomer needs. The environment is built once in .venv, and again when its inputs change.

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
READY  := $(VENV)/.ready

.PHONY: demo test lint verify bench clean help
.DEFAULT_GOAL := help

help:  ## what there is to make
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

# torch by its exact version, first and alone: a looser pin would fetch a build with gigabytes of CUDA libraries.
$(READY): constraints.txt pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), f"Python >= 3.10 is needed, this is {sys.version.split()[0]}"'
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (the first time takes minutes)"
	@$(PY) -m pip install -q -c constraints.txt torch
	@$(PY) -m pip install -q -c constraints.txt -e '.[test]'
	@touch $@

demo: $(READY)  ## train a tiny model with TDPO: a table and demo-out/curves.png
	$(PY) python/examples/sentiment.py $(ARGS)

test: $(READY) lint verify  ## everything that CI checks
	$(PY) -m pytest $(ARGS)

lint: $(READY)  ## ruff
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

verify: $(READY)  ## every backend against float64
	$(PY) -m tdpo_kernels verify

bench: $(READY)  ## the table of the README, measured here; rows go to bench/results/
	$(PY) -m bench $(ARGS)

clean:  ## remove the environment and outputs
	rm -rf $(VENV) build *.egg-info demo-out
