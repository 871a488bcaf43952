# Set up, demo, tests and checks; each target stands alone on a fresh clone.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
MEGATREE_SHARED ?= ../shared
# Where the shared test data is present, a test that skips for missing data is a failure.
REQUIRE_DATA := $(if $(wildcard $(MEGATREE_SHARED)),--require-data)

.PHONY: demo test test-all check wheel clean
.DEFAULT_GOAL := demo

demo: $(STAMP)
	$(BIN)/megatree demo

test: $(STAMP)
	$(BIN)/python -m pytest $(REQUIRE_DATA)

test-all: $(STAMP)
	$(BIN)/python -m pytest -m "not gpu" $(REQUIRE_DATA)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check

wheel: $(STAMP)
	$(BIN)/python -m build --wheel --no-isolation

$(VENV): $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: '$(PYTHON)' is not Python 3.11 or newer." \
	    "Name one that is: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
	  echo "make: '$(PYTHON)' has no ensurepip, so it cannot make a virtual environment." \
	    "Install it (Debian, Ubuntu: apt install python3-venv)," \
	    "or name another Python: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
