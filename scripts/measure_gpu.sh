#!/usr/bin/env bash
# Measures jaxspec on one GPU, without the network, in less than nine minutes: bash scripts/measure_gpu.sh OUT
# Real shapes with random weights (LLaSA-8B, LLaSA-1B), and the built-in voice, which is trained. Each folder of OUT has bench.json,
# bench.md and bench.png. What there is no time for is said, and is quick in a second run, which finds the programs compiled. Needs
# the extra cuda: pip install -e '.[cuda]'
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
python "$(dirname "$0")/block_lengths.py" | tee "$out/block_lengths.txt"
llasa 8b 1 0.61 --verify exact coarse-grained # compiling it took 173 s on an H200 with a cold cache
run builtin --draft-lengths 3 --verify exact block-coarse-grained --repeats 3
llasa 8b 64 0.61 --verify coarse-grained
llasa 8b 1 0.75 --verify exact coarse-grained
llasa 1b 1 0.61 --verify coarse-grained
llasa 1b 64 0.61 --verify coarse-grained
