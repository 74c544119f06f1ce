# Two commands do everything on an empty machine: `make demo` and `make test`.
# Each makes its own virtual environment in .venv and installs what it needs.
#
#   make demo ARGS="--json out.json --scenario share"
#   make test ARGS="-k stores"
#   make PYTHON=python3.12 demo        another interpreter (3.10 to 3.13)
#   make PIP_FLAGS="--quiet" test      anything pip understands

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=
PIP_FLAGS ?= --quiet

export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help demo test check format bench bench-routing clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v < (3, 14) else \
	"kvcommons needs Python 3.10 to 3.13, but %s is %d.%d; try: make PYTHON=python3.12 ..." % ((sys.executable,) + v))'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing kvcommons and what it needs into $(VENV) ..."
	$(BIN)/python -m pip install $(PIP_FLAGS) --upgrade "pip>=24"
	$(BIN)/python -m pip install $(PIP_FLAGS) --constraint constraints.txt torch
	$(BIN)/python -m pip install $(PIP_FLAGS) --constraint constraints.txt --editable '.[embedded,dev]'
	@touch $@

demo: $(STAMP)  ## run the demonstration: share, offload, ngram, load
	$(BIN)/python -m cluster.demo $(ARGS)

test: $(STAMP)  ## run the tests
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile $(ARGS)

check: $(STAMP)  ## lint, format, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## measure the engine against plain transformers
	$(BIN)/python -m benchmarks.engine $(ARGS)

bench-routing: $(STAMP)  ## compare routing rules in simulation: ARGS="--trace FILE" or --quick
	$(BIN)/python -m benchmarks.routing $(ARGS)

clean:  ## remove the virtual environment and all caches of tools
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis report *.egg-info
