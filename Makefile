# Every target works from a clean checkout: each makes .venv first when it is missing.
#   make quickstart        two commands are all it takes: clone, then this
#   make test              lint, types and the test suite; what CI runs
# PYTHON picks the interpreter (3.11 or 3.12). If it already has torch >= 2.11, .venv uses that one;
# otherwise TORCH is installed.
PYTHON ?= python3
TORCH ?= torch==2.13.0
GPU_PROCESSES ?= 6
VENV := .venv
BIN := $(VENV)/bin
RUN := PATH="$(CURDIR)/$(BIN):$$PATH" PYTHONPATH="$(CURDIR)" PYTHONUNBUFFERED=1

# Prints the folder of an installed torch >= 2.11, else fails.
FIND_TORCH := import pathlib, re, torch; \
	assert tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) >= (2, 11); \
	print(pathlib.Path(torch.__file__).parents[1])

.PHONY: quickstart quickstart-long compare denoising-base denoising-study speed test test-slow \
	test-gpu test-browser lint format clean
.DELETE_ON_ERROR:

quickstart: $(VENV)/ready
	@$(RUN) launch/quickstart.sh quickstart

quickstart-long: $(VENV)/ready
	@$(RUN) launch/quickstart.sh quickstart_long

# Five small models, three seeds each; minutes on one GPU with 16 CPU cores.
compare: $(VENV)/ready
	@$(RUN) launch/compare_models.sh

# What SPADE's and full attention's encoder-decoders of T5 base's size cost by length; a GPU each.
denoising-base: $(VENV)/ready
	@$(RUN) launch/denoising_base.sh

# What pretraining is worth to small encoder-decoders on five tasks, whose folder is CORPORA.
denoising-study: $(VENV)/ready
	@$(RUN) launch/denoising_study.sh

# Training speed by length and loop, beside public packages; one GPU.
speed: $(VENV)/ready
	@$(RUN) launch/speed.sh

test: lint
	@$(RUN) OMP_NUM_THREADS=1 pytest --numprocesses 2 --dist loadscope

test-slow: $(VENV)/ready
	@$(RUN) OMP_NUM_THREADS=1 pytest -m "slow and not gpu and not browser and not peers" --timeout=3600

# What needs a GPU, each by name; minutes of compilation, so several processes share the device.
# One thread each: references are in fp64 on the CPU, and the processes' threads would crowd it.
test-gpu: $(VENV)/ready
	@$(RUN) OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 \
		pytest -m "gpu and not slow" -vv -rfE --numprocesses $(GPU_PROCESSES)

# Opens the report page in an installed Chromium; screenshots go to test-artefacts/.
test-browser: $(VENV)/ready
	@$(RUN) OMP_NUM_THREADS=1 pytest -m browser

lint: $(VENV)/ready
	@$(RUN) ruff check
	@$(RUN) ruff format --check
	@$(RUN) mypy

format: $(VENV)/ready
	@$(RUN) ruff check --fix
	@$(RUN) ruff format

# The stamp is written last, so an interrupted installation is repeated. A torch that PYTHON already
# has is reached through a path file: --system-site-packages would miss it if PYTHON is itself in a
# virtual environment.
$(VENV)/ready: pyproject.toml requirements.txt Makefile
	@rm -rf $(VENV) && $(PYTHON) -m venv $(VENV)
	@if site=$$($(PYTHON) -c '$(FIND_TORCH)' 2>/dev/null); then \
		echo "make: using the torch in $$site"; \
		echo "$$site" > $$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')/torch.pth; \
	else \
		echo "make: installing $(TORCH)"; \
		$(BIN)/pip install -q --disable-pip-version-check $(TORCH); \
	fi
	@echo "make: installing the pinned dependencies"
	@DS_BUILD_OPS=0 $(BIN)/pip install -q --disable-pip-version-check --no-deps --ignore-installed \
		-r requirements.txt
	@$(BIN)/pip install -q --disable-pip-version-check --no-deps -e .
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build *.egg-info
