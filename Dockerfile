# Build the job's image for one NVIDIA GPU, or with VARIANT=cpu the same layout without CUDA, for tests and demos.
#   make image, make image-cpu; docs/image.md lists the arguments, docs/adr/0015-image.md gives the reasons.
# Without a `# syntax=` line BuildKit uses its built-in frontend, and the build pulls only the base.

# Use the `base` flavour: torch's wheels contain the CUDA libraries they were built with and load them from their own path, so
# `runtime` would add a second copy that nothing loads. The locked torch is built for CUDA 13.0; Ubuntu 24.04 has the lock's
# Python, 3.12.
ARG BASE_IMAGE=nvidia/cuda:13.0.3-base-ubuntu24.04@sha256:7c7413a56200486f71f181cad9310f6fd31b6bb21816ade15fc9c1e1e927a5c1
ARG VARIANT=gpu


# System packages: Python, and a compiler with Python's headers, because Triton and torch compile at run time.
FROM ${BASE_IMAGE} AS system
# Keep a complete Python of the base (such as python:3.12-slim). Remove NVIDIA's package source, because nothing comes from it.
RUN --mount=type=secret,id=ca,target=/run/ca.crt \
    set -eu; \
    export DEBIAN_FRONTEND=noninteractive; \
    rm -f /etc/apt/sources.list.d/cuda*; \
    set -- ca-certificates gcc g++ libc6-dev; \
    python3 -c 'import ensurepip, os, sysconfig as s; assert os.path.isfile(s.get_path("include") + "/Python.h")' 2>/dev/null || \
        set -- "$@" python3 python3-dev python3-venv; \
    tls=Acquire::https::CAInfo=/run/ca.crt; [ -s /run/ca.crt ] || tls=Acquire::https::Verify-Peer=true; \
    apt-get -o "$tls" update; \
    apt-get -o "$tls" install --yes --no-install-recommends "$@"; \
    rm -rf /var/lib/apt/lists/* /var/cache/apt/* /usr/lib/python3*/config-*/*.a /usr/lib/*/libpython3*.a; \
    python3 -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and "the base needs Python 3.11, 3.12 or 3.13, and has " + sys.version)'


# /opt/build has pip and stays in this stage; the image gets /opt/venv.
FROM system AS builder
RUN python3 -m venv /opt/build && python3 -m venv --without-pip /opt/venv
ENV PYTHONDONTWRITEBYTECODE=1 PIP_CONFIG_FILE=/run/pip.conf PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build


FROM builder AS packages-gpu
COPY locks/gpu.txt locks/
# Build kiwipiepy-model (data), which exists only as source, with the locked setuptools. Every file must match its hash.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
RUN --mount=type=secret,id=ca,target=/run/ca.crt \
    --mount=type=secret,id=pip_conf,target=/run/pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    set -eu; \
    [ ! -s /run/ca.crt ] || export PIP_CERT=/run/ca.crt; \
    sed -n '/^setuptools==/,/[^\\]$/p' locks/gpu.txt >setuptools.txt; \
    for file in setuptools.txt locks/gpu.txt; do \
        /opt/build/bin/pip --python /opt/venv/bin/python install --no-compile --no-deps --require-hashes --no-build-isolation \
            --requirement "$file"; \
    done


# The CPU lock also holds the development tools, so it serves as constraints for what pyproject.toml requires.
FROM builder AS requirements-cpu
COPY pyproject.toml ./
RUN python3 -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
    print(*p["dependencies"], *p["optional-dependencies"]["cpu"], sep="\n")' >requirements.txt


FROM builder AS packages-cpu
COPY locks/cpu.txt locks/
COPY --from=requirements-cpu /build/requirements.txt ./
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
RUN --mount=type=secret,id=ca,target=/run/ca.crt \
    --mount=type=secret,id=pip_conf,target=/run/pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    set -eu; \
    [ ! -s /run/ca.crt ] || export PIP_CERT=/run/ca.crt; \
    echo setuptools >setuptools.txt; \
    for file in setuptools.txt requirements.txt; do \
        /opt/build/bin/pip --python /opt/venv/bin/python install --no-compile --constraint locks/cpu.txt --no-build-isolation \
            --requirement "$file"; \
    done; \
    /opt/venv/bin/python -c 'import torch, sys; sys.exit(torch.version.cuda and "pip installed a CUDA build of torch: pass an index or \
a folder with the CPU build as --build-arg PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS")'


