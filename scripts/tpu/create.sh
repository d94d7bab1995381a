#!/usr/bin/env bash
# Queues for a TPU VM and waits until it is there: bash scripts/tpu/create.sh v5e-8 --zone ZONE [--name NAME] [--run] [--spot ...]
# The first argument is v5e, v5p or v6e, and the number of chips; further ones are gcloud's. It is billed until delete.sh.
set -euo pipefail
# shellcheck source=scripts/tpu/common.sh
source "$(dirname "$0")/common.sh"

wanted=${rest[0]:-nothing}
chips=${wanted#*-}
case $wanted in # Google counts the chips of v5e and v6e, and the cores of v5p, two of a chip
v5e-[1-9]*) type=v5litepod-$chips version=v2-alpha-tpuv5-lite ;;
v5p-[1-9]*) type=v5p-$((2 * chips)) version=v2-alpha-tpuv5 ;;
v6e-[1-9]*) type=v6e-$chips version=v2-alpha-tpuv6e ;;
*) fail "expected chips and their number, such as v5e-8, v5p-4 or v6e-8, got $wanted: give them first" ;;
esac

run gcloud compute tpus queued-resources create "$name" --node-id "$name" --zone "$zone" \
  --accelerator-type "$type" --runtime-version "$version" "${rest[@]:1}"
while true; do
  state=$(run gcloud compute tpus queued-resources describe "$name" --zone "$zone" --format 'value(state.state)')
  echo "$state"
  case $execute${state##*$'\n'} in
  yesFAILED | yesSUSPENDED) fail "expected chips, got a request that failed: run delete.sh, and try another zone" ;;
  yesACTIVE) break ;;
  yes*) sleep 30 ;;
  *) break ;;
  esac
done
