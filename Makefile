# The words of this project; each does its own set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS ?= 2

.PHONY: help setup system demo check format test test-slow acceptance faults soak bench bench-drift bench-detectors fuzz docs clean

help:  ## list the words
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "%-16s %s\n", $$1, $$2}'

setup: $(STAMP)  ## virtual environment with everything for development

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet -c constraints.txt "torch" "numpy"
	$(BIN)/python -m pip install --quiet -c constraints.txt --group dev --group demo \
	  --editable ".[all]" --editable plugins/oodmon-example-detector \
	  --editable plugins/oodmon-starlette
	touch $@

system:  ## servers that the tests start themselves (Debian packages; needs root)
	apt-get update -qq
	printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d && chmod +x /usr/sbin/policy-rc.d
	DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends \
	  postgresql prometheus kcat chromium openssl
	rm -f /usr/sbin/policy-rc.d

demo: $(STAMP)  ## see it work: train, attach, drift, alarm, report (about two minutes)
	$(BIN)/python examples/demo.py $(DEMO)

check: $(STAMP)  ## format, lint, types, architecture
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/architecture

format: $(STAMP)  ## put the code in order
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: $(STAMP)  ## all tests that are not marked slow
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow" tests plugins

test-slow: $(STAMP)  ## the acceptance experiments
	$(BIN)/python -m pytest -q -m slow tests

acceptance: $(STAMP)  ## the same with their figures, in docs/acceptance.md (some 40 minutes)
	$(BIN)/python -m pip install --quiet --no-deps "pytorch-ood==0.4.0"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m slow -k acceptance \
	  tests/flows --figures=docs/measured/acceptance.json $(ACCEPTANCE)
	$(BIN)/python -m docs.generate

faults: $(STAMP)  ## every fault of production by real processes, some 220 runs (FAULTS="--runs 53")
	$(BIN)/python -m tests.faults $(FAULTS)

soak: $(STAMP)  ## the highest rate for ten minutes; nothing may grow (SOAK="--seconds 60")
	$(BIN)/python -m tests.faults.soak $(SOAK)

bench: $(STAMP)  ## overhead, pipeline and detector throughput, as ratios within one run
	$(BIN)/python -m pip install --quiet --no-deps "pytorch-ood==0.4.0"
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.pipeline
	$(BIN)/python -m benchmarks.detectors

bench-detectors: $(STAMP)  ## every detector beside pytorch-ood's: throughput and agreement
	$(BIN)/python -m pip install --quiet --no-deps "pytorch-ood==0.4.0"
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.detectors $(BENCH)

bench-drift: $(STAMP)  ## our drift tests beside the public ones, in environments of their own
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	.venv-bench/bin/python -m pip install --quiet --group bench
	-.venv-bench/bin/python -m pip install --quiet --no-deps --ignore-requires-python nonconform==2.0.0
	-$(PYTHON) -m venv .venv-alibi && timeout 600 .venv-alibi/bin/python -m pip install --quiet \
	  -c constraints.txt torch "alibi-detect==0.13.0"
	$(BIN)/python -m benchmarks.drift $(BENCH)

fuzz: $(STAMP)  ## hostile bytes for all that reads bytes (FUZZ="--inputs 10000000")
	$(BIN)/python -m tests.fuzz $(FUZZ)

docs: $(STAMP)  ## the pages that are made from the code
	$(BIN)/python -m docs.generate

clean:
	rm -rf $(VENV) build dist demo-output .mypy_cache .ruff_cache .pytest_cache
