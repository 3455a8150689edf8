# make reproduce | test | report | check | lab | wheelhouse     (make help)
SCALE ?= smoke
JOBS ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
# Folder of wheels to install from without a network; `make wheelhouse` fills it.
WHEELHOUSE ?=
# TORCH=system: use the torch that $(PYTHON) already has, such as a GPU image's.
TORCH ?=

SUPPORTED := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python; do \
  $$p -c '$(SUPPORTED)' 2>/dev/null && { echo $$p; exit; }; done; echo no-python)
BIN := .venv/bin
# The shell reads SCALE from the environment, so special characters do no harm. Snakemake's cache moves here if HOME isn't writable.
export SCALE
SNAKEMAKE = test -w "$$HOME" || export XDG_CACHE_HOME='$(CURDIR)/.cache'; $(BIN)/snakemake --cores $(JOBS) --config "scale=$$SCALE"
INDEX = "$(CURDIR)/reports/$$SCALE/index.html"
PORT ?= 8888
PINS := $(if $(TORCH),.venv/pins.txt,constraints.txt)
FROM := $(if $(WHEELHOUSE),--no-index --find-links $(WHEELHOUSE))

.PHONY: help reproduce report test check lab wheelhouse check-python

help:
	@echo 'make reproduce           set up .venv, train what is missing, make the pages; prints the index'
	@echo 'make test                set up .venv, run the tests'
	@echo 'make report              draw all pages again from finished runs; trains nothing'
	@echo 'make check               in about a minute: style, types, imports, tests that train nothing'
	@echo 'make lab                 JupyterLab on this machine, at PORT=8888'
	@echo 'make wheelhouse          collect the wheels for a machine without a network'
	@echo 'SCALE=smoke|gpu|paper    size of the study (now: $(SCALE))'

reproduce: .venv/.installed
	@$(SNAKEMAKE); code=$$?; test ! -e $(INDEX) || printf 'The reports begin at\n%s\n' $(INDEX); exit $$code

report: .venv/.installed
	@$(SNAKEMAKE) train_missing=false --forceall; code=$$?; test ! -e $(INDEX) || echo $(INDEX); exit $$code

test: .venv/.installed
	@$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

# A quick check during development; `make test` runs everything.
check: .venv/.installed
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	@$(BIN)/python -m pytest -n $(JOBS) --dist worksteal --quick

lab: .venv/.installed
	@$(BIN)/jupyter lab --ip 127.0.0.1 --port $(PORT) --ContentsManager.pre_save_hook=ecmoe.report.lab.as_written \
	  $(if $(filter 0,$(shell id -u)),--allow-root) notebooks

# Install the tested versions of all packages; again when pyproject.toml or constraints.txt changes.
.venv/.installed: pyproject.toml constraints.txt | check-python
	@echo 'Setting up .venv (some minutes; PyPI'\''s torch for Linux brings CUDA, the README names the CPU build)'
	@$(PYTHON) -m venv $(if $(TORCH),--system-site-packages) .venv
	@$(if $(TORCH),grep -Ev '^(torch|triton|setuptools)==' constraints.txt > $(PINS))
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(FROM) -c $(PINS) -e '.[dev]'
	@touch $@

# Run this with the Python version and on the kind of system of the machine that will use the wheels.
wheelhouse: check-python
	@mkdir -p .wheelhouse
	@$(if $(TORCH),grep -Ev '^(torch|triton)==' constraints.txt > .wheelhouse/pins.txt,cp constraints.txt .wheelhouse/pins.txt)
	@$(PYTHON) -m pip wheel --quiet --wheel-dir .wheelhouse $(if $(TORCH),--no-deps) -r .wheelhouse/pins.txt
	@echo 'Copy .wheelhouse to the other machine, then: make reproduce WHEELHOUSE=.wheelhouse $(if $(TORCH),TORCH=system)'

check-python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo 'Python 3.11 or 3.12 with venv is needed, and none was found. Install one (Debian, Ubuntu: apt install python3 python3-venv), or name it: make PYTHON=/path/to/python3.12'; exit 1; }
	@$(PYTHON) -c '$(SUPPORTED)' 2>/dev/null || { \
	  echo '$(PYTHON) is not Python 3.11 or 3.12 with venv (Debian, Ubuntu: apt install python3-venv). Name another: make PYTHON=/path/to/python3.12'; exit 1; }
