# Two commands: `make demo` and `make test`. Both set up .venv first; a second run starts at once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEV := $(VENV)/.ready-dev
SLOW := $(VENV)/.ready-slow
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test test-slow lint clean

# torch first and at its exact pin: a looser requirement may bring a build for hardware that is not there
$(VENV)/.torch: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "liftlm needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $$(grep '^torch==' constraints.txt)
	touch $@

$(READY): $(VENV)/.torch pyproject.toml
	$(PIP) install --quiet --constraint constraints.txt --editable .
	touch $@

$(DEV): $(READY)
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(SLOW): $(DEV)
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev-slow]'
	touch $@

demo: $(READY)
	$(BIN)/lift demo

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# a test uses one thread, so that a test per core runs at once
test: lint
	$(BIN)/python -m pytest --numprocesses=logical --maxprocesses=4 --dist=worksteal

test-slow: lint $(SLOW)
	$(BIN)/python -m pytest -m slow --numprocesses=logical --maxprocesses=4 --dist=worksteal

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .import_linter_cache build src/*.egg-info
