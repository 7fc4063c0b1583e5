# Two commands do everything on a fresh machine: `make serve` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INPUTS := scripts/install.py pyproject.toml CMakeLists.txt $(wildcard src/sapwood/kernels/cpu/csrc/*)
# Packages are installed without bytecode, so Python must be free to write that of what it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: serve paint test test-long test-clients nightly kernels wheel wheel-check lint format docs pictures web clean

serve: $(VENV)/.installed  ## install, fetch the default model, serve it on 127.0.0.1:30000
	$(BIN)/sapwood serve $(ARGS)

paint: $(VENV)/.installed-dev  ## make a tiny pipeline of random weights and draw with it
	$(BIN)/python -m tests.painting_models build/random-flux
	$(BIN)/sapwood paint "An oak in fog" --model build/random-flux --output build/random.png --width 128 --height 128 --seed 7 $(ARGS)

# A process per core, each with one compute thread; more than eight would want too much memory.
WORKERS ?= $(shell cores=$$(nproc); echo $$((cores < 8 ? cores : 8)))
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test: $(VENV)/.installed-dev  ## install and run the tests, but for repeats at full size
	$(PYTEST) $(ARGS)

test-long: $(VENV)/.installed-dev  ## all tests at full size, and longer searches: over an hour
	$(PYTEST) -m '' --hypothesis-profile=long --max-examples 40 --timeout 1800 $(ARGS)

test-clients: $(VENV)/.installed-dev  ## run others' clients against live servers; CLIENTS="openai smg" for some
	$(BIN)/python -m tests.clients $(CLIENTS)

kernels:  ## compile the kernels that this machine runs best: after a move, a new compiler
	$(PYTHON) scripts/install.py $(VENV)

nightly: $(VENV)/.installed-dev  ## run what tests/suites.toml has for a night, measure, plot all nights so far
	$(BIN)/python -m scripts.nightly run $(ARGS); status=$$?; $(BIN)/python -m scripts.nightly page && exit $$status

wheel: $(VENV)/.installed-dev  ## build sdist, wheels for x86-64 and ARM, and their index in dist/
	$(BIN)/python -m scripts.wheels.build $(WHEEL_ARGS)

wheel-check: wheel  ## use the wheels alone: fresh environment, no compiler, emulated processors
	$(BIN)/python -m scripts.wheels.check dist

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

web:  ## bundle the chat page's libraries anew, after a change of web/package.json; needs npm
	cd web && npm ci && npm run build

clean:
	rm -rf $(VENV) build

# install.py makes the target once nothing is missing; without a compiler it is asked again next time.
$(VENV)/.installed: $(INPUTS)
	@$(PYTHON) scripts/install.py $(VENV)

$(VENV)/.installed-dev: $(INPUTS)
	@$(PYTHON) scripts/install.py $(VENV) --dev
