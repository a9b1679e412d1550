# Everything is run from here; a fresh machine needs Python 3.11+ and nothing else.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
DOCS   := $(VENV)/.ready-docs
ARGS   ?=
DATA   ?=
TWO    := -n 2 --dist loadfile --no-loadscope-reorder

help:             ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14

demo: $(READY)    ## emulate a mixed cluster here, plan for it, train, compare, write report.html
	$(BIN)/meshwright demo $(ARGS)

check: $(READY)   ## a minute: tests that start no process, with three tenths of their random cases
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow and not heavy" \
	  --hypothesis-profile=quick $(TWO) $(ARGS)

test: $(READY)    ## minutes: all tests but the slow ones, two at a time
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" $(TWO) $(ARGS)

test-slow: $(READY) ## the tests that take minutes, two at a time: eight processes, exhaustive searches
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow $(TWO) $(ARGS)

test-all: $(READY) ## both in one run, as CI does it
	OMP_NUM_THREADS=1 $(BIN)/pytest $(TWO) $(ARGS)

soak: $(READY)    ## the whole of the long tests, of which test-slow tries a tenth: hours
	WHOLE=1 OMP_NUM_THREADS=1 $(BIN)/pytest -m slow --timeout 0 $(TWO) $(ARGS)

lint: $(READY)    ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(DOCS)     ## build the documentation into site/
	$(BIN)/python docs/generate.py
	$(BIN)/zensical build --clean
	@! grep -rlE 'fonts\.(googleapis|gstatic)' site

picture: $(READY) ## draw the README's picture anew, from the plan that the search finds
	$(BIN)/python docs/draw_plan.py

bench: $(READY)   ## list the benchmarks; each one says what it compares and what it needs
	@for file in benchmarks/*.py; do \
	  printf '%s\n    ' "$(BIN)/python $$file"; sed -n '1s/"""//gp' "$$file"; done

accuracy: $(READY) ## the cost model against published runs: make accuracy DATA=folder
	@BIN="$(BIN)" benchmarks/accuracy.sh "$(DATA)"

testbed: $(READY)  ## predicted against measured on emulated clusters: make testbed ARGS=--quick
	$(BIN)/python benchmarks/testbed_accuracy.py $(ARGS)

gpu:              ## figures from a CUDA GPU in 8 minutes, with the PyTorch that is there
	@$(PYTHON) benchmarks/gpu_environment.py $(BIN)/python $(PYTHON) -- $(ARGS)

lock: $(READY)    ## write constraints.txt anew (names and versions only)
	$(BIN)/pip install uv
	$(BIN)/uv pip compile pyproject.toml --group dev --group docs --universal \
	  --python-version 3.11 --no-header --no-annotate --upgrade -o constraints.txt

clean:            ## remove the environment and everything that was built
	rm -rf $(VENV) .gpu-packages site .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --upgrade 'pip>=25.1'
	$(BIN)/pip install --constraint constraints.txt --editable . --group dev
	@touch $@

$(DOCS): $(READY)
	$(BIN)/pip install --constraint constraints.txt --group docs
	@touch $@

.DEFAULT_GOAL := help
.PHONY: help demo check test test-slow test-all soak lint docs picture bench accuracy testbed gpu lock clean
