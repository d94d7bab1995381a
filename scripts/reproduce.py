"""Measures the tables and figures of the two papers on the built-in voice: python scripts/reproduce.py --quick | --full.

Writes papers.json, papers.md and papers.png to --out. PCG (arXiv 2511.13732): tables 1 to 3, figures 3 and 4; SSD (arXiv
2505.15380): the table of tolerances. Needs flite and the extra eval, as `jaxspec evaluate` does.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxspec.bench.settings import Settings
from jaxspec.bench.suite import bench
from jaxspec.common.files import replacing, write_json
from jaxspec.evaluate.compare import compare
from jaxspec.evaluate.plan import Plan

BETAS = (0.1, 0.2, 0.3, 0.4)
THRESHOLDS = (0.7, 0.8, 0.85, 0.9)
CODEC_THRESHOLDS = (0.9, 0.95, 0.98)
LENGTHS = (1, 2, 3, 4, 5, 6, 7)
RULES = ("exact", "tolerance", "coarse-grained", "block-exact", "block-coarse-grained", "block-tolerance")
Rows = Sequence[dict[str, Any]]


def plans(quick: bool) -> dict[str, Plan]:
    """What is evaluated: the voice's own draft, n-grams in its place, and groups from the codec's code vectors."""
    size: dict[str, Any] = {"sentences": 24, "seeds": 1} if quick else {"seeds": 3}
    own = Plan(betas=BETAS, thresholds=THRESHOLDS, blocks=True, **size)
    return {
        "own draft": own,
        "n-grams": dataclasses.replace(own, draft="ngram"),
        "codec groups": dataclasses.replace(own, betas=(), thresholds=CODEC_THRESHOLDS, blocks=False, matrix="codec"),
    }


def measure(quick: bool) -> dict[str, Any]:
    """All measurements, with the environment of the benchmark."""

    def said(name: str, what: str, done: int, total: int) -> None:
        print(f"{name}: {what}, {done} of {total}", file=sys.stderr)

    quality = {}
    for name, plan in plans(quick).items():
        quality[name] = compare(plan, lambda what, done, total, name=name: said(name, what, done, total))
    settings = Settings(verify=("exact", "coarse-grained"), draft_lengths=LENGTHS, repeats=3 if quick else 9)
    return {"quality": quality, "speed": bench(settings, lambda line: print(line, file=sys.stderr))}


def _select(rows: Rows, *names: str) -> Rows:
    """The rows whose name begins with one of some words."""
    return [row for row in rows if row["row"].split(" ")[0] in names]


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (heads, ["---"] * len(heads), *lines))


def _quality(rows: Rows) -> str:
    heads = ["system", "speedup", "WER", "95% CI", "CER", "similarity", "codes a round"]
    lines = []
    for row in rows:
        speed, tokens = (f"{row[name]:.2f}" if name in row else "" for name in ("speed_up", "tokens_per_round"))
        low, high = row["wer_interval"]
        rates = f"{row['wer']:.1%}", f"{low:.1%} to {high:.1%}", f"{row['cer']:.1%}", f"{row['similarity']:.3f}"
        lines.append([row["row"], speed, *rates, tokens])
    return _table(heads, lines)


def _swapped(rows: Rows) -> str:
    (plain,) = (row for row in rows if row["row"] == "autoregressive")
    lines = []
    for row in _select(rows, "swapped"):
        worse = f"{row['wer'] - plain['wer']:+.1%}", f"{row['similarity'] - plain['similarity']:+.3f}"
        lines.append([row["row"].split()[-1], f"{row['group_size']:.1f}", f"{row['swapped']:.1%}", *worse])
    return _table(["threshold", "codes in a group", "codes swapped", "WER, difference", "similarity, difference"], lines)


def _lengths(rows: Rows) -> str:
    by_rule = {(row["rule"], row["draft_length"]): row["speed_up"] for row in rows}
    lines = [[rule, *(f"{by_rule[rule, length]:.2f}" for length in LENGTHS)] for rule in ("exact", "coarse-grained")]
    return _table(["speedup", *(f"K = {length}" for length in LENGTHS)], lines)


def markdown(result: dict[str, Any]) -> str:
    """The report."""
    quality, speed = result["quality"], result["speed"]
    own, codec = quality["own draft"]["rows"], quality["codec groups"]["rows"]
    asked = quality["own draft"]
    parts = [
        "# The papers' tables, on the built-in voice",
        f"{asked['sentences']} held-out sentences, {asked['seeds']} seeds, {asked['recognizer']}; {speed['processor']}, "
        f"jax {asked['jax']}, Python {asked['python']}, commit {speed['commit']}. Intervals: bootstrap over sentences.",
        "## Rules side by side (PCG, table 1; SSD, table of tolerances)",
        _quality(_select(own, "recordings", "codec", "autoregressive", *RULES)),
        "## Codes swapped within their groups (PCG, table 2)",
        _swapped(own),
        "## Groups from the codec's code vectors (PCG, table 3 compares two ways to build groups)",
        _quality(_select(codec, "coarse-grained")),
        "## Speedup by draft length (PCG, figure 4)",
        _lengths(speed["rows"]),
        "## N-grams in place of the draft",
        _quality(_select(quality["n-grams"]["rows"], *RULES)),
        "![Speedup and codes a round against word errors (PCG, figure 3)](papers.png)",
    ]
    return "\n\n".join(parts) + "\n"


def draw(path: Path, result: dict[str, Any]) -> None:
    """The frontier: speedup, and codes a round, against word error rate, for every rule and draft."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for index, (name, found) in enumerate(result["quality"].items()):
        for marker, rule in zip("os^Dv<", RULES, strict=True):
            rows = _select(found["rows"], rule)
            for axes, column in zip(panels, ("speed_up", "tokens_per_round"), strict=True):
                points = sorted((row[column], 100 * row["wer"]) for row in rows)
                if points:
                    style = {"color": f"C{index}", "marker": marker, "linewidth": 0.8}
                    axes.plot(*zip(*points, strict=True), **style, label=f"{rule}, {name}")
    (plain,) = (row for row in result["quality"]["own draft"]["rows"] if row["row"] == "autoregressive")
    for axes, label in zip(panels, ("speedup over the plain loop", "codes a round"), strict=True):
        axes.axhline(100 * plain["wer"], color="#888888", linestyle="--", linewidth=0.8)
        axes.axvline(1, color="#888888", linestyle="--", linewidth=0.8)
        axes.set(xlabel=f"{label}; right is faster", ylabel="word error rate (%)")
    panels[1].legend(fontsize=7, loc="upper right")
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=110)


def main() -> None:
    """Measures, and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--quick", action="store_true", help="24 sentences, one seed")
    size.add_argument("--full", action="store_true", help="200 sentences, three seeds")
    parser.add_argument("--out", type=Path, default=Path("results/papers"))
    parser.add_argument("--render", action="store_true", help="write the report again from papers.json, without measuring")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "papers.json"
    if not arguments.render:
        write_json(path, measure(arguments.quick))
    result = json.loads(path.read_text(encoding="utf-8"))
    with replacing(arguments.out / "papers.md") as partial:
        partial.write_text(markdown(result), encoding="utf-8")
    draw(arguments.out / "papers.png", result)


if __name__ == "__main__":
    main()
