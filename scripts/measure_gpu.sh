#!/usr/bin/env bash
# Measures jaxspec on one GPU, without the network, in less than nine minutes: bash scripts/measure_gpu.sh OUT
# Real shapes with random weights (LLaSA-1B, LLaSA-8B), and the built-in voice, which is trained. Each folder of OUT has bench.json,
# bench.md and bench.png. Needs the extra cuda: pip install -e '.[cuda]'
set -euo pipefail
out=${1:?expected a folder for the results, got none: give one}
mkdir -p "$out"

run() {
  name=$1
  shift
  echo "== $name"
  timeout 170 jaxspec bench "$@" --out-dir "$out/$name" || echo "$name did not finish in 170 s" | tee "$out/$name.failed"
}

python -c 'import jax; print(jax.__version__, jax.devices())' | tee "$out/device.txt"
run builtin --preset builtin --draft-lengths 1 3 5 7 --verify exact coarse-grained block-coarse-grained --batches 1 8 --repeats 3
run llasa-1b --preset llasa-1b --synthetic-acceptance 0.6 --dtypes bfloat16 --batches 1 16 64 --new-tokens 48 --repeats 3
run llasa-8b --preset llasa-8b --synthetic-acceptance 0.6 --dtypes bfloat16 --batches 1 --new-tokens 48 --repeats 3
