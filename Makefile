# Everything a fresh machine needs: Python 3.11 or newer, pip and make.
#   make demo        set up, then run the demo: real models and data, H2Tune against local training
#   make test        set up, then lint, types and the fast tests
#   make test-slow   what is marked slow (crash tests, long parities, further forms)
#   make assets      fetch and verify the real models and data sets of the examples
#   make gpu         on a machine with a CUDA device: kernel tests and benchmarks into OUT
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
GPU_PYTHON ?= python3
OUT ?= runs/gpu

.PHONY: demo assets test test-slow lint types format gpu bench-engine bench-compile clean

# One stamp per set of extras: a changed pin or extra completes the environment on the next call.
$(VENV)/.base: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.test: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,parity,data]'
	touch $@

# Real models are read from GGUF, which is an extra.
$(VENV)/.demo: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[data]'
	touch $@

demo: $(VENV)/.demo
	$(BIN)/h2tune demo --out runs/demo

assets: $(VENV)/.base
	$(BIN)/python -m h2tune_jax.tasks.assets minilm smollm2 trec sarcasm rotten_tomatoes

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/pyright

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint types
	$(BIN)/pytest -q -n $(JOBS) --dist loadgroup -m "not slow and not gpu"

test-slow: $(VENV)/.test
	$(BIN)/pytest -q -n $(JOBS) --dist loadgroup -m "slow and not gpu"

# Needs JAX with CUDA in GPU_PYTHON; WHEELS names a folder of wheels for a machine without network.
gpu:
	$(GPU_PYTHON) kernels/benchmarks/gpu.py --out $(OUT) $(if $(WHEELS),--wheels $(WHEELS))

bench-engine: $(VENV)/.base
	$(BIN)/python experiments/engine_overhead/bench.py

bench-compile: $(VENV)/.base
	$(BIN)/python experiments/compile_time/bench.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
