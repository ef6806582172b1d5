# make demo | make test: all a newcomer needs. The environment is built once in .venv, and again when its inputs change.

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
READY  := $(VENV)/.ready

.PHONY: demo test interpreted trainer frameworks parallel families lint verify kernels kernels-versions matrix bench report reproduce gpu docs dist clean help
.DEFAULT_GOAL := help

help:  ## what there is to make
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 24

# torch by its exact version, first and alone: a looser pin would fetch a build with gigabytes of CUDA libraries.
$(READY): constraints.txt pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python >= 3.10 is needed, this is " + sys.version.split()[0])'
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV), once: usually three to five minutes"
	@echo "  1 of 2: torch"
	@$(PY) -m pip install -q -c constraints.txt torch
	@echo "  2 of 2: transformers, TRL, this package, and what its tests need"
	@$(PY) -m pip install -q -c constraints.txt -e '.[test]'
	@touch $@

demo: $(READY)  ## train a tiny model with TDPO: a table and demo-out/curves.png
	$(PY) python/examples/sentiment.py $(ARGS)

test: PROBLEMS = flat near-equal
INTERPRETED := tests/test_accuracy.py tests/test_exactness.py tests/test_equality.py tests/test_bits.py tests/test_extras.py

test: $(READY) lint verify  ## everything that CI checks
	$(PY) -m pytest -n 2 $(ARGS)
	TRITON_INTERPRET=1 $(PY) -m pytest -n 2 -m "not long" tests/device $(INTERPRETED)
	rm -rf build/gpu-dry && $(PY) -m bench.gpu --dry

interpreted: $(READY)  ## every test that kernels can be interpreted in, on a CPU (half an hour)
	TRITON_INTERPRET=1 $(PY) -m pytest -n 2 $(ARGS) tests/device $(INTERPRETED) tests/test_parallel_laws.py

trainer: $(READY)  ## the trainers' long tests: more models, settings and processes (minutes)
	$(PY) -m pytest -n 2 -m long $(ARGS) tests/trainer

# Each in an environment of its own, because it wants other versions of transformers and TRL than .venv has.
# Texts need no torchvision and no torchaudio, whose wheels do not load beside a CPU build of torch.
FRAMEWORKS := ms-swift llama-factory axolotl

frameworks: $(READY)  ## the recipes for other frameworks, each run by its own command line (gigabytes, minutes)
	@set -e; for name in $(FRAMEWORKS); do \
		there=$(VENV)/$$name; \
		test -x $$there/bin/python || $(PYTHON) -m venv $$there; \
		$$there/bin/python -m pip install -q -c constraints.txt torch; \
		$$there/bin/python -m pip install -q -r tests/trainer/requirements/$$name.txt; \
		$$there/bin/python -m pip uninstall -q -y torchvision torchaudio; \
	done
	$(PY) -m pytest -n 2 -m long $(ARGS) tests/trainer/test_frameworks.py

parallel: $(READY)  ## what is split over ranks, on four and on eight processes (a minute)
	$(PY) -m pytest -n 2 -m long $(ARGS) tests/test_parallel*.py

families: $(READY)  ## docs/families.md anew: every family of transformers, built tiny (5 minutes)
	$(PY) docs/families.py > build-families.md
	@mv build-families.md docs/families.md

lint: $(READY)  ## ruff
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

verify: $(READY)  ## every backend against float64 (a minute); PROBLEMS="flat near-equal" for some
	$(PY) -m tdpo_kernels verify $(PROBLEMS)

kernels: $(READY)  ## every kernel configuration compiled for every target, without a GPU (minutes)
	$(PY) -m bench.compiled $(ARGS)

# triton alone, no torch: 3.6's interpreter needs numpy < 2.4, and no other package matters to a compiler.
kernels-versions:  ## the same under the oldest and the newest Triton
	@set -e; for version in 3.6.0 3.9.*; do \
		there=$(VENV)/triton-$${version%%.\*}; \
		test -x $$there/bin/python || $(PYTHON) -m venv $$there; \
		$$there/bin/python -m pip install -q "triton==$$version" "numpy<2.4"; \
		$$there/bin/python -m bench.compiled $(ARGS); \
	done

