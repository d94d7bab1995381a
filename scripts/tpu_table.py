"""Writes results/tpu.md, planned speeds of the benchmarked pairs on slices of TPUs: python scripts/tpu_table.py [--cells N].

Each cell is planned once and kept as JSON under results/tpu/, so that the script goes on where it was stopped; delete a file to
plan its cell again. The cells that are not planned yet are listed as such. Nothing is measured.
"""

import argparse
import importlib.metadata
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxspec.bench import plan_sweep, suite
from jaxspec.bench.plan_shapes import Settings, pair_of
from jaxspec.common.files import replacing, write_json

ROOT = Path(__file__).parents[1]
MODELS = {"llasa-8b": "LLaSA-8B", "llasa-3b": "LLaSA-3B", "llasa-1b": "LLaSA-1B", "cosyvoice2": "CosyVoice 2"}
SLICES = {  # topology, and how many of its chips
    "v5e-4": ("v5e:2x2", 4),
    "v5e-1": ("v5e:2x2", 1),
    "v5e-8": ("v5e:2x4", 8),
    "v5p-4": ("v5p:2x2x1", 4),
    "v6e-4": ("v6e:2x2", 4),
    "v6e-8": ("v6e:2x4", 8),
}
BATCHES = (1, 8, 64)
ACCEPTANCE = 0.75

HEADS = (
    "model",
    "slice",
    "mesh",
    "batch",
    "GB a chip",
    "step ms",
    "round ms",
    "codes/s, plain",
    "codes/s",
    "ms a code",
)


class Cell(NamedTuple):
    """One row of the table."""

    model: str
    slice: str
    batch: int

    @property
    def path(self) -> Path:
        """Where its figures are kept."""
        return ROOT / "results" / "tpu" / f"{self.model}-{self.slice}-{self.batch}.json"


def cells() -> Iterator[Cell]:
    """All cells, the smaller batches first, which compile sooner."""
    for batch, slice_, model in itertools.product(BATCHES, SLICES, MODELS):
        yield Cell(model, slice_, batch)


def settings_of(cell: Cell) -> Settings:
    """What to plan: the weights divided over as many chips as the heads allow, and the batch over the rest."""
    topology, count = SLICES[cell.slice]
    target = pair_of(Settings(cell.model, topology)).target
    model = math.gcd(count, target.kv_heads, target.heads)
    data = math.gcd(count // model, cell.batch)
    return Settings(cell.model, topology, mesh=f"data={data},model={model}", batch=cell.batch)


def versions() -> dict[str, str]:
    """Of jax, its TPU compiler, and this repository."""
    return {name: importlib.metadata.version(name) for name in ("jax", "libtpu")} | {"commit": suite.commit()}


def fill(most: int | None) -> None:
    """Plans the cells that are missing, at most so many."""
    made_with = versions()
    for cell in itertools.islice((cell for cell in cells() if not cell.path.exists()), most):
        print(*cell, flush=True)
        cell.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(cell.path, plan_sweep.cell(settings_of(cell), ACCEPTANCE) | made_with)


def table() -> str:
    """The page."""
    made = {cell: json.loads(cell.path.read_text()) for cell in sorted(cells()) if cell.path.exists()}
    said = sorted({tuple(row[name] for name in ("jax", "libtpu", "commit")) for row in made.values()})
    lines = [
        "# Planned speeds on TPUs",
        "",
        "**Planned, not measured**: `python scripts/tpu_table.py` compiles the decode loops for chips that are not attached. In",
        f"bfloat16, K = 3, a cache of 2,048 cells, an acceptance of {ACCEPTANCE:g} (assumed), the draft of each pair: 3 of the",
        "target's layers, 8 of CosyVoice 2's. Weights are divided over as many chips as heads allow, the batch over the rest.",
        "A time is the larger of the bandwidth bound and the compiler's schedule, 2 us for each collective (a guess), and its",
        "bytes on the links. The clock of a v6e is not published: its times (*) are the bound and the collectives alone. Codes/s",
        "are those of the whole batch by the faster loop.",
        "",
        *(f"jax {jax_}, libtpu {libtpu}, commit {commit}." for jax_, libtpu, commit in said),
        "",
        "| " + " | ".join(HEADS) + " |",
        "|" + " --- |" * len(HEADS),
        *(_line(cell, row) for cell, row in made.items()),
    ]
    missing = [f"{MODELS[cell.model]} on {cell.slice} at {cell.batch}" for cell in cells() if cell not in made]
    return "\n".join([*lines, *(["", "Not planned yet: " + ", ".join(missing) + "."] if missing else [])]) + "\n"


def _line(cell: Cell, row: Mapping[str, Any]) -> str:
    start = MODELS[cell.model], cell.slice, row["mesh"], str(cell.batch)
    if "why" in row:
        return "| " + " | ".join([*start, plan_sweep.refusal(row), "", "", "", "", ""]) + " |"
    mark = "" if row["clock"] else "*"
    times = f"{row['gb']:.2f}", f"{1e3 * row['step_s']:.2f}{mark}", f"{1e3 * row['round_s']:.2f}{mark}"
    rates = f"{row['plain_codes_per_s']:,.0f}{mark}", f"{row['codes_per_s']:,.0f}{mark}", f"{1e3 * row['code_s']:.2f}{mark}"
    failing = f" (fails: {', '.join(row['failing'])})" if row["failing"] else ""
    return "| " + " | ".join([*start, *times, *rates]) + failing + " |"


def main() -> None:
    """Plans what is missing and writes the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cells", type=int, help="plan at most so many cells now; 0 only writes the page")
    wanted = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    try:
        fill(wanted.cells)
    finally:
        with replacing(ROOT / "results" / "tpu.md") as partial:
            partial.write_text(table(), encoding="utf-8")


if __name__ == "__main__":
    main()
