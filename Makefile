# Each target sets up .venv by itself; make PYTHON=python3.12 chooses the interpreter it is made with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint bench clean

help:
	@echo "make demo       align the bundled tiny model, a few minutes on a CPU; opens nothing, writes runs/demo"
	@echo "make test       all quick tests"
	@echo "make test-slow  the slow ones"
	@echo "make lint       ruff and mypy"
	@echo "make bench      time a training step"
	@echo "make clean      remove .venv and caches; runs/ stays"

demo: $(VENV)/.installed
	@$(BIN)/flowalign demo

# A file of tests goes to one process, so that what its tests share is made once; more threads than cores slow all of them. Files go
# in their own order: by their number of tests, which is the default, long ones come last and one process waits for the other.
test: $(VENV)/.installed
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/.installed
	@$(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: $(VENV)/.installed
	@$(BIN)/python benchmarks/step.py

clean:
	@rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build dist
	@find flowalign tests samples benchmarks -type d -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: flowalign needs Python 3.11 or newer and $(PYTHON) is %d.%d; run make PYTHON=python3.11" % sys.version_info[:2])'
	@echo "Setting up $(VENV) (one to three minutes) ..."
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[demo,dev,safety,scale,serve]'
	@touch $@
