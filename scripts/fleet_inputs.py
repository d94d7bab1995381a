"""Makes the inputs of simulate_fleet.py: what plans say of steps and rounds by batch, and how long sentences are.

    python scripts/fleet_inputs.py costs --model llasa-1b --topology v5e:2x2 --batches 1 4 8 16 32 --out results/fleet/a.json
    python scripts/fleet_inputs.py durations --out results/fleet/durations.json

Each batch size is one run of `jaxspec plan --json`, one after another, so that memory stays that of one compilation. Durations
are those of the held-out sentences as the built-in voice speaks them. Both files say the command, the versions and the commit.
"""

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import soundfile

from jaxspec.bench import suite
from jaxspec.common.files import write_json
from jaxspec.text.held_out import held_out

KEPT = ("batch", "draft_length", "cells", "prompt_length", "dtype", "target_layers", "draft_layers", "device")
PROGRAMS = ("prefill", "step", "round")


def jaxspec(*arguments: str) -> str:
    """The standard output of a command of this tree.

    Raises:
        SystemExit: it fails.
    """
    run = subprocess.run([sys.executable, "-m", "jaxspec.commands.main", *arguments], stdout=subprocess.PIPE, text=True)
    if run.returncode:
        sys.exit(run.returncode)
    return run.stdout


def about(command: str) -> dict[str, str]:
    """How a result was made: the command, the versions and the commit."""
    return {"command": command, "commit": suite.commit()} | {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}


def costs(model: str, topology: str, batches: Sequence[int]) -> dict[str, Any]:
    """The plans of a model on one chip, for each batch size."""
    plans = []
    for batch in sorted(batches):
        print(f"batch {batch}", file=sys.stderr, flush=True)
        plan = json.loads(jaxspec("plan", "--model", model, "--topology", topology, "--batch", str(batch), "--json"))
        memory = {name: plan["memory"][name] for name in ("total", "room")}
        plans.append({name: plan[name] for name in (*KEPT, *PROGRAMS)} | {"memory": memory})
    command = f"jaxspec plan --model {model} --topology {topology} --batch B --json"
    return about(command) | {"model": model, "topology": topology, "plans": plans}


def durations() -> dict[str, Any]:
    """The seconds of speech of each held-out sentence."""
    with tempfile.TemporaryDirectory() as folder:
        texts, out = Path(folder) / "texts.txt", Path(folder) / "out"
        texts.write_text("\n".join(held_out()), encoding="utf-8")
        jaxspec("say", "--file", str(texts), "--out-dir", str(out), "--verify", "autoregressive")
        seconds = [round(soundfile.info(path).duration, 3) for path in sorted(out.glob("*.wav"))]
    command = "jaxspec say --file jaxspec/text/held_out.txt --out-dir OUT --verify autoregressive"
    return about(command) | {"seconds": seconds}


def main() -> None:
    """Makes one of the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    planned, spoken = kinds.add_parser("costs"), kinds.add_parser("durations")
    planned.add_argument("--model", required=True)
    planned.add_argument("--topology", required=True)
    planned.add_argument("--batches", type=int, nargs="+", required=True)
    for kind in (planned, spoken):
        kind.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    made = durations() if asked.kind == "durations" else costs(asked.model, asked.topology, asked.batches)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(asked.out, made)


if __name__ == "__main__":
    main()
