# Every target sets up what it needs, and no more: it adds an extra of pyproject.toml to the virtual
# environment in .venv, anew only when that file or constraints.txt changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST := pytest -n auto --dist worksteal

.DEFAULT_GOAL := help

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY)-%: pyproject.toml constraints.txt
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --upgrade pip
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	@touch $@

.PHONY: demo
demo: $(READY)-examples ## Train on handwritten digits: a table, a picture, an ensemble
	$(BIN)/python examples/quickstart.py

.PHONY: test
test: $(READY)-test ## Run all tests and doctests; ARGS="-k orthogonal" picks some
	$(BIN)/python -m $(PYTEST) $(ARGS)

.PHONY: test-all
test-all: $(READY)-dev ## Run all tests in their long versions, as is done every night
	$(BIN)/python -m $(PYTEST) --hypothesis-profile=all $(ARGS)

.PHONY: coverage
coverage: $(READY)-coverage ## Run all tests, and say which lines and branches they miss
	$(BIN)/coverage erase
	$(BIN)/coverage run -m $(PYTEST) $(ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

.PHONY: mutation
mutation: $(READY)-mutation ## Change lines and see that a test fails; ARGS="--count 10 FILE"
	$(BIN)/python -m tests.mutation $(ARGS)

.PHONY: lint
lint: $(READY)-lint ## Check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: format
format: $(READY)-lint ## Fix style and format where that is safe
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: types
types: $(READY)-types ## Check types, strictly, and what users' checkers are told
	$(BIN)/pyright
	$(BIN)/python -m pytest -q tests/test_typing.py

.PHONY: docs
docs: $(READY)-docs ## Build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.PHONY: conformance
conformance: $(READY)-test ## Run PyTorch's own tests against compat; FILE=its test_parametrization.py
	$(BIN)/python tests/conformance.py $(FILE) $(ARGS)

ECOSYSTEM := .venv-ecosystem
# exactly these versions, whatever the packages ask of each other; some need transformers 4
$(ECOSYSTEM)/.ready: pyproject.toml tests/ecosystem/constraints.txt tests/ecosystem/transformers4.txt
	@test -x $(ECOSYSTEM)/bin/pip || $(PYTHON) -m venv $(ECOSYSTEM)
	$(ECOSYSTEM)/bin/pip install --quiet --no-deps -r tests/ecosystem/constraints.txt -e .
	$(ECOSYSTEM)/bin/pip install --quiet --no-deps --upgrade \
		-r tests/ecosystem/transformers4.txt --target $(ECOSYSTEM)/transformers4
	@touch $@

.PHONY: ecosystem
ecosystem: $(ECOSYSTEM)/.ready ## Run real packages on compat and on torch, into docs/ecosystem.md
	$(ECOSYSTEM)/bin/python -m tests.ecosystem --out docs/ecosystem.md $(ARGS)

.PHONY: bench
bench: $(READY)-bench ## Measure funcparam beside other libraries, into docs/bench
	$(BIN)/python benchmarks/run.py --out docs/bench

.PHONY: bench-quick
bench-quick: $(READY)-bench ## Measure fewer cases in fewer rounds, in under three minutes
	$(BIN)/python benchmarks/run.py --quick --out build/bench

# in under eight minutes on one GPU; without one the tests try some of it on the CPU
.PHONY: cuda
cuda: $(READY)-test $(READY)-bench ## Test and measure on a GPU, into docs/bench/cuda.md; FILE=PyTorch's tests
	$(BIN)/python -m pytest tests/cuda -q -rs -n 4 $(ARGS)
	$(if $(FILE),$(BIN)/python tests/conformance.py $(FILE))
	$(BIN)/python benchmarks/on_cuda.py --out docs/bench --seconds 240

.PHONY: rooms
rooms: $(READY)-test ## Draw who imports whom into docs/rooms.svg
	$(BIN)/python -m tests.rooms docs/rooms.svg

.PHONY: certificate
certificate: $(READY)-test ## Write the matrix of transforms and laws into docs/certificate.md
	$(BIN)/python -m tests.certificate docs/certificate.md

.PHONY: clean
clean: ## Remove everything that was made, the virtual environment too
	rm -rf $(VENV) $(ECOSYSTEM) build dist site .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