# A plain torch is a CUDA build that fetches gigabytes of libraries: TORCH_INDEX names an index of CPU builds, which are asked for
# first. A Python that is not there is left out, saying so. Constraints by environment also hold where the package is built.
# Where the interpreter wants an older numpy than the rest was run with, as Triton 3.6's does, `env` says so, and it gets one.
MATRIX := pinned:3.12 oldest:3.10 newest:3.13
CORE := tests/test_exactness.py tests/test_bits.py tests/test_compile.py tests/test_mixed_products.py tests/test_availability.py
TRAINER := tests/trainer/test_trainer.py tests/trainer/test_head.py

matrix:  ## the core laws in other Pythons and versions, CPU only (gigabytes); MATRIX=oldest:3.10 for one, TORCH_INDEX=
	@set -e; for entry in $(MATRIX); do \
		name=$${entry%%:*}; python=python$${entry##*:}; there=$(VENV)/matrix-$$name; py=$$there/bin/python; \
		$$python -c pass 2> /dev/null || { echo "$$name is left out: there is no $$python"; continue; }; \
		test -x $$py || $$python -m venv $$there; \
		export PIP_CONSTRAINT=tests/matrix/$$name.txt; \
		$$py -m pip install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch; \
		$$py -m pip install -q -e '.[test]' numpy; \
		echo "$$name:"; $$py -m pip check; $$py -m tdpo_kernels env; \
		$$py -m tdpo_kernels verify flat near-equal; \
		$$py -m pytest -n 2 $(CORE); \
		$$py -m pytest -n 2 -m "not long" $(TRAINER); \
		export TRITON_INTERPRET=1; \
		if said=$$($$py -m tdpo_kernels env | grep -o 'the interpreter of .* wants numpy.*'); then \
			echo "$$said: one is installed"; \
			PIP_CONSTRAINT= $$py -m pip install -q "$$(echo "$$said" | grep -o 'numpy < [0-9.]*')"; \
		fi; \
		$$py -m pytest -n 2 -m "not long" tests/device tests/test_accuracy.py tests/test_equality.py; \
		unset TRITON_INTERPRET; \
	done

bench: $(READY)  ## everything that a CPU can be measured by (20 minutes); rows go to bench/results/
	$(PY) -m bench $(ARGS)

report: $(READY)  ## tables and figures of what was measured, in bench/results/report
	$(PY) -m bench report

reproduce: $(READY)  ## the paper's experiment in miniature, into build/reproduce (half an hour; goes on where it ended)
	$(PY) -m bench.reproduce $(ARGS)

# Wants no environment of its own and no network: .venv where it is there already, else the system's python.
OUT ?= build/gpu

gpu:  ## the GPU campaign into OUT=build/gpu; goes on where it was cut off; ARGS="--minutes 9", "--stages env tune"
	$(if $(wildcard $(PY)),$(PY),$(PYTHON)) -m bench.gpu --out $(OUT) $(ARGS)

# The generator reads docstrings, so it goes where torch and the trainers are.
$(VENV)/.docs: $(READY)
	@$(PY) -m pip install -q -c constraints.txt -e '.[docs]'
	@touch $@

docs: $(VENV)/.docs  ## the documentation, into build/docs; a warning or a link that leads nowhere is an error
	$(PY) docs/draw.py
	$(PY) -m sphinx --fail-on-warning --keep-going --quiet -c docs -d build/doctrees . build/docs
	@echo build/docs/docs/index.html

dist: $(VENV)/dist/bin/python  ## wheel and sdist of what is committed, into dist/, checked where nothing else is (minutes)
	$< .ci/dist.py

$(VENV)/dist/bin/python: constraints.txt
	@$(PYTHON) -m venv $(VENV)/dist
	@$@ -m pip install -q -c constraints.txt build twine
	@touch $@

clean:  ## remove the environment and outputs
	rm -rf $(VENV) build dist *.egg-info demo-out
