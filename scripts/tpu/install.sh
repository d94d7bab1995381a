#!/usr/bin/env bash
# Installs the last commit of this tree on every worker: bash scripts/tpu/install.sh --zone ZONE [--name NAME] [--run]
# The machines' own Python is older than 3.11, so uv brings one.
set -euo pipefail
# shellcheck source=scripts/tpu/common.sh
source "$(dirname "$0")/common.sh"

archive=/tmp/jaxspec.tar.gz
run git -C "$(dirname "$0")/../.." archive --format tar.gz --prefix jaxspec-source/ --output "$archive" HEAD
run gcloud compute tpus tpu-vm scp "$archive" "$name": --zone "$zone" --worker all
on_workers 'set -e; tar xf jaxspec.tar.gz; curl -LsSf https://astral.sh/uv/install.sh | sh
~/.local/bin/uv venv --clear --python 3.12 jaxspec
~/.local/bin/uv pip install --python jaxspec "./jaxspec-source[tpu]"
jaxspec/bin/python -c "import importlib.metadata as m; print(m.version(\"jax\"), m.version(\"libtpu\"))"'
