# Two commands do everything on a fresh machine: `make serve` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := CMakeLists.txt $(wildcard src/sapwood/kernels/cpu/csrc/*)

.PHONY: serve test test-long lint format docs clean

serve: $(VENV)/.installed  ## install, fetch the default model, serve it on 127.0.0.1:30000
	$(BIN)/sapwood serve $(ARGS)

# A process per core, each with one compute thread; more than eight would want too much memory.
WORKERS ?= $(shell cores=$$(nproc); echo $$((cores < 8 ? cores : 8)))
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test: $(VENV)/.installed-dev  ## install and run the tests, but for repeats at full size
	$(PYTEST) $(ARGS)

test-long: $(VENV)/.installed-dev  ## all tests at full size, and longer searches: over an hour
	$(PYTEST) -m '' --hypothesis-profile=long --max-examples 40 --timeout 1800 $(ARGS)

lint: $(VENV)/.installed-dev  ## format check, lint, types, and who may import whom
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build

# torch comes first and alone: with its exact version in place, nothing else can move it.
$(VENV)/.torch:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml $(NATIVE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

# Not on top of .installed: that would compile the kernels twice.
$(VENV)/.installed-dev: $(VENV)/.torch pyproject.toml $(NATIVE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $(VENV)/.installed $@
