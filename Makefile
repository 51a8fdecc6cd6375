# The same words for people and for CI. `make` alone lists them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CONSTRAINTS := src/medtrain/constraints.txt
# Tests share the cores among themselves.
TEST_PROCESSES ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help setup demo test integration experiments check bench freeze clean

help: ## list these commands
	@sed -n 's/^\([a-z]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | awk -F'\t' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(STAMP) ## install everything into .venv (once; again when what to install has changed)

$(STAMP): pyproject.toml setup.py $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -e '.[dev]' -c $(CONSTRAINTS)
	@touch $@

demo: setup ## train, judge and register on synthetic films in minutes; DATA=folder for real ones
	$(BIN)/medtrain demo $(if $(DATA),--data "$(DATA)")

test: setup ## what every change must pass: no root, no Docker, no GPU
	$(PYTEST) -n $(TEST_PROCESSES) --dist loadfile -m "not slow and not docker and not cluster and not gpu"

# $(call tier,folders,arguments): run the tests in the folders; a tier without any says so.
define tier
@if [ -z "$$(find $(1) -name 'test_*.py' 2>/dev/null)" ]; then \
	echo "$@: nothing was run, there are no tests in $(1) yet"; \
else \
	$(PYTEST) $(wildcard $(1)) $(2) || { code=$$?; \
		[ $$code -eq 5 ] && echo "$@: nothing was run, no test in $(1) was selected" || exit $$code; }; \
fi
endef

integration: setup ## containers, an emulated cluster, faults; what the machine lacks is skipped by name
	$(call tier,tests/integration tests/faults,-m "not slow")

experiments: setup ## the long runs whose results the repository records
	$(call tier,tests/experiments,-m "slow or not slow" --timeout 0)

bench: setup ## ratios side by side; never pass or fail
	$(call tier,tests/benchmarks,-m "slow or not slow" --timeout 0 -s)

check: setup ## format, lint, types, layers, spelling; the size report only asks
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/yamllint --strict .
	@$(BIN)/python .ci/sizes.py

freeze: setup ## write the installed versions to constraints.txt
	@sed -n '/^#/p' $(CONSTRAINTS) > $(VENV)/constraints.txt
	@$(BIN)/pip freeze --all --exclude-editable --exclude pip --exclude medtrain \
		| sed 's/+cpu$$//' | grep -Ev '^(nvidia-|cuda-|triton)' >> $(VENV)/constraints.txt
	@mv $(VENV)/constraints.txt $(CONSTRAINTS)

clean: ## remove .venv, caches and builds; local runs stay
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