# Trim unused files, compile, and split into three layers, the largest and most stable first. Some packages contain files for
# another Python that fail to compile and are never imported; tests/image/structure.yaml checks that bytecode exists.
# hadolint ignore=DL3006
FROM packages-${VARIANT} AS packages
COPY tools/trim_packages.py /build/
RUN set -eu; \
    site=$(/opt/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
    python3 /build/trim_packages.py "$site"; \
    /opt/venv/bin/python -m compileall -qq -j 0 --invalidation-mode unchecked-hash "$site" || true; \
    mkdir -p "/layers/cuda$site" "/layers/torch$site" /layers/rest/opt; \
    for part in cuda/nvidia torch/torch torch/triton; do \
        [ ! -e "$site/${part#*/}" ] || mv "$site/${part#*/}" "/layers/${part%/*}$site/"; \
    done; \
    mv /opt/venv /layers/rest/opt/


# Build the job itself with hash-checked tools and install it without an index.
FROM builder AS job
COPY locks/build.txt locks/
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
RUN --mount=type=secret,id=ca,target=/run/ca.crt \
    --mount=type=secret,id=pip_conf,target=/run/pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    set -eu; \
    [ ! -s /run/ca.crt ] || export PIP_CERT=/run/ca.crt; \
    /opt/build/bin/pip install --no-deps --require-hashes --requirement locks/build.txt
COPY pyproject.toml README.md LICENSE ./
COPY entrypoint entrypoint/
COPY lora_trainer lora_trainer/
RUN /opt/build/bin/pip wheel --no-deps --no-index --no-build-isolation --wheel-dir dist . && \
    /opt/build/bin/pip --python /opt/venv/bin/python install --no-compile --no-deps --no-index --prefix /layer/opt/venv dist/*.whl && \
    /opt/venv/bin/python -m compileall -q --invalidation-mode unchecked-hash -s /layer -p / /layer


FROM system AS image
# Any user id can work in /job and /cache. 10001 has a name; for other ids USER provides one.
RUN mkdir -m 1777 /job /cache && \
    echo 'trainer:x:10001:10001::/cache:/usr/sbin/nologin' >>/etc/passwd && \
    echo 'trainer:x:10001:' >>/etc/group
COPY --from=packages /layers/cuda /
COPY --from=packages /layers/torch /
COPY --from=packages /layers/rest /
# For a smoke run: the bundled data and a base with 2.4 million parameters.
COPY data /opt/lora-trainer/data/
COPY examples /opt/lora-trainer/examples/
COPY --from=job /layer /
# The root may be read-only: all caches go below /cache, and HOME points there for tools without a variable of their own.
ENV PATH=/opt/venv/bin:${PATH} \
    LANG=C.UTF-8 \
    PYTHONUNBUFFERED=1 \
    HOME=/cache \
    USER=trainer \
    LOGNAME=trainer \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    TORCH_HOME=/cache/torch \
    TORCHINDUCTOR_CACHE_DIR=/cache/torchinductor \
    TORCH_EXTENSIONS_DIR=/cache/torch_extensions \
    TRITON_CACHE_DIR=/cache/triton \
    CUDA_CACHE_PATH=/cache/cuda \
    UNSLOTH_COMPILE_LOCATION=/cache/unsloth_compiled_cache \
    UNSLOTH_MEGA_CACHE_DIR=/cache/unsloth_mega_cache \
    NUMBA_CACHE_DIR=/cache/numba \
    MPLCONFIGDIR=/cache/matplotlib
WORKDIR /job
USER 10001:10001
ENTRYPOINT ["lora-trainer"]
CMD ["--help"]
# These come last, because they change with each commit. Every bundle's manifest records GIT_REVISION, and IMAGE_DIGEST if the container
# was started with it: an image cannot know its own digest.
ARG VARIANT
ARG BASE_IMAGE
ARG VERSION
ARG REVISION
ARG CREATED
ENV GIT_REVISION=${REVISION}
LABEL org.opencontainers.image.title="lora-trainer" \
      org.opencontainers.image.description="Turns a persona's JSONL into a LoRA adapter, as one batch job (${VARIANT})" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.base.name="${BASE_IMAGE}"
