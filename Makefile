# Every target works from a clean checkout: each makes .venv first when it is missing.
#   make quickstart        two commands are all it takes: clone, then this
#   make test              lint, types and the test suite; what CI runs
# PYTHON picks the interpreter (3.11 or 3.12). If it already has torch >= 2.11, .venv uses that one;
# otherwise TORCH is installed.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
RUN := PATH="$(CURDIR)/$(BIN):$$PATH" PYTHONPATH="$(CURDIR)" PYTHONUNBUFFERED=1

.PHONY: quickstart quickstart-long test test-slow lint format clean
.DELETE_ON_ERROR:

quickstart: $(VENV)/ready
	@$(RUN) launch/quickstart.sh quickstart

quickstart-long: $(VENV)/ready
	@$(RUN) launch/quickstart.sh quickstart_long

test: lint
	@$(RUN) OMP_NUM_THREADS=1 pytest

test-slow: $(VENV)/ready
	@$(RUN) OMP_NUM_THREADS=1 pytest -m slow --timeout=3600

lint: $(VENV)/ready
	@$(RUN) ruff check
	@$(RUN) ruff format --check
	@$(RUN) mypy

format: $(VENV)/ready
	@$(RUN) ruff check --fix
	@$(RUN) ruff format

# The stamp is written last, so an interrupted installation is repeated.
$(VENV)/ready: pyproject.toml requirements.txt Makefile
	@rm -rf $(VENV)
	@if $(PYTHON) -c 'import re, torch; assert tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) >= (2, 11)' 2>/dev/null; then \
		echo "make: using the torch that $(PYTHON) already has"; \
		$(PYTHON) -m venv --system-site-packages $(VENV); \
	else \
		echo "make: installing $(TORCH)"; \
		$(PYTHON) -m venv $(VENV) && $(BIN)/pip install -q --disable-pip-version-check $(TORCH); \
	fi
	@echo "make: installing the pinned dependencies"
	@DS_BUILD_OPS=0 $(BIN)/pip install -q --disable-pip-version-check -r requirements.txt
	@$(BIN)/pip install -q --disable-pip-version-check --no-deps -e .
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build *.egg-info
