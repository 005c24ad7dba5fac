# make demo: from a fresh clone to a table on real images.   make test: every test that this machine can run.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: demo test test-all check format bench install clean

install: $(VENV)/.installed

# Made again when the requirements change. The directory is the marker's, so a broken install is tried again.
$(VENV)/.installed: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "sightline needs Python 3.10 or later; try make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: install
	$(BIN)/python launcher.py fill quickstart
	@$(BIN)/python launcher.py table quickstart
	@echo; echo "pictures:"; $(BIN)/python -m analysis.figures --manifest runs/studies/quickstart.json
	@echo; echo "MLflow store: runs/mlflow.db    its pages: $(BIN)/python launcher.py ui"

test: install
	$(BIN)/python -m pytest -m 'not slow' $(ARGS)

test-all: install
	$(BIN)/python -m pytest $(ARGS)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
