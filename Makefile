# Everything a developer or a CI machine does: `make help` lists it. Nothing outside this folder is touched,
# but for pip's own cache and, in `make demo`, raylora's cache of model and data (RAYLORA_CACHE).

PYTHON ?= python3
# Where torch comes from. On a machine without a GPU, the CPU build is a tenth of the download:
#   make install TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu"
TORCH_ARGS ?=
UV ?= uv
PYTEST_ARGS ?=
# make gpu-bundle BUNDLE_ARGS="--python 3.11 --cuda 128 130 --without scipy scikit-learn"
BUNDLE_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN := runs/quickstart

.DEFAULT_GOAL := help
.PHONY: help install demo test test-unit test-ray test-all lint docs bench gpu-bundle lock clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP)  ## make .venv with everything pinned; does nothing if it is up to date

# torch goes first and alone: then nothing after it asks the index for another build of it, and DeepSpeed,
# a source distribution whose set-up imports torch, finds it (hence --no-build-isolation).
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt $(TORCH_ARGS) "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install -q -c constraints.txt setuptools wheel
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev,demo]'
	@touch $@

demo: install  ## train, evaluate and report the quickstart's ensemble, in a few minutes
	$(BIN)/raylora run examples/quickstart.yaml
	@echo "open $(CURDIR)/$(RUN)/report.html"

test: lint test-unit test-ray  ## lint, then all tests but the slow ones (PYTEST_ARGS="-x --durations=50")

# A file stays in one process, since its tests share what they trained. Ray has the machine for itself afterwards.
test-unit: install  ## the tests without Ray, on several cores
	$(BIN)/python -m pytest -m "not ray and not slow" -n auto --maxprocesses 4 --dist loadfile $(PYTEST_ARGS)

test-ray: install  ## the tests on Ray's one local cluster
	$(BIN)/python -m pytest -m "ray and not slow" tests/ray $(PYTEST_ARGS)

test-all: lint  ## lint, then every test in one pytest process
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: install  ## ruff, mypy and the layers, fastest first
	$(BIN)/ruff check
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

docs: install  ## write docs/reference from the spec models and the registry
	$(BIN)/python -m raylora.spec.reference docs/reference

bench: install  ## measure raylora against its peers on this machine
	$(BIN)/python -m benchmarks

gpu-bundle: install  ## dist/gpu-bundle: what a machine with a GPU and torch needs to run the GPU tests offline
	$(BIN)/python tools/gpu_bundle.py $(BUNDLE_ARGS)

lock:  ## resolve constraints.txt anew, keeping the pins that still fit (needs uv)
	UV=$(UV) tools/lock.sh

clean:  ## remove what this Makefile and the tools made, runs excepted
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find raylora tests -name __pycache__ -type d -prune -exec rm -rf {} +
