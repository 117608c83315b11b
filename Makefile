# The commands of a working copy. `make up` and `make test` need Python 3.11 or newer and libgomp.so.1
# (on Debian: python3 python3-venv libgomp1), and the browser tests are skipped without Chromium.

VENV := .venv
BIN := $(VENV)/bin
REQUIREMENTS := pyproject.toml constraints.txt
PORT ?=
CHECK ?=
# One benchmark by its name in benchmarks/, such as BENCH=train_throughput; all of them if empty.
BENCH ?=
PYTEST_ARGS ?=
# How many tests run at once: one for each of CI's cores.
WORKERS ?= 2

.PHONY: up test check format docs bench clean help

help:
	@echo 'make up [CHECK=1] [PORT=8080]  installs, and starts the web app; CHECK=1 walks the whole line headless'
	@echo 'make test [WORKERS=2]          runs every test'
	@echo 'make check                     formatting, lint, types, import contracts'
	@echo 'make format                    formats the code and mends what the linter can'
	@echo 'make docs                      builds the documentation into site/'
	@echo 'make bench [BENCH=NAME]        runs the benchmarks'

up: $(VENV)/.installed-all
	$(BIN)/modelworks up $(if $(CHECK),--check) $(if $(PORT),--port $(PORT))

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/.installed-dev
	@set -e; for script in $(if $(BENCH),benchmarks/$(BENCH).py,benchmarks/*.py); do \
		echo "== $$script"; $(BIN)/python "$$script"; \
	done

clean:
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

# `pip` is the last thing that venv writes, so an interrupted creation is started again.
$(BIN)/pip:
	@python=$$(.ci/find-python) && echo "creating $(VENV) with $$python" && "$$python" -m venv $(VENV)

$(VENV)/.installed-all: $(REQUIREMENTS) | $(BIN)/pip
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e '.[all]'
	@touch $@

$(VENV)/.installed-dev: $(REQUIREMENTS) | $(BIN)/pip
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(VENV)/.installed-all $@
