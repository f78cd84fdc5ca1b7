# make run    the main job: the whole path on the embedded model, one page in runs/embedded
# make test   the tests; LANE=3.9 for the last TransformerLens with HookedTransformer
# make lint   ruff and mypy
#
# Each sets up what it needs first. Only Python 3.11 (or newer) and make are assumed.

LANE ?= 4.3
comma := ,
OUT ?= runs/embedded
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || echo python3)
VENV := $(if $(filter 4.3,$(LANE)),.venv,.venv-$(LANE))
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
EXTRAS := $(VENV)/.installed-dev
# SAELens is for TransformerLens 3 only.
DEV := $(if $(filter 3.%,$(LANE)),dev$(comma)saes,dev)

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Threads that wait asleep: on a busy machine spinning ones make small products several times slower.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: run test lint train clean

run: $(INSTALLED)
	$(BIN)/tomsparse run --out $(OUT)

test: $(EXTRAS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --nbmake --nbmake-timeout=600 demos tests

lint: $(EXTRAS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

train: $(INSTALLED)
	$(BIN)/python training/train.py --out training/runs/main

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt "transformer-lens==$(LANE).0" -e .
	touch $@

$(EXTRAS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet -c constraints.txt "transformer-lens==$(LANE).0" -e ".[$(DEV)]"
	touch $@

clean:
	rm -rf .venv .venv-* runs
