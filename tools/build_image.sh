#!/usr/bin/env bash
# Build the image: make image, make image-cpu.
#
#   tools/build_image.sh gpu|cpu [arguments for docker build]
#   tools/build_image.sh base gpu|cpu     print the variant's default base
#
#   IMAGE         the image's name (default: localhost/lora-trainer:gpu or localhost/lora-trainer:cpu)
#   BASE_IMAGE    another base: Debian or Ubuntu with Python 3.11 to 3.13 (3.12 for gpu)
#   CA            a file with CA certificates, if TLS goes through a private CA (default: PIP_CERT)
#   PIP_CONF      a pip.conf, for an index with credentials; a build secret that ends up in no layer
#   PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS     as for pip; a folder in PIP_FIND_LINKS is served to the build on
#                 loopback. The CPU image needs torch's CPU build from one of them: PyTorch's install page names the index.
#   BUILD_NETWORK docker build --network
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Both images use the same distribution.
default_base() {
  if [[ $1 == gpu ]]; then
    sed -n 's/^ARG BASE_IMAGE=//p' Dockerfile
  else
    echo ubuntu:24.04@sha256:008173c23f95b170204355c12626cb5a965d779a7e1283b09e9cffbb1bf33ca3
  fi
}

if [[ ${1:-} == base ]]; then
  default_base "${2:?gpu or cpu}"
  exit
fi
variant=${1:-}
[[ $variant == gpu || $variant == cpu ]] || { sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 2; }
shift
engine=$(tools/docker_engine.sh find) || { echo "build_image.sh: tools/docker_engine.sh starts an engine" >&2; exit 1; }
eval "$engine"

revision=$(git rev-parse --verify HEAD 2>/dev/null || true)
[[ -z $revision || -z $(git status --porcelain) ]] || revision+=-dirty
options=(
  --build-arg "VARIANT=$variant"
  --build-arg "BASE_IMAGE=${BASE_IMAGE:-$(default_base "$variant")}"
  --build-arg "VERSION=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)"
  --build-arg "REVISION=$revision"
  # Use the commit's time, so that one commit always gets the same labels.
  --build-arg "CREATED=$(git log -1 --format=%cI 2>/dev/null || date --iso-8601=seconds)"
  --tag "${IMAGE:-localhost/lora-trainer:$variant}"
)
ca=${CA:-${PIP_CERT:-}}
[[ -z $ca ]] || options+=(--secret "id=ca,src=$ca")
[[ -z ${PIP_CONF:-} ]] || options+=(--secret "id=pip_conf,src=$PIP_CONF")
if [[ -d ${PIP_FIND_LINKS:-} ]]; then
  # `docker build` only sees its context. Port 0 picks a free port.
  coproc SERVER { exec python3 -u -m http.server --bind 127.0.0.1 --directory "$PIP_FIND_LINKS" 0 2>/dev/null; }
  trap 'kill "$SERVER_PID"' EXIT
  read -r -u "${SERVER[0]}" line
  [[ $line =~ port\ ([0-9]+) ]]
  PIP_FIND_LINKS=http://127.0.0.1:${BASH_REMATCH[1]}/ BUILD_NETWORK=host
  export PIP_FIND_LINKS
fi
for name in PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS; do
  # Pass only the name; Docker reads the value from the environment.
  [[ -z ${!name:-} ]] || options+=(--build-arg "$name")
done
[[ -z ${BUILD_NETWORK:-} ]] || options+=(--network "$BUILD_NETWORK")
"$DOCKER" build "${options[@]}" "$@" .
