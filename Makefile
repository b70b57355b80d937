# make quickstart   from nothing to one table on two cores, no GPU and no model hub
# make test         lint, types and tests
# make soak         what takes longer than `make test` may; run by hand and recorded in docs/results/
.DELETE_ON_ERROR:
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: quickstart install install-dev lint types test soak clean

quickstart: install
	$(BIN)/python -m deltakd run quickstart

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

# torch first: with it in place nothing else pulls another build of it in.
$(VENV)/.installed: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "deltakd needs Python 3.11 or newer; call make with PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV), some minutes the first time"
	$(BIN)/python -m pip install --disable-pip-version-check --quiet $$(grep '^torch' requirements.txt)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -r requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -r requirements-dev.txt
	touch $@

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install-dev
	$(BIN)/mypy

test: lint types
	$(BIN)/python -m pytest -m "not soak" -n 3 --max-worker-restart 0 --dist loadfile --no-loadscope-reorder tests/slurm tests/run tests

soak: install-dev
	$(BIN)/python -m pytest -m soak

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache *.egg-info
