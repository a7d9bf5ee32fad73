# Two commands do everything on a fresh machine with Python, a C++ compiler and make: `make demo` and `make test`.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
OUT ?= out/demo
JOBS ?= 2
# What the README's table shows.
NETWORKS := DiT-XL/2 PixArt-512 EDM
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
READY := $(VENV)/.ready
# Idle OpenMP threads that spin take the core from the other worker.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test bench tables gpu tune spills wheel lint build doctor clean

demo: $(READY)
	$(VENV)/bin/fastdiff demo --out $(OUT)

test: $(READY)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist worksteal

bench: $(READY)
	$(PY) -m pytest benchmarks

tables: $(READY)
	$(VENV)/bin/fastdiff bench report benchmarks/results/rows.csv --into README.md $(NETWORKS:%=--network %)
	$(VENV)/bin/fastdiff bench report benchmarks/results/rows.csv --into benchmarks/results/README.md

# In pieces that fit ten minutes: run it again until nothing is left.
gpu: $(READY)
	$(PY) -m benchmarks.gpu_session --out out/gpu

# Writes the tables that kernels launch and are chosen by on this GPU; in pieces as well.
tune: $(READY)
	$(PY) -m benchmarks.tune
	$(PY) -m benchmarks.tune --choices

# Hours on two cores, some at a time: it goes on where it was stopped.
spills: $(READY)
	$(PY) -m tests.check_spills

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

wheel: $(READY)
	$(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist .

build: $(READY)
	$(PY) setup.py build_ext --inplace

doctor: $(READY)
	$(VENV)/bin/fastdiff doctor

$(READY): pyproject.toml setup.py Makefile $(shell find csrc -type f)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet "$(TORCH)" "setuptools>=77" ninja "pybind11>=2.13"
	$(PIP) install --quiet --no-build-isolation --editable ".[dev]"
	$(VENV)/bin/fastdiff doctor
	touch $@

clean:
	rm -rf build dist out $(VENV) fastdiff_kernels/*.so *.egg-info
