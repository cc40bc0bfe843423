# make train: set up and train the embedded model in minutes.   make test: the whole test suite.
# PYTHON=python3.12 make setup chooses the interpreter; ARGS="plugin=[steer]" make train passes overrides on.
.PHONY: setup train test lint clean

export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_DISABLE_TELEMETRY ?= 1

setup:
	@bash scripts/setup.sh

train: setup
	@.venv/bin/entrl train $(ARGS)

test: setup
	@HF_HUB_OFFLINE=1 WANDB_MODE=disabled .venv/bin/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: setup
	@.venv/bin/ruff check . && .venv/bin/ruff format --check .

clean:
	rm -rf .venv dist build .pytest_cache .ruff_cache
