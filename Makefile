# Every target makes .venv and installs when that is missing or out of date.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
SLURM_TESTS ?=  # of pytest -k
EXPERIMENT ?= demo

.PHONY: install demo report pictures figures docs site test test-long test-slurm lint bench clean
.DEFAULT_GOAL := demo

$(INSTALLED): pyproject.toml
	@echo "installing into .venv: 6.4 GB, some minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --config-settings editable_mode=compat --editable '.[dev]'
	touch $@

install: $(INSTALLED)

demo: install  ## two detectors, with and without continual learning, on the synthetic stream
	$(BIN)/python train.py -m experiment=demo method=patchcore,padim strategy=native,finetune

report: install  ## a page, tables and figures of outputs/$(EXPERIMENT), in its folder report/
	$(BIN)/clbench report outputs/$(EXPERIMENT)

# Debian: apt-get install chromium chromium-driver
pictures: install  ## the README's picture of a report and those of docs/gallery.md, of runs on the synthetic stream
	$(BIN)/python train.py -m experiment=pictures maps=few method=patchcore,padim strategy=native,finetune,joint,single \
	  'task_order.tasks=[bottle_top,circuit,gear,leather,washer]'
	$(BIN)/clbench report outputs/pictures
	$(BIN)/python scripts/draw_report.py outputs/pictures/report/index.html docs/report.jpg
	$(BIN)/python scripts/draw_gallery.py docs/gallery outputs/pictures/*strategy=finetune* outputs/pictures/*strategy=native*

figures: install  ## the figures of docs/science.md, of the tables in docs/measured.md
	$(BIN)/python scripts/draw_science.py

docs: install  ## the documentation as pages, site/index.html; a link that leads nowhere fails
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --config-settings editable_mode=compat --editable '.[docs]'
	$(MAKE) site

site:  # needs of the installed the extra `docs` alone
	$(BIN)/python -m mkdocs build --strict --quiet
	$(BIN)/python scripts/check_site.py site

test: install
	$(BIN)/python -m pytest -q

test-long: install  ## further cases of the same, and everything with everything on the pretend device: an hour
	$(BIN)/python -m pytest -q -m long
	CLBENCH_TEST_PRETEND=all $(BIN)/python -m pytest -q tests/test_pretend_device.py

# Debian's packages and root; a cluster of this machine alone, for these tests alone.
test-slurm: install  ## sweeps through a real SLURM, killed in every way that a cluster knows
	$(PYTHON) -c 'import shutil, sys; sys.exit(shutil.which("sbatch") is None)' || \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq slurm-wlm slurmdbd munge mariadb-server >/dev/null; }
	cluster=$$(mktemp -d) && chmod 755 $$cluster && trap "scripts/test_cluster.sh stop $$cluster; rm -rf $$cluster" EXIT && \
	  scripts/test_cluster.sh start $$cluster && \
	  CLBENCH_TEST_SLURM=1 SLURM_CONF=$$cluster/slurm.conf $(BIN)/python -m pytest -q -n 0 -rP tests/test_slurm.py -k "$(SLURM_TESTS)"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff check --preview --select PLW1514 .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install  ## the tables of measured speed that docs/measured.md quotes
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv site outputs/*/
