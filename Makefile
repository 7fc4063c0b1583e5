# Two commands do everything on a fresh machine: `make serve` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := CMakeLists.txt $(wildcard src/sapwood/kernels/cpu/csrc/*)

.PHONY: serve test lint format pictures clean

serve: $(VENV)/.installed  ## install, fetch the default model, serve it on 127.0.0.1:30000
	$(BIN)/sapwood serve $(ARGS)

test: $(VENV)/.installed-dev  ## install and run all tests
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.installed-dev  ## format check, lint, types, and who may import whom
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

pictures: $(VENV)/.installed-dev  ## take the pictures in docs/images anew, of a server under load; 6 minutes
	$(BIN)/python -m tests.docs.pictures

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
