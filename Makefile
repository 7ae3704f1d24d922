# make demo       pictures with and without acceleration, on any CPU; sets everything up by itself
# make test       the whole test suite; sets everything up by itself
# make test-gpu   the tests that need a CUDA device
# make check      format, lint, types and the fast tests
# PYTHON=python3.12 make demo    chooses the interpreter of the environment

PYTHON ?= python3
VENV := .venv
# Written last: it exists only when the whole set-up went through, and holds the folder that it was made for.
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test check check-fast test-gpu test-comfyui benchmark clean FORCE

help:
	@sed -n 's/^# //p' Makefile

setup: $(READY)

demo: $(READY)
	@$(VENV)/bin/hasten demo

test: $(READY)
	@$(VENV)/bin/python -m pytest -m "not comfy"

check: $(READY)
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" scripts/check

check-fast: $(READY)
	@$(VENV)/bin/python -m pytest -m "not slow and not gpu and not comfy"

test-gpu: $(READY)
	@$(VENV)/bin/python -m pytest -m gpu
	@$(VENV)/bin/python -m pytest tests/test_rows.py tests/test_rows_compile.py

test-comfyui: $(READY)
	@test -f "$${COMFYUI_DIR:-.comfyui}/main.py" || { \
	    echo "No ComfyUI at $${COMFYUI_DIR:-.comfyui}: run make test-comfyui COMFYUI_DIR=path/to/ComfyUI." >&2; exit 2; }
	@test -n "$(COMFYUI_PYTHON)" || scripts/comfyui_requirements $(VENV)/bin/python "$${COMFYUI_DIR:-.comfyui}"
	@COMFYUI_DIR="$${COMFYUI_DIR:-.comfyui}" PYTHONPATH="$(CURDIR)/src:$$PYTHONPATH" \
	    $(or $(COMFYUI_PYTHON),$(VENV)/bin/python) -m pytest -m comfy tests/comfyui

benchmark: $(READY)
	@$(VENV)/bin/python benchmarks/flux_nano.py

clean:
	rm -rf $(VENV) dist out .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A virtual environment holds absolute paths: one that was moved with its folder, or lost its interpreter, is made anew.
READY_IN := $(shell $(VENV)/bin/python -c '' 2>/dev/null && cat $(READY) 2>/dev/null)
ifneq ($(READY_IN),$(CURDIR))
$(READY): FORCE
endif

# The marker goes before pip starts: an interrupted set-up is never taken for a whole one, and what it left
# half-written is cleared away instead of built upon.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	    echo "hasten needs Python 3.10 or newer as '$(PYTHON)': on Debian run 'sudo apt install python3 python3-venv', or name one: make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	    echo "$(PYTHON) cannot make virtual environments: on Debian run 'sudo apt install python3-venv', then make again." >&2; exit 2; }
	@echo "Setting up $(VENV), once. This downloads torch and its friends: gigabytes where torch brings CUDA along, some minutes,"
	@echo "and pip is quiet meanwhile."
	@test "$(READY_IN)" = "$(CURDIR)" || $(PYTHON) -m venv --clear $(VENV)
	@rm -f $@
	@$(VENV)/bin/python -m pip install -q --upgrade pip
	@$(VENV)/bin/python -m pip install -q -c constraints.txt -e ".[dev]"
	@printf '%s\n' "$(CURDIR)" > $@
