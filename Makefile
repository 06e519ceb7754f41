# Each target is self-sufficient: on a machine with make and Python 3.10 or later it makes .venv, installs the exact
# versions of constraints.txt and runs. A second run installs nothing unless pyproject.toml or constraints.txt changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

MODEL ?= bundled
SIZE ?= compact
ifneq ($(filter --short,$(ARGS)),)
SIZE := short
endif
# A folder for each size: a run goes on where one of the same settings was stopped.
OUT ?= results/demo$(if $(filter-out compact,$(SIZE)),-$(SIZE))
ARGS ?=

# OpenMP's idle threads sleep. Spinning, two threads take twice as long as one beside one busy process, and four times beside several
# (benchmarks/bench_waiting.py).
export OMP_WAIT_POLICY ?= PASSIVE

# Every test that starts a process, and each of the two workers, would compile all modules anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo test lint types pytest tutorials docs bench format clean

help:
	@echo "make demo      diagnose, learn, repair and evaluate the bundled model; report in OUT/report.html"
	@echo "               (OUT=dir, MODEL=name-or-directory; SIZE=short, compact (under 3 minutes on two cores) or full (15))"
	@echo "make test      format, lint, types, tests (the tutorials among them), documentation"
	@echo "make bench     the measurements in benchmarks/"
	@echo "make docs      the documentation, in docs/_build/html"
	@echo "make tutorials execute the tutorials and write their notebooks"
	@echo "make format    format the code"

install: $(READY)

# uv installs the same in half of the time, where it is there. Without --no-compile pip compiles every module of torch and the rest, most
# of which nothing ever imports: 247 s, without it 160.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or later is needed, $$($(PYTHON) --version) found; say make PYTHON=python3.x"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@if command -v uv >/dev/null && uv pip install --quiet --python $(BIN)/python -c constraints.txt -e ".[dev,docs]"; then :; else \
		$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e ".[dev,docs]"; fi
	@touch $@

demo: $(READY)
	$(BIN)/care-lens run --model $(MODEL) --out $(OUT) --size $(SIZE) $(ARGS)

# Types and documentation take a thread each, the tests two: side by side no core waits.
test: lint
	@$(MAKE) --no-print-directory --jobs=3 types docs pytest

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(READY)
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright care_lens benchmarks

pytest: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadscope --no-loadscope-reorder

# A tutorial is a pair: NAME.py (jupytext percent) is what is edited; this executes it and writes NAME.ipynb, which the
# documentation shows. The tests execute it too, and check that the pair agrees.
tutorials: $(READY)
	$(BIN)/jupytext --quiet --to ipynb tutorials/*.py
	PLOTLY_RENDERER=notebook_connected PYTHONWARNINGS=ignore $(BIN)/jupyter-execute --inplace tutorials/*.ipynb
	$(BIN)/python docs/tidy_notebooks.py tutorials/*.ipynb

docs: $(READY)
	$(BIN)/python -m sphinx -b html -W --keep-going -q docs docs/_build/html

bench: $(READY)
	@set -e; for script in benchmarks/bench_*.py; do echo "$$script"; $(BIN)/python "$$script" $(ARGS); done

format: $(READY)
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) docs/_build docs/_generated
