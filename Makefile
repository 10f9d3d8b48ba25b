# Every target sets up .venv by itself. On a fresh machine with Python 3.11+ and make: `make demo`, `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-slow test-lowest check format bench clean

demo: $(READY)
	$(BIN)/ssl-seg study demo --out runs/demo --jobs 2

# Bytecode is kept whatever the shell says of it: else its processes compile all tests at each start, and every
# command that a test starts compiles the package.
test: export PYTHONDONTWRITEBYTECODE =
test: $(READY)
	$(BIN)/python -m pytest -n 3 --dist worksteal

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

# The quick tests with the lowest releases that setup.cfg allows, in an environment of their own: another 6 GB.
test-lowest:
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet uv
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest/bin/python --resolution lowest-direct --editable '.[dev]'
	.venv-lowest/bin/python -m pytest -n 3 --dist worksteal

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest tests/test_imports.py

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)
	$(BIN)/python -m pytest tests/benchmarks -m slow

$(READY): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ssl_seg needs Python 3.11 or newer; run make PYTHON=python3.12")'
	@echo 'Setting up $(VENV): about two minutes and 6 GB, most of it torch.'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@# setuptools warns that an editable package's folder may be imported from here: that is what it is for.
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --editable '.[dev]' --constraint constraints.txt
	touch $(READY)

clean:
	rm -rf build dist .pytest_cache .ruff_cache
