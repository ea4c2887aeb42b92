# `make demo` and `make test` do all of their own set-up: a virtual environment in .venv, then the work.
# A stamp file remembers the set-up; it runs again when pyproject.toml or constraints-cpu.txt change.
#
#   make demo       GRPO on a tiny model on this machine: the trainer, its daemon, and what it measured
#   make test       the test suite (tests that need a GPU are deselected where there is none)
#   make lint       ruff, formatting and rules
#   make types      mypy --strict over the built and installed wheel
#   make aot-table  compile all kernels for GPUs that are not here; what the compiler made of them is a test
#   make clean      everything that was made here
#
# Without an NVIDIA driver the versions of constraints-cpu.txt are installed, torch first and by itself. On Linux
# the default package index serves torch with CUDA libraries (several GB); PyTorch's own index has small CPU builds:
#
#   make test TORCH_ARGS="--index-url URL"    (the URL is in PyTorch's installation guide)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
TORCH_ARGS ?=
PYTEST_ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
TYPES := build/types

HAS_GPU := $(shell { command -v nvidia-smi || test -e /dev/nvidiactl; } >/dev/null 2>&1 && echo yes)
CONSTRAINTS := $(if $(HAS_GPU),,-c constraints-cpu.txt)

.PHONY: help setup demo test lint types aot-table clean

help:
	@sed -n '4,9s/^#   //p' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP)

$(STAMP): pyproject.toml constraints-cpu.txt
	@echo "setting up $(VENV) ($(if $(HAS_GPU),GPU,CPU); the first time takes minutes)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet "setuptools>=77"
	$(if $(HAS_GPU),,$(PIP) install --quiet $(CONSTRAINTS) $(TORCH_ARGS) torch)
	$(PIP) install --quiet $(CONSTRAINTS) --no-build-isolation --editable ".[dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/grpo_arithmetic.py

test: $(STAMP)
	$(BIN)/pytest $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# In a checkout kernels/ and integrations/ join the package through __path__, which mypy does not follow: what is
# checked is the wheel, built from the sdist and installed beside nothing else.
types: $(STAMP)
	rm -rf $(TYPES)
	mkdir -p $(TYPES)
	$(BIN)/python -m build --no-isolation --outdir $(TYPES)/dist . >$(TYPES)/log 2>&1 || { cat $(TYPES)/log; exit 1; }
	$(PIP) install --quiet --no-deps --target $(TYPES)/site $(TYPES)/dist/*.whl
	cd $(TYPES)/site && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml -p rolloutd
	MYPYPATH=$(TYPES)/site $(BIN)/mypy --allow-subclassing-any examples  # of trl's and transformers' classes, Any here

aot-table: $(STAMP)
	$(BIN)/python -m tests.kernels.aot table

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
