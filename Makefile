# Everything a fresh machine needs: Python 3.11 or newer, pip and make.
#   make demo        set up, then run the demo: real models and data, H2Tune against local training
#   make test        set up, then lint, types and the fast tests
#   make test-slow   what is marked slow (crash tests, long parities, further forms)
#   make assets      fetch and verify the real models and data sets of the examples
#   make bench-engine bench-compile bench-methods bench-throughput study-convergence
#                    measure again what the experiments' pages say
#   make gpu         on a machine with a CUDA device: kernel tests and benchmarks into OUT
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
GPU_PYTHON ?= python3
OUT ?= runs/gpu

.PHONY: demo assets test test-slow lint types format gpu clean
.PHONY: bench-engine bench-compile bench-methods bench-throughput study-convergence

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)

# One stamp per set of extras: a changed pin or extra completes the environment on the next call.
PINS := pyproject.toml constraints.txt
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e

$(VENV)/.base: $(PINS) | $(BIN)/python
	$(INSTALL) .
	touch $@

$(VENV)/.test: $(PINS) | $(BIN)/python
	$(INSTALL) '.[test,parity,data]'
	touch $@

# Real models are read from GGUF, which is an extra.
$(VENV)/.demo: $(PINS) | $(BIN)/python
	$(INSTALL) '.[data]'
	touch $@

# What draws the figures of the experiments.
$(VENV)/.plot: $(PINS) | $(BIN)/python
	$(INSTALL) '.[data,plot]'
	touch $@

demo: $(VENV)/.demo
	$(BIN)/h2tune demo --out runs/demo

assets: $(VENV)/.base
	$(BIN)/python -m h2tune_jax.tasks.assets minilm smollm2 trec sarcasm rotten_tomatoes sms

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

# The experiments, hours in all; their READMEs say what each costs. Of bench-methods and study-convergence
# what is finished is not run again; the throughput is measured anew.
bench-methods: $(VENV)/.plot
	$(BIN)/python experiments/real_3x3/bench.py
	$(BIN)/python experiments/real_3x3/costs.py both
	$(BIN)/python experiments/real_3x3/report.py

bench-throughput: $(VENV)/.plot
	$(BIN)/python experiments/throughput/peers/make_venvs.py
	$(BIN)/python experiments/throughput/compare.py
	$(BIN)/python experiments/throughput/flat.py
	$(BIN)/python -m h2tune_jax.bench --csv experiments/throughput/results/machine.csv
	$(BIN)/python experiments/throughput/pages.py
	-$(BIN)/python experiments/throughput/targets.py

# Some settings are there to be flagged, so their exit codes say nothing here.
SWEEPS := 'participation/*' 'local_steps/*' 'heterogeneity/*' 'alternation/*' 'upload/*' 'noise/*'
study-convergence: $(VENV)/.plot
	$(BIN)/python -m h2tune_jax.study.convergence 'h2tune/*' 'fedavg/*' --out experiments/convergence/results
	$(BIN)/python -m h2tune_jax.study.convergence 'wrong/*' --expect inconsistent --out experiments/convergence/results
	-$(BIN)/python -m h2tune_jax.study.convergence $(SWEEPS) 'beyond/*' --out experiments/convergence/results
	$(BIN)/python experiments/convergence/report.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
