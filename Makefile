# Every target sets up what it needs: a virtual environment in .venv, made anew only when
# pyproject.toml or constraints.txt changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): pyproject.toml constraints.txt
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

.PHONY: demo
demo: $(READY) ## Train on handwritten digits: a table, a picture, an ensemble
	$(BIN)/python examples/quickstart.py

.PHONY: test
test: $(READY) ## Run all tests and doctests; ARGS="-k orthogonal" picks some
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

.PHONY: coverage
coverage: $(READY) ## Run all tests, and say which lines and branches they miss
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -n auto --dist worksteal $(ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

.PHONY: mutation
mutation: $(READY) ## Change lines of transforms/ and see that a test fails; ARGS="--count 10 FILE"
	$(BIN)/python -m tests.mutation $(ARGS)

.PHONY: lint
lint: $(READY) ## Check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: format
format: $(READY) ## Fix style and format where that is safe
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: types
types: $(READY) ## Check types, strictly
	$(BIN)/pyright

.PHONY: docs
docs: $(READY) ## Build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.PHONY: conformance
conformance: $(READY) ## Run PyTorch's own tests against compat; FILE=its test_parametrization.py
	$(BIN)/python tests/conformance.py $(FILE) $(ARGS)

.PHONY: bench
bench: $(READY) ## Measure funcparam beside other libraries, into docs/bench
	$(BIN)/python benchmarks/run.py --out docs/bench

.PHONY: bench-quick
bench-quick: $(READY) ## Measure fewer cases in fewer rounds, in under three minutes
	$(BIN)/python benchmarks/run.py --quick --out build/bench

.PHONY: certificate
certificate: $(READY) ## Write the matrix of transforms and laws into docs/certificate.md
	$(BIN)/python -m tests.certificate docs/certificate.md

.PHONY: clean
clean: ## Remove everything that was made, the virtual environment too
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
