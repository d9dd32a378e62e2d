# Everything on a fresh machine with Python and make: each target first makes the environment that it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OLDEST := .venv-oldest
BARE := .venv-bare
PLUGINS := .venv-plugins
INSTALL = -m pip install --quiet
FAULTS := $(patsubst %,tests/worker/test_%_faults.py,quantisation weight number mode)
#: Tests of the oldest libraries: loads in one process, and the ones that only read options and markers.
OLDEST_TESTS := tests/host/test_options.py tests/host/test_markers.py tests/worker/test_clean_loads.py \
	$(FAULTS) tests/unit

.PHONY: fuzz venv demo test test-oldest test-bare test-plugins test-servers cover lint docs tables wheel bench bench-latency clean

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) --upgrade --constraint constraints.txt pip setuptools wheel
	$(BIN)/python $(INSTALL) --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: venv
	bash examples/demo/demo.sh $(BIN)/python

test: venv
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Coverage with a floor, of the tests that run the code in their own process: all units, and loads of every strategy,
# format, adapter kind and server. Options, markers, ranks and predictions, whose tests start pytest or further
# processes, are not covered here.
COVERED := tests/unit $(FAULTS) $(patsubst %,tests/worker/test_%.py,adapters c_allocator clean_loads environment \
	formats generation host_memory library_warnings page_cache probes quantisation_states scratch served tensor_parallel tensors)

cover: venv
	$(BIN)/python -m pytest -n 2 --dist worksteal --cov --cov-report=term:skip-covered $(COVERED)

# The oldest supported libraries, in an environment of their own.
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest -n 2 --dist worksteal $(OLDEST_TESTS)

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python $(INSTALL) --constraint constraints-oldest.txt --editable '.[hf,bnb,peft,benchmark]' pytest-xdist
	touch $@

# An installation without any extra: pytest works as if nothing had been added, and the plugin says what it lacks.
test-bare: $(BARE)/.installed
	$(BARE)/bin/python tests/bare_installation.py

$(BARE)/.installed: pyproject.toml
	$(PYTHON) -m venv $(BARE)
	$(BARE)/bin/python $(INSTALL) .
	touch $@

# A gate beside more than thirty usual plugins of pytest, all loaded at once.
test-plugins: $(PLUGINS)/.installed
	LLMLOAD_PLUGINS=1 $(PLUGINS)/bin/python -m pytest -n 0 -p no:sugar tests/plugins

$(PLUGINS)/.installed: pyproject.toml constraints.txt tests/plugins/requirements.txt
	$(PYTHON) -m venv $(PLUGINS)
	$(PLUGINS)/bin/python $(INSTALL) --constraint constraints.txt --requirement tests/plugins/requirements.txt --editable '.[bnb]'
	touch $@

# Real model servers, each in an environment of its own with every version pinned. Some gigabytes, kept between runs;
# llama-cpp-python is compiled.
SERVERS ?= .venv-servers
SERVER_STAMPS := $(patsubst tests/servers/requirements/%.txt,$(SERVERS)/%/.installed,$(wildcard tests/servers/requirements/*.txt))

$(SERVERS)/%/.installed: tests/servers/requirements/%.txt
	$(PYTHON) -m venv $(@D)
	CMAKE_ARGS="-DLLAVA_BUILD=OFF -DGGML_NATIVE=OFF" $(@D)/bin/python -m pip install --quiet --no-deps --requirement $<
	touch $@

test-servers: venv $(SERVER_STAMPS)
	LLMLOAD_SERVERS=$(abspath $(SERVERS)) $(BIN)/python -m pytest -n 0 tests/servers

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The site, in build/site; a warning is an error.
docs: venv
	$(BIN)/sphinx-build --quiet --fresh-env --fail-on-warning --keep-going docs build/site

# The tables of docs/ that are made from the code.
tables: venv
	$(BIN)/python docs/tables.py

wheel: venv
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*

bench: venv
	$(BIN)/python benchmarks/overhead.py

bench-latency: venv
	$(BIN)/python benchmarks/latency_power.py benchmarks/samples/* --docs docs/latency-study.md

clean:
	rm -rf $(VENV) $(OLDEST) $(BARE) $(PLUGINS) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

# A minute of mutated input for every parser; `benchmarks/fuzz.py --count 100000` for more.
fuzz: venv
	$(BIN)/python benchmarks/fuzz.py --seconds 60
