#!/usr/bin/env bash
# Deletes the TPU VM and its request, and lists what is left: bash scripts/tpu/delete.sh --zone ZONE [--name NAME] [--run]
set -euo pipefail
# shellcheck source=scripts/tpu/common.sh
source "$(dirname "$0")/common.sh"

run gcloud compute tpus queued-resources delete "$name" --zone "$zone" --force --quiet
run gcloud compute tpus queued-resources list --zone "$zone"
