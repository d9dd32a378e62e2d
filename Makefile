# Everything on a fresh machine with Python and make: each target first makes .venv with all extras.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: venv demo test lint docs bench bench-latency clean

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt pip setuptools wheel
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: venv
	bash examples/demo/demo.sh $(BIN)/python

test: venv
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: venv
	$(BIN)/python docs/tables.py

bench: venv
	$(BIN)/python benchmarks/overhead.py

bench-latency: venv
	$(BIN)/python benchmarks/latency_power.py benchmarks/samples/* --docs docs/latency-study.md

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
