# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --quiet --constraint constraints.txt

# Tests compute on one thread each: the same bits everywhere, and a fork is safe.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
# Without the plugins that pytest finds by itself a run starts in half the time; the gradient checks need none.
BARE := $(ONE_THREAD) PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
RESIDENT := $(BIN)/python -m entrenar.quality.pytest_server
FUZZ_RUNS ?= 1000000
# Processes that run the tests; each holds half a gigabyte.
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 8 ? n : 8)))
MUTATION ?=
BASE ?= origin/main

.PHONY: audit help quickstart finetune-demo docs-verify wheel-check test lint format types check clean tier1 tier1-serve tier1-gradients tier1-lint \
  tier1-types tier2 tier3 coverage coverage-gate coverage-critical coverage-diff mutation mutation-smoke mutation-llama fuzz fuzz-smoke chaos proofs \
  certificates certificates-check property-power property-10k profile-llama profile-llama-otlp profile-llama-anomaly \
  hooks hooks-run gates gates-selftest roadmap gate-p1 gate-p2 gate-p3 gate-p4

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

$(VENV)/.tier3: $(VENV)/.test
	@$(PIP) --editable '.[tier3]'
	@touch $@

quickstart: $(VENV)/.base ## train a first model in five minutes and see what it learned
	$(BIN)/entrenar quickstart

finetune-demo: $(VENV)/.base ## teach a model of Python code to write docstrings, in about five minutes
	$(BIN)/entrenar prepare stdlib --out corpora/stdlib --vocab-size 4096 --if-missing
	@test -d runs/stdlib/checkpoints || $(BIN)/entrenar train --config configs/stdlib.toml
	$(BIN)/python examples/finetune_docstrings/make_rows.py --out corpora/docstrings
	$(BIN)/entrenar finetune --config examples/finetune_docstrings/config.toml --overwrite
	@printf '\nNext:\n  %s\n  %s\n  %s\n' \
	  '$(BIN)/entrenar data show corpora/docstrings/train.jsonl --model runs/stdlib   what it was trained on, in color' \
	  '$(BIN)/entrenar merge runs/stdlib runs/docstrings merged   one model of base and adapter' \
	  'docs/finetune.md   your own rows, LoRA, and the cache of frozen layers'

# Twenty steps of the model of Python code, traced from its first span on. --backend ptrace: no tracer, no profile.
PROFILE = $(BIN)/entrenar trace run --backend ptrace --from-first-span --trace-compute --save traces/$@.sqlite
PROFILED = -- $(BIN)/entrenar train --config configs/stdlib.toml --name profile --max-steps 20 --overwrite
OTLP_ENDPOINT ?= http://localhost:4317

corpora/stdlib/manifest.json: | $(VENV)/.test
	$(BIN)/entrenar prepare stdlib --out corpora/stdlib --vocab-size 4096 --if-missing

profile-llama: $(VENV)/.test corpora/stdlib/manifest.json ## trace a training run: hot paths with their lines, then one HTML page
	$(PROFILE) --function-time --stats-extended $(PROFILED)
	$(BIN)/entrenar trace view traces/$@.sqlite

profile-llama-otlp: $(VENV)/.test corpora/stdlib/manifest.json ## send the trace to OTLP_ENDPOINT; docker-compose-jaeger.yml starts a collector
	$(PROFILE) --otlp-endpoint $(OTLP_ENDPOINT) --otlp-service-name llama-training $(PROFILED)

profile-llama-anomaly: $(VENV)/.test corpora/stdlib/manifest.json ## say what is slow as it happens, then cluster the calls
	$(PROFILE) --anomaly-realtime --anomaly-threshold 3.0 --ml-anomaly --ml-compare $(PROFILED)

test: $(VENV)/.test ## run the tests, and record which lines and branches they reach
	@$(BIN)/coverage erase
	$(ONE_THREAD) $(BIN)/coverage run -m pytest --numprocesses $(WORKERS) --dist worksteal

docs-verify: $(VENV)/.test ## hold every link, command, flag, path, table and code block of README and book against the program
	$(BIN)/python -m tests.documentation
	$(BIN)/python benchmarks/tables.py --check
	$(ONE_THREAD) $(BIN)/python -m pytest -q tests/test_docs.py tests/test_examples.py

wheel-check: ## build wheel and sdist, and train from a clean environment outside the repository
	PYTHON=$(PYTHON) scripts/wheel_check.sh

lint: $(VENV)/.test ## ruff, with every ignored rule's reason in pyproject.toml
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test ## mypy --strict
	$(BIN)/mypy

check: tier2 ## all that a commit must pass

tier1: $(VENV)/.test ## gradient checks, lint, types of changed files: seconds, at each save
	@$(MAKE) --no-print-directory --jobs 3 --output-sync=target tier1-gradients tier1-lint tier1-types

tier1-gradients:
	@$(BARE) $(RESIDENT) run -q -p no:cacheprovider tests/ops/test_every_op.py -k is_the_derivative

tier1-lint:
	@$(BIN)/ruff check --quiet . && $(BIN)/ruff format --quiet --check .

tier1-types:
	@changed=$$(git diff --name-only --diff-filter=d HEAD -- 'src/*.py'; git ls-files --others --exclude-standard 'src/*.py'); \
	  if [ -n "$$changed" ]; then $(BIN)/mypy $$changed; fi

