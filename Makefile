# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --quiet --constraint constraints.txt
PROMPTS := "def read_json(path):" "class Stack:" "import os"

.PHONY: help quickstart finetune-demo test lint format types check clean

help: ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## (.*)/  \1|\2/' | column -t -s '|'

$(BIN)/python:
	@echo "Setting up $(VENV) from constraints.txt (a few minutes, once)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "entrenar needs Python 3.11 or newer; set PYTHON=")'
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.base: $(BIN)/python pyproject.toml constraints.txt
	@$(PIP) torch==2.13.0
	@$(PIP) --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.base
	@echo "Installing what the tests need"
	@$(PIP) --editable '.[test]'
	@touch $@

quickstart: $(VENV)/.base ## train a small LLaMA on this machine's own Python sources, in about five minutes
	$(BIN)/entrenar prepare stdlib --out corpora/stdlib --vocab-size 4096 --if-missing
	$(BIN)/entrenar train --config configs/quickstart.toml --overwrite
	$(BIN)/entrenar generate runs/quickstart --prompt $(PROMPTS) --max-new-tokens 80 --temperature 0.5
	@printf '\nNext:\n  %s\n  %s\n  %s\n' \
	  '$(BIN)/entrenar generate runs/quickstart --prompt "for name in"   continue a prompt of yours' \
	  '$(BIN)/entrenar train --config configs/quickstart.toml --resume --max-time-s 600   train it longer' \
	  'docs/index.md   the book: how it works, and why you can trust it'

finetune-demo: $(VENV)/.base ## teach the quickstart's model to write docstrings, in about two minutes
	@test -d runs/quickstart/checkpoints || $(MAKE) quickstart
	$(BIN)/python examples/finetune_docstrings/make_rows.py --out corpora/docstrings
	$(BIN)/entrenar finetune --config examples/finetune_docstrings/config.toml --overwrite

test: $(VENV)/.test ## run the tests
	$(BIN)/python -m pytest

lint: $(VENV)/.test ## ruff, with every ignored rule's reason in pyproject.toml
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test ## mypy --strict
	$(BIN)/mypy

check: lint types test ## all three

format: $(VENV)/.test ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## delete environment, runs and corpora
	rm -rf $(VENV) runs corpora .pytest_cache .mypy_cache .ruff_cache
