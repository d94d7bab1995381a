#!/usr/bin/env bash
# Runs `jaxspec bench` on every worker: bash scripts/tpu/bench.sh --zone ZONE [--name NAME] [--run] [ARGUMENTS OF BENCH]
# Results are in ~/results on the first worker.
set -euo pipefail
# shellcheck source=scripts/tpu/common.sh
source "$(dirname "$0")/common.sh"

((${#rest[@]})) || rest=(--preset llasa-1b --synthetic-acceptance 0.61 --dtypes bfloat16 --batches 1 8 64 --new-tokens 48)
on_workers "mkdir -p results; jaxspec/bin/jaxspec bench --distributed $(quoted "${rest[@]}")--out-dir results/bench"