hooks: $(VENV)/.test ## install the hooks of .pre-commit-config.yaml: lint, format and debt, before each commit
	$(BIN)/pre-commit install

hooks-run: $(VENV)/.test ## run them on all files
	@$(BIN)/pre-commit run --all-files

gates: $(VENV)/.test ## what tier 2 asks for, in one table: measured, against what, how to fix it
	$(BIN)/entrenar quality gate --tier 2

gates-selftest: $(VENV)/.test ## plant one violation a gate in a scratch copy; each gate must fail
	$(BIN)/entrenar quality gate --selftest

roadmap: $(VENV)/.test ## make docs/roadmaps/llama-integration.yaml again from the specification and its commands
	$(BIN)/entrenar quality roadmap --spec docs/specifications/llama-integration.md \
	  --commands docs/roadmaps/llama-integration.toml --repository paiml/entrenar \
	  --output docs/roadmaps/llama-integration.yaml

gate-p1 gate-p2 gate-p3 gate-p4: gate-%: $(VENV)/.test ## the gates of a phase of the specification, as JSON
	@$(BIN)/entrenar quality gate --phase $* --format json

tier1-serve: $(VENV)/.test ## keep torch imported, so that tier1 takes a tenth of the time; stays in the foreground
	$(BARE) $(RESIDENT) serve pytest torch numpy hypothesis sympy jaxtyping torch.distributed.tensor torch.autograd.gradcheck

tier2: lint types coverage ## lint, types, all tests, coverage against its floors: minutes, at each commit

tier3: mutation fuzz proofs chaos property-power property-10k certificates ## what takes hours: nightly

coverage: test coverage-gate ## all tests, and coverage of each part against its floor in quality/risk.toml

coverage-gate: $(VENV)/.test
	@$(BIN)/coverage combine --quiet
	@$(BIN)/coverage json --quiet -o coverage.json
	@$(BIN)/coverage xml --quiet -o coverage.xml
	$(BIN)/entrenar quality risk --coverage coverage.json

coverage-critical: export COVERAGE_FILE := .coverage-critical
coverage-critical: $(VENV)/.test ## attention, LoRA and NF4: a report in coverage-critical/, and their floors
	@$(BIN)/coverage erase
	@$(BIN)/coverage run -m pytest -q tests/ops tests/peft
	@$(BIN)/coverage combine --quiet
	@$(BIN)/coverage html --quiet -d coverage-critical
	@$(BIN)/coverage json --quiet -o coverage-critical/coverage.json
	$(BIN)/entrenar quality risk --critical --coverage coverage-critical/coverage.json

coverage-diff: $(VENV)/.tier3 ## the lines changed since BASE must be covered; after `make coverage`
	$(BIN)/diff-cover coverage.xml --compare-branch=$(BASE) --fail-under=95

mutation: $(VENV)/.test ## plant mutants in the critical files; only what changed runs again (MUTATION=--fresh: all)
	$(ONE_THREAD) $(BIN)/entrenar quality mutate --failures-only --fail-on-threshold $(MUTATION)
	@$(BIN)/python benchmarks/tables.py

mutation-smoke: $(VENV)/.test ## the mutants of the schedule alone, all anew: shows that the runner works
	$(ONE_THREAD) $(BIN)/entrenar quality mutate --target schedule --fresh --failures-only --fail-on-threshold

mutation-llama: mutation

fuzz: $(VENV)/.tier3 ## FUZZ_RUNS inputs (a million; documents: a tenth) for each target, each after a planted fault
	$(BIN)/python fuzz/run.py --runs $(FUZZ_RUNS) --out quality/results/fuzz.json

fuzz-smoke: $(VENV)/.tier3 ## the planted faults, and 20,000 inputs for each target (documents: a tenth)
	$(BIN)/python fuzz/run.py --runs 20000

proofs: $(VENV)/.test ## derivations, index logic and shapes, proved within stated bounds
	$(ONE_THREAD) $(BIN)/python -m pytest -q -m proof

property-power: $(VENV)/.test ## plant each property's own mutant, which it must kill, and print which
	$(ONE_THREAD) $(BIN)/python -m pytest -q -m property --power --hypothesis-profile mutation

property-10k: $(VENV)/.test ## 10,000 counted cases of each property
	$(ONE_THREAD) $(BIN)/python -m pytest -q -m property --cases 10000 --count-cases --cases-file quality/results/properties.json

audit: $(VENV)/.audit ## known vulnerabilities of the pinned packages (needs the network)
	$(VENV)/.audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip

$(VENV)/.audit:
	$(PYTHON) -m venv $@
	$@/bin/pip install --quiet pip-audit==2.9.0

chaos: $(VENV)/.test ## kills, full disks, starved memory
	$(ONE_THREAD) $(BIN)/python -m pytest -q -m chaos tests tests/chaos_llama.py

certificates-check: $(VENV)/.test ## nothing that the committed certificates show may be lost
	$(ONE_THREAD) $(BIN)/entrenar verify ops --against quality/certificates.json

certificates: $(VENV)/.test ## what is proved and measured of each operation, written to quality/certificates.json
	$(ONE_THREAD) $(BIN)/entrenar verify ops --out quality/certificates.json

format: $(VENV)/.test ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## delete environment, runs and corpora
	rm -rf $(VENV) runs corpora .pytest_cache .mypy_cache .ruff_cache coverage.json coverage.xml coverage-critical .coverage*
