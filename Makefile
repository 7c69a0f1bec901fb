# Every target makes its own .venv and needs nothing before it but Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM ?= true

.PHONY: quickstart test test-slow test-gpu browser lint types wheel docs

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

quickstart: $(READY)  ## extend the embedded model from 512 to 4,096 tokens and show that it worked
	$(BIN)/python -m longlora_cli.quickstart quickstart

test: $(READY)  ## under 10 minutes on 2 cores, offline
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "alone and not gpu" $$(grep -rl 'mark\.alone' tests)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not alone and not slow and not gpu and not real_model"

test-slow: $(READY)  ## the slower tier: random kills, the real model
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "slow or real_model"

test-gpu: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m gpu

browser:  ## the Chromium in which tests open the report of eval; Debian's, as root, unless there is one
	@for name in chromium chromium-browser google-chrome google-chrome-stable chrome; do \
	  command -v $$name && exit 0; \
	done; apt-get update && apt-get install --yes --no-install-recommends chromium

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

wheel: $(READY)
	$(BIN)/python -m build --wheel --outdir dist

docs:
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --quiet 'mkdocs>=1.6,<2' 'mkdocs-material>=9.5'
	.venv-docs/bin/mkdocs build --strict
