# Every target first sets up the environment, once (see scripts/bootstrap.py), and then uses it.
# PYTHON   the Python that makes the environment       make demo PYTHON=python3.12
# ARGS     more arguments for the runner or for pytest make campaign-h100 ARGS="--overwrite"
# CAMPAIGN the folder of the results, below outputs/   make campaign-h100 CAMPAIGN=mine
# GPUS     run each preset on so many GPUs as well     make campaign-h100 GPUS=2    (or GPUS="2 4")
# NEWEST   1: install the newest versions that pyproject.toml allows instead of the tested ones of
#          constraints.txt; give it with every command, or export it   make test NEWEST=1
# CPU      1: install a torch without CUDA, which is 3 GB less; later commands keep it, CPU=0 ends it
#                                                                      make install CPU=1

PYTHON ?= python3
ARGS ?=
PYTHON_TARGET ?= 3.12
# Only the campaigns that come with the project write its log and its noise record.
LOG = $(if $(filter h100,$(CAMPAIGN)),--log OPTIMIZATION_LOG.md)

NOISE = $(if $(filter h100 h100_extras,$(CAMPAIGN)),--record-noise)

# Presets of a second campaign with its own baseline. One campaign for all would exceed many GPU time limits.
EXTRAS = realtime_8gb ablation compile_parts

MODE = $(if $(filter-out 0,$(NEWEST)),--newest,$(if $(filter 0,$(CPU)),--no-cpu,$(if $(CPU),--cpu)))
SETUP = py="$$($(PYTHON) scripts/bootstrap.py $(MODE))" || exit 1
RUNNER = $(SETUP); "$$py" -m longlive_opt.runner

.DEFAULT_GOAL := help
.PHONY: help install demo test test-browser test-versions test-gpu lint lab summary training-report quantization parameters readme wheelhouse install-offline campaign-h100 extras-h100 equal-terms-h100 campaign-h100-tiny clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' Makefile

install: ## set up the environment (.venv, or the active one if it has torch)
	@$(SETUP); echo "environment ready: $$py"

demo summary: CAMPAIGN ?= demo
demo: ## run every preset except the studies on the tiny model (CPU, minutes): outputs/demo
	@$(RUNNER) run --campaign $(CAMPAIGN) --profile params/profiles/laptop.yaml --repeat-baseline 1 --skip ablation compile_parts exact faithful record tiny_vae fp8_vae $(ARGS)

test: ## run the tests
	@$(SETUP); "$$py" -m pytest -n auto --dist worksteal $(ARGS)

test-browser: ## test the live notebook in JupyterLab with a headless Chromium (needs Chromium and playwright)
	@$(SETUP); "$$py" -m pip install --quiet -c constraints.txt playwright && \
		"$$py" -m pytest tests/browser --browser-tests $(ARGS)

test-versions: ## test torch's internals with the oldest and the newest torch allowed
	@$(PYTHON) scripts/test_versions.py $(ARGS)

test-gpu: ## run the tests that need a GPU and record their output: outputs/h100/gpu_tests.txt
	@$(SETUP); "$$py" scripts/gpu_tests.py outputs/h100/gpu_tests.txt $(ARGS)

lint: ## check the code with ruff
	@$(SETUP); "$$py" -m ruff check $(ARGS) .

lab: ## open JupyterLab
	@$(SETUP); "$$py" -m jupyterlab $(ARGS)

summary: ## compare the finished runs of a campaign again (CAMPAIGN=demo)
	@$(RUNNER) summary --campaign $(CAMPAIGN) $(LOG) $(NOISE) $(ARGS)

training-report: ## report how the tiny model was trained and how well it works: outputs/training
	@$(RUNNER) training $(ARGS)

quantization: ## measure error against time of every 8-bit format: outputs/quantization (ARGS="--profile params/profiles/h100.yaml")
	@$(RUNNER) quantization $(ARGS)

campaign-h100: CAMPAIGN ?= h100
campaign-h100: ## run all presets except the extras on an H100, skipping finished ones: outputs/h100
	@$(RUNNER) run --campaign $(CAMPAIGN) --profile params/profiles/h100.yaml --repeat baseline realtime \
		--repeats 2 --skip $(EXTRAS) $(if $(GPUS),--gpus $(GPUS)) $(LOG) $(NOISE) $(ARGS)

extras-h100: CAMPAIGN ?= h100_extras
extras-h100: ## run realtime in 8 GB, low memory and the studies on an H100: outputs/h100_extras
	@$(RUNNER) run --campaign $(CAMPAIGN) --profile params/profiles/h100.yaml --repeat-baseline 1 \
		--presets baseline $(EXTRAS) low_memory $(NOISE) $(ARGS)

equal-terms-h100: CAMPAIGN ?= h100_equal_terms
equal-terms-h100: ## run the work of the strongest public engine, a window of 21 without a sink: outputs/h100_equal_terms
	@$(RUNNER) run --campaign $(CAMPAIGN) --profile params/profiles/h100.yaml --presets baseline exact tiny_vae \
		--set local_attn_size=21 sink_size=0 $(ARGS)

campaign-h100-tiny: CAMPAIGN ?= h100_tiny
campaign-h100-tiny: ## run the trained tiny model on an H100 for adherence, drift and fidelity: outputs/h100_tiny
	@$(RUNNER) run --campaign $(CAMPAIGN) --profile params/profiles/h100_tiny.yaml --repeat-baseline 1 \
		--presets baseline static_kv balanced speed realtime $(ARGS)

readme: CAMPAIGN ?= h100
readme: ## write the results table into README.md (CAMPAIGN=h100)
	@$(SETUP); "$$py" -m longlive_opt.report outputs/$(CAMPAIGN) --readme README.md

parameters: ## write params/README.md and the notebooks' parameters cells from the keys, presets and profiles
	@$(RUNNER) parameters

wheelhouse: ## collect wheels for an offline Linux x86-64 host (PYTHON_TARGET=3.12, HAVE=its pip list)
	@$(PYTHON) scripts/wheelhouse.py --python $(PYTHON_TARGET) $(if $(HAVE),--have $(HAVE)) wheelhouse

install-offline: ## set up from wheelhouse/ without network, on a host that has torch
	@$(PYTHON) scripts/bootstrap.py --offline wheelhouse

clean: ## remove the environment and the caches, but not outputs/
	rm -rf .venv .bootstrap .pytest_cache .ruff_cache longlive_opt.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
