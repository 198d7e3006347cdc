# The job as an image: for one NVIDIA GPU, or, with VARIANT=cpu, the same layout without CUDA for tests and demos.
#   make image, make image-cpu; every argument and why it is built this way: docs/image.md, docs/adr/0015-image.md
# There is no `# syntax=` line: BuildKit's own frontend is enough, and nothing but the base is pulled.

# The `base` flavour: torch's wheels bring the CUDA libraries that they were built with and find them by their own path;
# `runtime` would add a second copy that nothing loads. 13.0 is what the locked torch is built for; Ubuntu 24.04 has the lock's Python, 3.12.
ARG BASE_IMAGE=nvidia/cuda:13.0.3-base-ubuntu24.04@sha256:7c7413a56200486f71f181cad9310f6fd31b6bb21816ade15fc9c1e1e927a5c1
ARG VARIANT=gpu


# What the system gives: Python, and a compiler with Python's headers, by which Triton and torch build at run time.
FROM ${BASE_IMAGE} AS system
# A base that brings a whole Python (python:3.12-slim, say) keeps it. NVIDIA's own package source is not asked: nothing
# of it is needed.
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
    python3 -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and "Python 3.11 to 3.13 is needed: " + sys.version)'


# Two environments: /opt/build has pip and stays behind, /opt/venv is what the image gets.
FROM system AS builder
RUN python3 -m venv /opt/build && python3 -m venv --without-pip /opt/venv
ENV PYTHONDONTWRITEBYTECODE=1 PIP_CONFIG_FILE=/run/pip.conf PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build


FROM builder AS packages-gpu
COPY locks/gpu.txt locks/
# What comes as source (kiwipiepy-model: data) is built with the lock's own setuptools, and nothing is taken without its hash.
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


# The lock for the CPU has the development tools as well: it bounds what pyproject.toml asks for.
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
    /opt/venv/bin/python -c 'import torch, sys; sys.exit(torch.version.cuda and "pip found a CUDA build of torch: name an index or a \
folder with the CPU build, --build-arg PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS")'


# Without what is never used, compiled, and as three layers: what changes least, and weighs most, comes first. Some packages
# hold files for another Python, which don't compile and are never imported; tests/image/structure.yaml wants bytecode.
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


# The job itself, built from hashed tools and installed without asking an index.
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
# Any user id may work in /job and /cache; 10001 has a name as well, and where no name is known USER says one.
RUN mkdir -m 1777 /job /cache && \
    echo 'trainer:x:10001:10001::/cache:/usr/sbin/nologin' >>/etc/passwd && \
    echo 'trainer:x:10001:' >>/etc/group
COPY --from=packages /layers/cuda /
COPY --from=packages /layers/torch /
COPY --from=packages /layers/rest /
# What a smoke run needs: the bundled data and a base of 2.4 million parameters.
COPY data /opt/lora-trainer/data/
COPY examples /opt/lora-trainer/examples/
COPY --from=job /layer /
# The root may be read-only: everything that anything keeps goes below /cache, and HOME is there for what has no variable.
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
# Last, because they change with each commit. The manifest of every bundle names GIT_REVISION, and IMAGE_DIGEST where
# whoever starts the container sets it: an image can't know its own.
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
