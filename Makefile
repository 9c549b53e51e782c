# Every target sets itself up: a virtual environment in .venv, installed once for each set of extras
# and again when pyproject.toml or constraints.txt change.

VENV ?= .venv
PYTHON ?=
ARGS ?=
WORKERS ?= 2
BIN := $(VENV)/bin
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

export PYTHON
unexport PYTHONDONTWRITEBYTECODE  # the tests start hundreds of processes; each would compile the package

.DEFAULT_GOAL := help
.NOTPARALLEL:

.PHONY: help
help:  ## show this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

.PHONY: demo
demo: $(VENV)/.installed-demo  ## train a tiny Qwen3.5 MoE on this CPU, resume it, draw its loss curve
	$(BIN)/python examples/demo.py $(ARGS)

.PHONY: demo-vision
demo-vision: $(VENV)/.installed-demo-vision  ## train a tiny model on this CPU until it reads digits, ask transformers, too
	$(BIN)/python examples/demo_vision.py $(ARGS)

.PHONY: test
test: $(VENV)/.installed-test  ## run the tests; ARGS="-k rope" passes flags to pytest, WORKERS=0 runs one at a time
	$(PYTEST) -m "not exhaustive" $(ARGS)

.PHONY: test-all
test-all: $(VENV)/.installed-test  ## run the exhaustive tests, too: every mode, long fuzzing, a real SLURM where installed
	$(PYTEST) --hypothesis-profile=exhaustive $(ARGS)

.PHONY: check
check: $(VENV)/.installed-dev  ## formatting, lint, types and import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

.PHONY: format
format: $(VENV)/.installed-dev  ## format the code and fix what ruff can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.PHONY: install
install: $(VENV)/.installed-base  ## create the virtual environment with the package in it

.PHONY: clean
clean:  ## remove the virtual environment and every cache; keeps runs/
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed-base: pyproject.toml constraints.txt tools/venv.sh
	bash tools/venv.sh $(VENV)
	@touch $@

$(VENV)/.installed-%: pyproject.toml constraints.txt tools/venv.sh
	bash tools/venv.sh $(VENV) $*
	@touch $@
