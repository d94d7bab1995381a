#!/usr/bin/env bash
# Copies ~/results of the first worker, which alone writes: bash scripts/tpu/collect.sh FOLDER --zone ZONE [--name NAME] [--run]
set -euo pipefail
# shellcheck source=scripts/tpu/common.sh
source "$(dirname "$0")/common.sh"

[[ ${rest[0]:-} ]] || fail "expected a folder for the results, got none: give it first"
run mkdir -p "${rest[0]}"
run gcloud compute tpus tpu-vm scp --recurse "$name":results "${rest[0]}" --zone "$zone" --worker 0
