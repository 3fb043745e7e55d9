# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` work on a clean checkout: they make .venv, build the extension and run. A second call
# does only what changed.
#
# PYTHON=python3.12   interpreter that .venv is made from; its torch is used if it has CUDA
# TORCH="..."         what pip installs otherwise, with options such as an index of CPU wheels
# PYTEST_ARGS="..."   further arguments of pytest

VENV ?= .venv
PY := $(VENV)/bin/python
BUILD_DIR ?= $(CURDIR)/build/cmake
PYTEST_ARGS ?=
CSRC := $(shell find csrc third_party/cmake -type f 2>/dev/null)
FORMATTED := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)

.PHONY: help build demo test lint format gpu-test gpu-bench tables clean

help:
	@echo "make demo       compare full, lossy and vericache on a tool call of about 4K tokens"
	@echo "make test       run the tests"
	@echo "make lint       ruff, mypy, clang-format"
	@echo "make build      build the extension into .venv"
	@echo "make gpu-test   on a GPU: check the kernels, also under compute-sanitizer, and run the tests that need one"
	@echo "make gpu-bench  run the benchmarks on a GPU"
	@echo "make tables     write the tables of README.md from bench/results"
	@echo "make clean      remove .venv and build outputs"

$(VENV)/.made: tools/venv.sh requirements-dev.txt
	tools/venv.sh $(VENV)
	@touch $@

$(VENV)/.built: $(VENV)/.made CMakeLists.txt setup.py pyproject.toml $(CSRC)
	VERICACHE_BUILD_DIR=$(BUILD_DIR) $(PY) -m pip install -qq --no-build-isolation --no-deps --editable . \
	  --config-settings editable_mode=compat
	@touch $@

build: $(VENV)/.built

demo: build
	$(VENV)/bin/vericache compare --prompt-file examples/tool_call_4k.txt \
	  --expected-file examples/tool_call_4k.answer.txt --compressor snapkv:ratio=0.25 --draft-len 30 --max-tokens 256

test: build
	$(PY) -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.made
	$(VENV)/bin/ruff check .
	@$(VENV)/bin/clang-format --dry-run --Werror $(FORMATTED)
	$(VENV)/bin/mypy

format: $(VENV)/.made
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/clang-format -i $(FORMATTED)

gpu-test: build
	$(PY) -m bench.gpu_checks --pytest "$(PYTEST_ARGS)"

gpu-bench: build
	$(PY) -m bench.gpu_kernels
	$(PY) -m bench.decode_step
	$(PY) -m bench.exactness --device cuda --out bench/results/exactness-gpu.json
	$(PY) -m bench.tables

tables: $(VENV)/.made
	$(PY) -m bench.tables
	$(PY) -m bench.plots

clean:
	rm -rf $(VENV) build dist *.egg-info vericache/_C*.so
	find . -name __pycache__ -prune -exec rm -rf {} +
