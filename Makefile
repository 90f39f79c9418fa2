# Set-up is one target; every other target runs it first. See README.md.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.setup-done
LLAMA := .venv-llama
TEST_WORKERS ?= 2
# Not in constraints.txt: torch's CUDA builds bring a version of their own, and want no other.
TRITON := triton==3.9.0

.PHONY: setup demo test test-slow test-gpu test-gguf soak lint bench bench-gpu clean

setup: $(STAMP)

# torch first and alone: a looser first install may pull gigabytes of CUDA packages.
# llama-models without its dependencies: the tests need its tokenizer, its chat format, and its model code, which asks
# for fairscale, a source package that looks for torch while it is built.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed; try make PYTHON=python3.11") if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	[ "$$(uname)" != Linux ] || $(PY) -c 'import triton' 2>/dev/null || $(PY) -m pip install --quiet $(TRITON)
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(PY) -m pip install --quiet --no-deps --constraint constraints.txt llama-models
	$(PY) -m pip install --quiet --no-deps --no-build-isolation --constraint constraints.txt fairscale
	touch $@

demo: setup
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" bash examples/demo.sh

# Without a GPU, also where there is one: what is compared with one is in test-gpu.
test: setup
	CUDA_VISIBLE_DEVICES= $(PY) -m pytest -n $(TEST_WORKERS) -m "not slow and not llama_cpp"

test-slow: setup
	CUDA_VISIBLE_DEVICES= $(PY) -m pytest -m slow

# On a machine with a CUDA build of torch: the kernels, models and runs that are compared with the CPU.
test-gpu: setup
	$(PY) -m pytest -m gpu

# What convert writes as GGUF, in llama.cpp itself: built from source once (ten minutes or so), kept in .venv-llama.
test-gguf: setup $(LLAMA)/.done
	L4TOOL_LLAMA_PYTHON="$(CURDIR)/$(LLAMA)/bin/python" $(PY) -m pytest -m llama_cpp tests/converters

$(LLAMA)/.done: constraints.txt
	$(PYTHON) -m venv $(LLAMA)
	$(LLAMA)/bin/python -m pip install --quiet --no-binary llama-cpp-python --constraint constraints.txt llama-cpp-python
	touch $@

# Kills, power cuts, fuzz and a million lines: docs/reliability.md.
soak: setup
	CUDA_VISIBLE_DEVICES= $(PY) -m pytest -n $(TEST_WORKERS) -m "slow or not slow" tests/batch/soak tests/batch/job tests/batch/front

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# Needs peers in venvs of their own; docs/benchmarks.md says how to make them.
bench: setup
	$(PY) bench/quantize.py
	$(PY) bench/batch_cpu.py
	$(PY) bench/pipeline.py

# On a machine with a CUDA build of torch: every figure that docs/benchmarks.md has of a GPU.
bench-gpu: setup
	$(PY) bench/gpu_page.py

clean:
	rm -rf $(VENV) $(LLAMA) demo-out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
