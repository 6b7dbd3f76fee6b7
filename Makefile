# Needs Python 3.11+, make and git. Everything is installed into $(VENV); nothing else on the machine is touched.
PYTHON ?= python3
VENV   ?= .venv
# Of the releases that pyproject.toml allows, the one that a new $(VENV) gets.
TORCH  ?= 2.13.0
ARGS   ?=

BIN := $(VENV)/bin
# Python compiles what is imported, once; pip would compile all of torch, which takes half a minute.
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --no-input --no-compile
TEST := $(BIN)/python -m pytest
PARALLEL := -n auto --dist worksteal

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-full check lint layering types format aot sanitize mutants hub bench report tune gpu clean

help: ## list what make can do
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo '  PYTHON=python3.12 and TORCH=2.15.0 pick what a new $(VENV) gets; ARGS="-k golden" goes to pytest.'

demo: $(VENV)/.package ## write a class twice, side by side: several tokens a pass, and token by token
	$(BIN)/python -m eval.demo $(ARGS)

test: $(VENV)/.test $(VENV)/hub-0.17.2 ## run the tests (minutes, no GPU needed)
	$(TEST) $(PARALLEL) $(ARGS)
	TRITON_INTERPRET=1 $(TEST) $(PARALLEL) -m "kernels and not slow" $(ARGS) || [ $$? -eq 5 ] # 5: none of these

test-full: $(VENV)/.test $(VENV)/hub-0.17.2 ## run the tests, the slow ones included
	$(TEST) $(PARALLEL) -m "" $(ARGS)
	TRITON_INTERPRET=1 $(TEST) $(PARALLEL) -m kernels $(ARGS)

check: lint layering types test sanitize aot ## all that CI runs: format, lint, layering, types, tests, bf16, compiled kernels

lint: $(VENV)/.dev ## check format and lint, change nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

layering: $(VENV)/.test ## check that no import points back
	$(TEST) -q tests/test_layering.py

types: $(VENV)/.dev ## check types with mypy
	$(BIN)/mypy

format: $(VENV)/.dev ## format, and mend what lint can mend
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

aot: $(VENV)/.test $(VENV)/triton-3.6.0 ## compile every kernel without a GPU, under two Tritons, against the lock
	$(BIN)/python -m tools.aot $(ARGS)
	PYTHONPATH=$(VENV)/triton-3.6.0 $(BIN)/python -m tools.aot $(ARGS)

sanitize: $(VENV)/.test $(VENV)/ttsem-0.1.0 ## execute every kernel in bf16 without a GPU: values, bounds, races
	TT_KERNELS_ON_CPU=1 PYTHONPATH=.:tests:$(VENV)/ttsem-0.1.0 $(TEST) $(PARALLEL) -p tools.sanitize -m sanitize $(ARGS)

mutants: $(VENV)/.test $(VENV)/ttsem-0.1.0 ## plant faults in kernels: the tests must catch every one
	PYTHONPATH=tests:$(VENV)/ttsem-0.1.0 $(BIN)/python -m tools.mutants $(ARGS)

hub: $(VENV)/.test ## write the kernel for the Hugging Face Hub into build/hub
	$(BIN)/python -m tools.hub $(ARGS)

bench: $(VENV)/.test ## measure the ops, and against peers
	$(TEST) bench/ -m "" --timeout 0 -s $(ARGS)

report: $(VENV)/.package ## render SPEED.md, its figures and docs/kernels.md from bench/results
	$(BIN)/python -m bench.report $(ARGS)
	$(BIN)/python -m tools.kernels_page

tune: $(VENV)/.test ## measure launches on a GPU, keep what wins: make tune OP=experts
	$(BIN)/python -m tools.tune $(OP) $(ARGS)

gpu: ## all that is owed from a GPU, in slices, resumed, one archive: PYTHON names a Python that has what it takes
	$(PYTHON) -m tools.gpu $(ARGS)

clean: ## remove caches and build products, not .venv
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# One stamp for each set of dependencies, and for those it includes: installed once, and again when pyproject.toml changes.
$(VENV)/.package: EXTRAS :=
$(VENV)/.test: EXTRAS := [test,peers]
$(VENV)/.dev: EXTRAS := [dev]
$(VENV)/.test: INCLUDED := $(VENV)/.package
$(VENV)/.dev: INCLUDED := $(VENV)/.package $(VENV)/.test
$(VENV)/.package $(VENV)/.test $(VENV)/.dev: pyproject.toml | $(BIN)/python
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP_INSTALL) torch==$(TORCH)
	$(PIP_INSTALL) --editable ".$(EXTRAS)"
	@touch $@ $(INCLUDED)

# What the oldest supported torch brings: kernels are compiled by it and by the installed one.
$(VENV)/triton-3.6.0: | $(BIN)/python
	$(PIP_INSTALL) --target $@ --no-deps triton==3.6.0

# Hugging Face's kernels, and of the releases of transformers that take it the last: later ones ask for another kernels.
# It imports nothing else; what it depends on besides is for checking signatures.
$(VENV)/hub-0.17.2: | $(BIN)/python
	$(PIP_INSTALL) --target $@ --no-deps kernels==0.17.2 tomlkit==0.15.2 transformers==5.20.2

# Beside the environment, as it asks for Python 3.12 and works with 3.11.
$(VENV)/ttsem-0.1.0: | $(BIN)/python
	$(PIP_INSTALL) --target $@ --no-deps --ignore-requires-python ttsem==0.1.0

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'Python 3.11 or newer is needed. Name one: make PYTHON=python3.12 ...' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo 'This Python has no venv or ensurepip. On Debian and Ubuntu: apt install python3-venv' >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }
