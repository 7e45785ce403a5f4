# Every target makes .venv and installs when that is missing or out of date.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: install demo test lint bench clean
.DEFAULT_GOAL := demo

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

install: $(INSTALLED)

demo: install  ## two detectors, with and without continual learning, on the synthetic stream
	$(BIN)/python train.py -m experiment=demo method=patchcore,padim strategy=native,finetune

test: install
	$(BIN)/python -m pytest -q

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install  ## the tables of measured speed that the README quotes
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv outputs/*/
