#!/usr/bin/env bash
# Check that `poetry install` finds a solution for pyproject.toml: make poetry-check.
#
#   tools/poetry_check.sh VENV     VENV holds Poetry 2.2 or newer
#
#   POETRY_SOURCE  a simple index to ask instead of the public one (default: PIP_INDEX_URL). Poetry reads none of pip's
#                  settings, and asks the public index through a JSON API that most mirrors lack.
#
# Resolves a copy in a temporary folder with an empty cache: downloads metadata only, installs nothing, and leaves neither a
# lock file nor an environment in the checkout.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

poetry=$(realpath "${1:?a virtual environment with Poetry}")/bin/poetry
source=${POETRY_SOURCE:-${PIP_INDEX_URL:-}}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/project"
cp -R pyproject.toml README.md LICENSE entrypoint lora_trainer "$work/project"
cd "$work/project"
export POETRY_CACHE_DIR="$work/cache" POETRY_VIRTUALENVS_IN_PROJECT=true

[[ -z $source ]] || "$poetry" source add --quiet --priority primary index "$source"
if ! "$poetry" install --dry-run --no-interaction --no-ansi >"$work/log" 2>&1; then
  tail -n 40 "$work/log" >&2
  exit 1
fi
grep -E '^Package operations' "$work/log"
# A plain `poetry install` must bring the training stack (pyproject.toml, the group `train`).
for name in torch transformers trl peft unsloth; do
  grep -qE "Installing $name \(" "$work/log" || { echo "poetry_check.sh: poetry install leaves out $name" >&2; exit 1; }
done
