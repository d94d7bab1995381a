#!/usr/bin/env bash
# Measures jaxspec on one GPU, without the network, in less than nine minutes: bash scripts/measure_gpu.sh OUT
# Real shapes with random weights (LLaSA-8B, LLaSA-1B), and the built-in voice, which is trained. Each folder of OUT has bench.json,
# bench.md and bench.png. Needs the extra cuda: pip install -e '.[cuda]'
set -euo pipefail
out=${1:?expected a folder for the results, got none: give one}
deadline=$((SECONDS + 530))
mkdir -p "$out"

run() {
  name=$1
  shift
  left=$((deadline - SECONDS))
  echo "== $name, $left s left"
  if ((left < 10)) || ! timeout "$left" jaxspec bench "$@" --out-dir "$out/$name"; then
    echo "$name did not finish in the time that was left" | tee "$out/$name.failed"
  fi
}

llasa() {
  run "$1-$3-$2" --preset "llasa-$1" --batches "$2" --synthetic-acceptance "$3" --dtypes bfloat16 --new-tokens 64 --repeats 3 "${@:4}"
}

python -c 'import jax; print(jax.__version__, jax.devices())' | tee "$out/device.txt"
llasa 8b 1 0.61 --verify exact coarse-grained
llasa 8b 1 0.75 --verify exact coarse-grained
run builtin --draft builtin ngram --draft-lengths 3 7 --verify exact block-coarse-grained --batches 1 --repeats 3
llasa 8b 64 0.61 --verify coarse-grained
llasa 8b 16 0.61 --verify coarse-grained
llasa 1b 1 0.61 --verify coarse-grained
llasa 1b 64 0.61 --verify coarse-grained
run builtin-16 --draft-lengths 3 --verify exact --batches 16 --repeats 3
