# Everything a user or developer runs. `make help` lists it; each target sets up what it needs.
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
# Where there is an NVIDIA GPU its run-time compiler comes along.
GPU := $(if $(wildcard /dev/nvidiactl /dev/dxg),gpu)
SOURCES := setup.py pyproject.toml $(wildcard engine/*.pyx engine/kernels/*.[ch] engine/kernels/*/*.h)

.DEFAULT_GOAL := help
.PHONY: help install demo test smoke test-gpu test-sanitize bench bench-once bench-gpu lint format docs build clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "Python 3.10 or newer is needed; this is $$($(PYTHON) --version). Try: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || \
	    { echo "Python.h is missing: install the Python headers (Debian, Ubuntu: apt-get install python3-dev)"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	    { rm -rf $(VENV); echo "could not make a virtual environment (Debian, Ubuntu: apt-get install python3-venv)"; exit 1; }
	@$(PY) -m pip install --quiet --upgrade pip

# One stamp for each set of extras: a change in any source builds the extension again.
$(VENV)/.installed: $(VENV)/bin/python $(SOURCES)
	$(PY) -m pip install --quiet --editable '.[$(GPU)]'
	@touch $@

$(VENV)/.installed-test: $(VENV)/bin/python $(SOURCES)
	$(PY) -m pip install --quiet --editable '.[test]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: $(VENV)/bin/python $(SOURCES)
	$(PY) -m pip install --quiet --editable '.[test,dev]'
	@touch $@ $(VENV)/.installed-test $(VENV)/.installed

install: $(VENV)/.installed ## make a virtual environment and install the engine in it

demo: $(VENV)/.installed ## continue a prompt with the bundled model, then time it
	$(PY) -m engine run --prompt "def read_config(path):" --max-tokens 80
	@echo
	$(PY) -m engine.bench

test: $(VENV)/.installed-test ## run all tests that need no GPU, in up to four processes
	$(PY) -m pytest -m "not gpu" --numprocesses=logical --maxprocesses=4 --dist=worksteal $(PYTEST_ARGS)

smoke: $(VENV)/.installed-test ## run the quickest tests
	$(PY) -m pytest -q -m "not gpu and not slow" tests/test_config.py tests/test_cli.py tests/test_engine.py

test-gpu: $(VENV)/.installed-test ## run the tests that need an NVIDIA GPU
	$(PY) -m pytest -m gpu $(PYTEST_ARGS)

test-sanitize: $(VENV)/.installed-dev ## run the kernel tests under AddressSanitizer and UBSan
	VENV=$(VENV) tests/run_sanitized.sh

bench: $(VENV)/.installed-test ## run the microbenchmarks
	$(PY) -m pytest bench --benchmark-only $(PYTEST_ARGS)

bench-once: $(VENV)/.installed-test ## run every microbenchmark once, untimed, but for those of plain C
	$(PY) -m pytest -q bench --benchmark-disable -k "not scalar" $(PYTEST_ARGS)

bench-gpu: $(VENV)/.installed-test ## measure kernels and whole models on an NVIDIA GPU
	$(PY) bench/gpu.py $(BENCH_ARGS)

lint: $(VENV)/.installed-dev ## run every static check
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(PY) -m mypy.stubtest engine._kernels --mypy-config-file pyproject.toml --allowlist tests/stubtest_allowlist.txt
	PATH="$(VENV)/bin:$$PATH" cython-lint --max-line-length 120 engine/_kernels.pyx
	$(VENV)/bin/clang-format --dry-run -Werror $$(git ls-files 'engine/kernels/*.[ch]')

format: $(VENV)/.installed-dev ## bring all sources into the house style
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $$(git ls-files 'engine/kernels/*.[ch]')

docs: $(VENV)/.installed-dev ## make the API reference in build/docs
	$(PY) docs/make_reference.py build/docs
	@echo "open build/docs/index.html"

build: $(VENV)/.installed-dev ## make the source package and a wheel, and smoke-test the wheel in an environment of its own
	rm -rf dist
	$(PY) -m build --no-isolation
	tests/check_wheel.sh $(PYTHON) dist/*.whl

clean: ## delete everything that was built
	rm -rf build dist *.egg-info .venv .pytest_cache .hypothesis .mypy_cache .ruff_cache engine/_kernels.c engine/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
