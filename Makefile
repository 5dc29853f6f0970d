# Every target builds the environment it needs in .venv and writes inside the checkout only (pip's
# download cache and temporary files excepted). Another interpreter: make test PYTHON=python3.12
PYTHON ?= python3

VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.built
CACHE := $(CURDIR)/$(VENV)/cache
INPUTS := pyproject.toml setup.py CMakeLists.txt constraints.txt $(shell find csrc -type f)

# Threads that spin while they wait starve other processes on a small machine.
export OMP_WAIT_POLICY ?= passive
# Libraries that would otherwise keep caches in the home or temporary directory.
export HF_HOME ?= $(CACHE)/huggingface
export MPLCONFIGDIR ?= $(CACHE)/matplotlib
export TORCHINDUCTOR_CACHE_DIR ?= $(CACHE)/inductor
export TRITON_CACHE_DIR ?= $(CACHE)/triton
export REALIGN_CACHE ?= $(CACHE)/realign
export PYTEST_DEBUG_TEMPROOT ?= $(CACHE)/pytest

.PHONY: help build demo test bench bench-full bench-gpu report lint clean

help:
	@echo 'make demo    the whole pipeline on the embedded digits; writes demo/'
	@echo 'make test    the tests'
	@echo 'make bench   the benchmarks, beside TRL, Liger and CCE, which it installs'
	@echo 'make bench-full, make bench-gpu    all of them; on a CUDA machine, with the report'
	@echo 'make report  docs/benchmarks.md, its pictures and the README tables from the last runs'
	@echo 'make lint    ruff check and ruff format --check'
	@echo 'make build   the environment alone: .venv with the package and its C++ extension'
	@echo 'make clean   remove .venv and what builds left (demo/ stays)'

build: $(STAMP)

$(STAMP): $(INPUTS)
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -c constraints.txt -e '.[cpu,demo,dev]'
	mkdir -p $(PYTEST_DEBUG_TEMPROOT)
	touch $@

demo: $(STAMP)
	$(RUN) -m realign.demo --output demo

# As many test processes as cores, so one thread in each.
test: export OMP_NUM_THREADS ?= 1
test: $(STAMP)
	$(RUN) -m pytest -q -n auto --dist worksteal tests

bench: $(STAMP)
	$(RUN) -m pip install -q -c constraints.txt -e '.[bench,peers]'
	$(RUN) -m pytest benchmarks/ --benchmark-only

bench-full: $(STAMP)
	$(RUN) -m pip install -q -c constraints.txt -e '.[bench,peers]'
	$(RUN) -m pytest benchmarks/ --benchmark-only -m full

bench-gpu: $(STAMP)
	$(RUN) -c 'import torch; assert torch.cuda.is_available(), "torch sees no GPU"'
	$(RUN) -m pip install -q -c constraints.txt -e '.[bench,peers]'
	-$(RUN) -m pytest benchmarks/ --benchmark-only -m full
	$(RUN) -m benchmarks.report

report: $(STAMP)
	$(RUN) -m benchmarks.roofline
	$(RUN) -m benchmarks.report

lint: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

clean:
	rm -rf $(VENV) build dist *.egg-info realign_kernels/_C*.so .pytest_cache .ruff_cache .benchmarks
	find . -path ./.git -prune -o -name __pycache__ -type d -exec rm -rf {} +
