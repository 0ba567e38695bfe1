PYTHON ?= python3
PYTHONS ?= python3.11 python3.12 python3.13 python3.14
BIN := .venv/bin
CPU_WHEELS := https://download.pytorch.org/whl/cpu
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo yes)
IMPORTS := import torch; from transformers import LlamaForCausalLM; from vllm import LLM
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*.cpp csrc/*.h)
ARGS ?=

.PHONY: quickstart test test-fast test-native lint matrix wheels gpu-wheels clean

# Trains the tiny model, then prints and plots the comparison. ARGS="--seed 3 --output-dir runs/x" overrides settings.
quickstart: .venv/.small
	$(BIN)/python bench/study.py quickstart $(ARGS)

# Everything, real vLLM included.
test: .venv/.full
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# What one runs while one works: under 2 minutes on 2 cores, without vLLM, a GPU, or runs of the whole trainer.
FAST := tests/batches tests/csrc tests/kernels tests/tasks \
  $(filter-out tests/test_train.py tests/test_finite.py,$(wildcard tests/test_*.py))
test-fast: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not vllm and not gpu" $(FAST) $(ARGS)

# The C++ algorithms without Python, under sanitizers; needs g++ only. (They must be loaded first, and vLLM preloads.)
NATIVE_BUILD ?= build
NATIVE_FLAGS := -std=c++20 -g -Wall -Wextra -Wno-sign-compare -D_GLIBCXX_ASSERTIONS -ffp-contract=off \
  -fsanitize=address,undefined -fno-sanitize-recover=all
test-native:
	@mkdir -p $(NATIVE_BUILD)
	$(CXX) $(NATIVE_FLAGS) tests/csrc/native_test.cpp -o $(NATIVE_BUILD)/native_test
	LD_PRELOAD= $(NATIVE_BUILD)/native_test

lint: .venv/.full
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p gapg -p gapg_kernels -p gapg_rollout -p gapg_packing
	$(BIN)/mypy kernels/hub.py examples/*.py
	cd bench && ../$(BIN)/mypy --config-file ../pyproject.toml --explicit-package-bases .
	$(BIN)/lint-imports

# The fast tests with the oldest and with the newest versions that pyproject.toml allows, each in .matrix/, 6 GB apiece.
matrix:
	$(PYTHON) tests/packaging/matrix.py $(FAST)

# Into dist/: a wheel for each of PYTHONS that is installed (pybind11 has no stable ABI), manylinux where it can be.
wheels: .venv/.dev
	rm -rf build && mkdir -p build/wheels dist
	for python in $(PYTHONS); do \
	  $$python -c "" 2>/dev/null || { echo "$$python is not installed: no wheel for it"; continue; }; \
	  $(BIN)/pip --python "$$(command -v $$python)" wheel --quiet --no-deps --wheel-dir build/wheels . || exit 1; \
	done
	if [ -x $(BIN)/auditwheel ]; then PATH="$(BIN):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist build/wheels/*.whl; \
	else echo "auditwheel is for Linux: these wheels run on machines like this one"; cp build/wheels/*.whl dist; fi

# Wheels that a GPU machine without a network lacks, for Python 3.12 on Linux x86-64, into .wheels/ (bench/GPU.md).
gpu-wheels: .venv/.small
	$(BIN)/python bench/gpu_wheels.py fetch

clean:
	rm -rf .venv .matrix build *.egg-info csrc/gapg_packing/*.so

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "gapg needs Python 3.11 or newer: make PYTHON=python3.12 quickstart")'
	$(PYTHON) -m venv .venv

# Three environments, each more than the one before: the trainer, the tools of `test-fast`, and all of it with vLLM.
.venv/.small: $(SOURCES) | $(BIN)/python
	[ -e .venv/.dev -o -e .venv/.full ] || $(BIN)/pip install --quiet -c constraints.txt -e '.[train]'
	@touch $@

.venv/.dev: $(SOURCES) | $(BIN)/python
	[ -e .venv/.full ] || $(BIN)/pip install --quiet -c constraints.txt -e '.[train,lora,liger,dev]'
	@touch $@

# On a CPU: the exact versions, without resolving, because resolving adds torchvision builds that break the CPU torch.
# torch 2.13.0 without its CUDA libraries may not import from a plain index; then, and only then, PyTorch's CPU index.
.venv/.full: $(SOURCES) | $(BIN)/python
ifeq ($(HAS_GPU),yes)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[train,vllm,lora,liger,bench,dev]'
else
	$(BIN)/pip install --quiet --no-deps -r constraints.txt -e .
	@$(BIN)/python -c '$(IMPORTS)' >/dev/null 2>&1 || { \
	  echo "the CPU build of torch is not in your package index: adding $(CPU_WHEELS)"; \
	  $(BIN)/pip install --quiet --no-deps --force-reinstall 'torch==2.13.0+cpu' --extra-index-url $(CPU_WHEELS); }
	$(BIN)/python -c '$(IMPORTS)' >/dev/null
endif
	@touch $@
