# Each of `make demo`, `make test` and `make docs` does all of its own set-up: a virtual environment in .venv with pinned versions.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# The CPU build of torch. On Linux it has an index of its own (PyPI's build brings gigabytes of CUDA); on macOS PyPI's
# is the right one. Where the index cannot be reached, pip warns and takes what PyPI or a local mirror offers.
ifeq ($(shell uname -s),Linux)
TORCH_INDEX ?= --extra-index-url https://download.pytorch.org/whl/cpu
endif

.PHONY: demo test clang check docs venv clean

demo: venv
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh examples/demo.sh

test: clang check
	@echo "== tests"
	@$(BIN)/python -m pytest -q -n auto --dist loadfile

clang: venv
	@$(BIN)/python -m tests.metal.emulator

check: venv
	@echo "== lint, types, layers"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check -q .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache | tail -n 3

docs: venv
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -q
	@echo "== build/site/index.html"

venv: $(VENV)/installed

$(VENV)/installed: pyproject.toml setup.py constraints.txt flashpack/kernels/blocks.h $(foreach e,c cpp h inc,$(wildcard flashpack/kernels/cpu/native/*.$(e)))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; say which: make PYTHON=python3.12 ..."; exit 1; }
	@echo "== installing into $(VENV) (a few minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -q --disable-pip-version-check --no-deps --retries 1 --timeout 15 -c constraints.txt $(TORCH_INDEX) torch
	@$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
