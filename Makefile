# Each command does its own set-up: a virtual environment in .venv, made once and again only when pyproject.toml changes.
#
#   make demo     fine-tune the checkpoint that ships with the package (runtime dependencies only, no PyTorch)
#   make test     the whole test suite; ARGS="..." is handed to pytest
#   make lint     ruff and mypy
#
# PYTHON=/path/to/python3 chooses the interpreter; otherwise the first Python >= 3.11 on the path is taken.

SHELL := /bin/sh
BIN := .venv/bin
CAN_HOST := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
CANDIDATES := python3 python3.13 python3.12 python3.11 python3.14 python
PYTHON ?=
ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint types

demo: .venv/runtime
	@rm -rf demo-output
	$(BIN)/peft-jax demo

test: .venv/test
	$(BIN)/python -m pytest $(ARGS)

lint: .venv/test types
	$(BIN)/ruff check
	$(BIN)/ruff format --check

# The folder interop/ is imported as peft_jax.interop, so mypy reads a tree of links in which it stands there.
types: .venv/test
	@rm -rf build/types && mkdir -p build/types/peft_jax
	@ln -s $(CURDIR)/peft_jax/* $(CURDIR)/interop build/types/peft_jax/
	$(BIN)/mypy

.venv/runtime: pyproject.toml | .venv/bin/pip
	@echo "Installing the runtime dependencies into .venv (once; takes a minute or two) ..."
	@$(BIN)/python -m pip install --quiet --editable .
	@touch $@

.venv/test: pyproject.toml | .venv/bin/pip
	@echo "Installing the runtime and test dependencies into .venv (once; takes a few minutes) ..."
	@$(BIN)/python -m pip install --quiet --editable ".[test]"
	@touch .venv/runtime $@

.venv/bin/pip:
	@for python in $(or $(PYTHON),$(CANDIDATES)); do \
	    if $$python -c '$(CAN_HOST)' 2>/dev/null; then exec $$python -m venv .venv; fi; \
	done; \
	echo "make: no Python >= 3.11 with venv among: $(or $(PYTHON),$(CANDIDATES))." \
	     "Install one (on Debian with its python3-venv), or name it: make test PYTHON=/path/to/python3" >&2; exit 1
