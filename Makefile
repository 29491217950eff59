# Everything below runs in a virtual environment of its own, made on first use.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin

.PHONY: train test chaos image docs lint clean

train: $(VENV)/.installed
	$(BIN)/hdnn-dist train

# Of the pure modules what is run is counted (pyproject.toml, 95 % at least); of all tests it would
# take too long.
PURE = analysis architecture data distortion engine exchange family graphs hamiltonian job mnist \
	model node optimization placement reader sparsity tables topology
PURE_TESTS = $(PURE:%=tests/test_%.py)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --cov --cov-report= $(PURE_TESTS)
	$(BIN)/coverage report
	$(BIN)/python -m pytest $(PURE_TESTS:%=--ignore=%)

chaos: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m chaos

image: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m image

docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .coverage
