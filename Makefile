# Every target sets up the environment first (once; scripts/bootstrap.py explains how) and then uses it.
# PYTHON   the Python that makes the environment       make demo PYTHON=python3.12
# ARGS     more arguments for the runner or for pytest make campaign-h100 ARGS="--overwrite"

PYTHON ?= python3
ARGS ?=
PYTHON_TARGET ?= 3.12
CAMPAIGN ?= demo

SETUP = py="$$($(PYTHON) scripts/bootstrap.py)" || exit 1
RUNNER = $(SETUP); "$$py" -m longlive_opt.runner

.DEFAULT_GOAL := help
.PHONY: help install demo test test-gpu lint lab summary training-report wheelhouse install-offline campaign-h100 ablation-h100 clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' Makefile

install: ## set up the environment (.venv, or the active one where it has torch already)
	@$(SETUP); echo "environment ready: $$py"

demo: ## run every preset but the ablation on the tiny model (CPU, minutes): outputs/demo
	@$(RUNNER) run --campaign demo --profile params/profiles/laptop.yaml --repeat-baseline 1 --skip ablation $(ARGS)

test: ## run the tests
	@$(SETUP); "$$py" -m pytest $(ARGS)

test-gpu: ## run the tests that need a GPU, and record their output: outputs/h100/gpu_tests.txt
	@$(SETUP); "$$py" scripts/gpu_tests.py outputs/h100/gpu_tests.txt $(ARGS)

lint: ## check the code with ruff
	@$(SETUP); "$$py" -m ruff check $(ARGS) .

lab: ## open JupyterLab
	@$(SETUP); "$$py" -m jupyterlab $(ARGS)

summary: ## compare the finished runs of one campaign again (CAMPAIGN=demo)
	@$(RUNNER) summary --campaign $(CAMPAIGN) $(ARGS)

training-report: ## explain how the tiny model was trained and how well it does: outputs/training
	@$(RUNNER) training $(ARGS)

campaign-h100: ## measure every preset but the ablation on an H100: outputs/h100 and OPTIMIZATION_LOG.md
	@$(RUNNER) run --campaign h100 --profile params/profiles/h100.yaml --repeat-baseline 1 --skip ablation \
		--log OPTIMIZATION_LOG.md $(ARGS)

ablation-h100: ## measure the realtime preset with one thing changed at a time: outputs/h100_ablation
	@$(RUNNER) run --campaign h100_ablation --profile params/profiles/h100.yaml --presets ablation $(ARGS)

wheelhouse: ## collect wheels for an offline Linux x86-64 host (PYTHON_TARGET=3.12, HAVE=its pip list)
	@$(PYTHON) scripts/wheelhouse.py --python $(PYTHON_TARGET) $(if $(HAVE),--have $(HAVE)) wheelhouse

install-offline: ## set up from wheelhouse/ without network, on a host that has torch
	@$(PYTHON) scripts/bootstrap.py --offline wheelhouse

clean: ## remove the environment and the caches; outputs/ stays
	rm -rf .venv .bootstrap .pytest_cache .ruff_cache longlive_opt.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
