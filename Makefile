# make serve   serve a tiny DeepSeek-V4 NVFP4 checkpoint on this machine's CPU
# make test    run every test; with COMPILER=1 also those that compile the SM100 kernels (0.5 GB more to install)
# make image   build the GPU image
# Variables: PYTHON, VENV, PORT, RANKS, COMPILER

PYTHON ?= python3.11
VENV   ?= .venv
PORT   ?= 8000
RANKS  ?= 1

CHECKPOINT := build/tiny-nvfp4
BIN        := $(VENV)/bin
TORCH      := torch==2.13.0+cpu
TORCH_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: serve test lint image install patch bench clean help

help:
	@sed -n '1,4s/^# //p' Makefile

serve: install patch $(CHECKPOINT)/config.json
	$(BIN)/python scripts/serve_cpu.py --model $(CHECKPOINT) --port $(PORT) --ranks $(RANKS)

test: install patch $(VENV)/.test-installed $(if $(COMPILER),$(VENV)/.compiler-installed)
	$(BIN)/python -m pytest

lint: install $(VENV)/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The GPU image; docs/operations.md says what it needs and how to serve with it.
image:
	docker build --tag deepseek-v4-nvfp4:0.1.0 --build-arg REVISION=$$(git rev-parse --short HEAD) .

install: $(VENV)/.installed

# torch comes from the configured package index if that has the CPU build, else from PyTorch's own.
$(VENV)/.installed: requirements/cpu.txt kernel/pyproject.toml
	$(PYTHON) scripts/check_host.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --no-deps $(TORCH) \
	  || $(BIN)/pip install --disable-pip-version-check --no-deps --index-url $(TORCH_INDEX) $(TORCH)
	$(BIN)/pip install --disable-pip-version-check --no-deps -r requirements/cpu.txt
	$(BIN)/pip install --disable-pip-version-check --no-deps --no-build-isolation --editable kernel
	$(BIN)/python -m nvfp4_megamoe.backends.cpu.build
	touch $@

$(VENV)/.test-installed: requirements/test.txt $(VENV)/.installed
	$(BIN)/pip install --disable-pip-version-check --no-deps -r requirements/test.txt
	touch $@

$(VENV)/.compiler-installed: requirements/sm100.txt $(VENV)/.installed
	$(BIN)/pip install --disable-pip-version-check --no-deps -r requirements/sm100.txt
	touch $@

patch: install
	$(BIN)/python scripts/patch_vllm.py apply

$(CHECKPOINT)/config.json: $(VENV)/.installed
	$(BIN)/python scripts/make_checkpoint.py $(CHECKPOINT) --preset tiny --format nvfp4

clean:
	rm -rf build $(VENV)
