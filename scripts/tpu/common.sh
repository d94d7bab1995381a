# Sourced by the scripts of this folder: their arguments, and `run`, which prints a command and executes it only with --run.
# Every script takes --zone ZONE (needed), --name NAME (jaxspec), and --run; what else it takes is in "${rest[@]}".
# shellcheck shell=bash disable=SC2034  # those who source it use its variables

fail() {
  echo "$(basename "$0"): $1" >&2
  exit 2
}

((BASH_VERSINFO[0] >= 5)) || fail "expected bash 5 or later, got $BASH_VERSION: install one (macOS: brew install bash)"
name=jaxspec zone='' execute='' rest=()
while (($#)); do
  case $1 in
  --zone | --name)
    (($# > 1)) || fail "expected a value after $1, got none: give one"
    printf -v "${1#--}" %s "$2"
    shift
    ;;
  --run) execute=yes ;;
  *) rest+=("$1") ;;
  esac
  shift
done
[[ $zone ]] || fail "expected --zone, got none: give one that has these chips, such as us-west4-a"

quoted() { # words for a shell, in quotes only where they need them
  local word
  for word; do
    [[ $word =~ ^[[:alnum:]_./:,=~-]+$ ]] || word=${word@Q}
    printf '%s ' "$word"
  done
}

run() {
  quoted "$@"
  echo
  [[ ! $execute ]] || "$@"
}

on_workers() { # a command on every worker at once
  run gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker all --command "$1"
}
