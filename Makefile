# Two commands do all the set-up: `make demo` and `make test`. Needs Python >= 3.10, git and a C++ compiler; CMake,
# ninja and Go are taken from the package index when PATH has none new enough.
PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python -m

.PHONY: demo test test-all test-dates test-c lint types clean

demo: $(VENV)/.installed
	$(RUN) kvpatch demo

# Unit, C, Go and patch-application tests: no GPU, no git host.
test: $(VENV)/.installed
	$(RUN) pytest

# Also builds and smoke-tests the patched llama.cpp; with KVPATCH_OLLAMA_SOURCE set, Ollama too.
test-all: $(VENV)/.installed
	$(RUN) pytest -m 'not gpu and not dates'

# Builds and smokes llama.cpp of every date that patches/pins.toml claims: hours on 2 cores.
test-dates: $(VENV)/.installed
	$(RUN) pytest -m dates

# The C library alone, under AddressSanitizer and UBSan.
test-c: $(VENV)/.installed
	$(RUN) pytest tests/vmm

lint: $(VENV)/.installed
	$(RUN) ruff check kvpatch tests
	$(RUN) ruff format --check kvpatch tests

types: $(VENV)/.installed
	$(RUN) mypy

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "kvpatch needs Python 3.10 or newer; set PYTHON=python3.x" >&2; exit 3; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build out dist .pytest_cache .mypy_cache .ruff_cache
