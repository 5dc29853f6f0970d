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

.PHONY: help build demo test bench bench-full bench-gpu gpu-wheels gpu-rehearsal report docs lint clean

help:
	@echo 'make demo    the whole pipeline on the embedded digits; writes demo/'
	@echo 'make test    the tests'
	@echo 'make bench   the benchmarks, beside TRL, Liger and CCE, which it installs'
	@echo 'make bench-full, make bench-gpu    all of them; on a CUDA machine, with the report'
	@echo 'make gpu-wheels     packages to carry to a CUDA machine without network (benchmarks/gpu/run.sh)'
	@echo 'make gpu-rehearsal  the GPU check and tests/kernels on a CPU under that machine'"'"'s versions'
	@echo 'make report  docs/benchmarks.md, docs/gpu.md and the README tables from the last runs'
	@echo 'make docs    the documentation as a site in build/site; every warning is an error'
	@echo 'make lint    ruff check, ruff format --check, codespell with our word list, and pyright'
	@echo 'make build   the environment only: .venv with the package and its C++ extension'
	@echo 'make clean   remove .venv and what builds left (demo/ stays)'

build: $(STAMP)

$(STAMP): $(INPUTS)
	$(PYTHON) -m venv $(VENV)
	if command -v nvcc; then $(RUN) -m pip install -q --no-deps -c constraints.txt nvidia-cutlass; fi
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

# For benchmarks/gpu/run.sh on a CUDA machine without network. `any`: pure Python only, so one set
# serves every platform.
WHEELS := .gpu-wheels
MOST_WHEELS := 40
gpu-wheels:
	rm -rf $(WHEELS)
	$(PYTHON) -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --abi none \
	  --platform any -c constraints.txt -r benchmarks/gpu/wheels.txt -d $(WHEELS)
	@size=$$(du -sk $(WHEELS) | cut -f1); ls $(WHEELS); \
	  echo "$$((size / 1024)) MiB, at most $(MOST_WHEELS)"; test $$size -le $$((1024 * $(MOST_WHEELS)))

# By hand, before a GPU is used: downloads torch's CUDA build. The interpreter of triton 3.6 fails
# with numpy 2.4 and later; torch 2.11 refuses a newer setuptools.
REHEARSAL := .venv-gpu
gpu-rehearsal: CACHE := $(CURDIR)/$(REHEARSAL)/cache
gpu-rehearsal:
	$(or $(shell command -v python3.12),$(PYTHON)) -m venv $(REHEARSAL)
	grep -Ev '^(torch|triton|numpy|setuptools)==' constraints.txt > $(REHEARSAL)/constraints.txt
	$(REHEARSAL)/bin/python -m pip install -q -c $(REHEARSAL)/constraints.txt torch==2.11.0 triton==3.6.0 \
	  'numpy<2.4' pytest pytest-benchmark hypothesis -e '.[peers]'
	mkdir -p $(PYTEST_DEBUG_TEMPROOT)
	rm -rf $(REHEARSAL)/check
	$(REHEARSAL)/bin/python -m benchmarks.gpu --out $(REHEARSAL)/check --rehearse
	OMP_NUM_THREADS=1 $(REHEARSAL)/bin/python -m pytest -q tests/kernels

report: $(STAMP)
	$(RUN) -m benchmarks.report

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(STAMP)
	$(RUN) -m pip install -q -c constraints.txt -e '.[docs]'
	$(RUN) -m mkdocs build --strict

lint: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m codespell_lib .
	$(RUN) -m pyright

clean:
	rm -rf $(VENV) $(WHEELS) $(REHEARSAL) build dist *.egg-info realign_kernels/_C*.so .pytest_cache .ruff_cache .benchmarks
	find . -path ./.git -prune -o -name __pycache__ -type d -exec rm -rf {} +
