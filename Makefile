# Every target builds its environment in .venv. It writes inside the checkout only, except for pip's
# download cache and temporary files. To use another interpreter: make test PYTHON=python3.12
PYTHON ?= python3

VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.built
CACHE := $(CURDIR)/$(VENV)/cache
INPUTS := pyproject.toml setup.py CMakeLists.txt constraints.txt $(shell find csrc -type f)

# Threads that spin while they wait starve other processes on a small machine.
export OMP_WAIT_POLICY ?= passive
# Caches that the libraries keep in the home or temporary directory by default.
export HF_HOME ?= $(CACHE)/huggingface
export MPLCONFIGDIR ?= $(CACHE)/matplotlib
export TORCHINDUCTOR_CACHE_DIR ?= $(CACHE)/inductor
export TRITON_CACHE_DIR ?= $(CACHE)/triton
export REALIGN_CACHE ?= $(CACHE)/realign
export PYTEST_DEBUG_TEMPROOT ?= $(CACHE)/pytest

.PHONY: help build demo test fuzz bench bench-full bench-gpu gpu-wheels gpu-rehearsal report docs lint clean

help:
	@echo 'make demo    run the whole pipeline on the embedded digits; writes demo/'
	@echo 'make test    run the tests'
	@echo 'make fuzz    run the C++ table and packing on random faults under sanitizers, for SECONDS=600'
	@echo 'make bench   run the benchmarks, with TRL, Liger and CCE, which it installs'
	@echo 'make bench-full     run all benchmarks'
	@echo 'make bench-gpu      run all benchmarks on a CUDA machine and write the report'
	@echo 'make gpu-wheels     download packages for a CUDA machine without network (benchmarks/gpu/run.sh)'
	@echo 'make gpu-rehearsal  run the GPU check and tests/kernels on a CPU with the versions of that machine'
	@echo 'make report  write the tables of README.md, docs/benchmarks.md and docs/gpu.md from the last runs'
	@echo 'make docs    build the documentation site into build/site; every warning is an error'
	@echo 'make lint    run ruff check, ruff format --check, codespell with our word list, and pyright'
	@echo 'make build   build the environment only: .venv with the package and its C++ extension'
	@echo 'make clean   remove .venv and all build outputs, except demo/'

build: $(STAMP)

$(STAMP): $(INPUTS)
	$(PYTHON) -m venv $(VENV)
	if command -v nvcc; then $(RUN) -m pip install -q --no-deps -c constraints.txt nvidia-cutlass; fi
	$(RUN) -m pip install -c constraints.txt -e '.[cpu,demo,dev,docs]'
	mkdir -p $(PYTEST_DEBUG_TEMPROOT)
	touch $@

demo: $(STAMP)
	$(RUN) -m realign.demo --output demo

# As many test processes as cores, so one thread in each.
test: export OMP_NUM_THREADS ?= 1
test: $(STAMP)
	$(RUN) -m pytest -q -n auto --dist worksteal tests

# Needs neither Python nor pybind11. A failure prints its seed, which repeats it.
SECONDS := 600
FUZZ := build/fuzz
fuzz:
	cmake -S . -B $(FUZZ) -DREALIGN_PYTHON=OFF -DREALIGN_TESTS=ON -DREALIGN_SANITIZE=address,undefined
	cmake --build $(FUZZ) --target fuzz_tests
	mkdir -p $(FUZZ)/work
	$(FUZZ)/fuzz_tests $(SECONDS) $$(date +%s) $(FUZZ)/work

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

# For benchmarks/gpu/run.sh on a CUDA machine without network. The platform `any` selects pure Python
# packages, so one set serves every machine.
WHEELS := .gpu-wheels
MOST_WHEELS := 40
gpu-wheels:
	rm -rf $(WHEELS)
	$(PYTHON) -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --abi none \
	  --platform any -c constraints.txt -r benchmarks/gpu/wheels.txt -d $(WHEELS)
	@size=$$(du -sk $(WHEELS) | cut -f1); ls $(WHEELS); \
	  echo "$$((size / 1024)) MiB, at most $(MOST_WHEELS)"; test $$size -le $$((1024 * $(MOST_WHEELS)))

# Run it by hand before a GPU is used; it downloads torch's CUDA build. It uses python3.12 if that
# runs (a shim of pyenv may not). The interpreter of triton 3.6 fails with numpy 2.4 and later. torch
# 2.11 does not accept a newer setuptools.
REHEARSAL := .venv-gpu
gpu-rehearsal: CACHE := $(CURDIR)/$(REHEARSAL)/cache
gpu-rehearsal:
	$(or $(shell python3.12 -c 'import sys; print(sys.executable)' 2>/dev/null),$(PYTHON)) -m venv $(REHEARSAL)
	if command -v nvcc; then $(REHEARSAL)/bin/python -m pip install -q --no-deps -c constraints.txt nvidia-cutlass; fi
	grep -Ev '^(torch|triton|numpy|setuptools)==' constraints.txt > $(REHEARSAL)/constraints.txt
	$(REHEARSAL)/bin/python -m pip install -q -c $(REHEARSAL)/constraints.txt torch==2.11.0 triton==3.6.0 \
	  'numpy<2.4' pytest pytest-benchmark hypothesis -e '.[peers]'
	mkdir -p $(PYTEST_DEBUG_TEMPROOT)
	rm -rf $(REHEARSAL)/check
	$(REHEARSAL)/bin/python -m benchmarks.gpu --out $(REHEARSAL)/check --rehearse
	OMP_NUM_THREADS=1 $(REHEARSAL)/bin/python -m pytest -q tests/kernels

report: $(STAMP)
	$(RUN) -m benchmarks.report

# The variable turns off a notice about MkDocs 2, which --strict does not count as a warning.
docs: export NO_MKDOCS_2_WARNING := 1
docs: $(STAMP)
	$(RUN) -m mkdocs build --strict

lint: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m codespell_lib .
	$(RUN) -m pyright

clean:
	rm -rf $(VENV) $(WHEELS) $(REHEARSAL) build dist *.egg-info realign_kernels/_C*.so .pytest_cache .ruff_cache .benchmarks
	find . -path ./.git -prune -o -name __pycache__ -type d -exec rm -rf {} +
