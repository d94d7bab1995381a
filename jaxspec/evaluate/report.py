"""The comparison as a table for people, as JSON, and as a picture."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxspec.common.files import replacing

_COLUMNS = {
    "row": ("row", "{}"),
    "wer": ("WER", "{:.1%}"),
    "wer_interval": ("95 %", "{0[0]:.1%} to {0[1]:.1%}"),
    "cer": ("CER", "{:.1%}"),
    "similarity": ("likeness", "{:.3f}"),
    "similarity_to_others": ("to others", "{:.3f}"),
    "duration_ratio": ("length", "{:.2f}"),
    "acceptance_rate": ("acceptance", "{:.1%}"),
    "tokens_per_round": ("codes a round", "{:.2f}"),
    "exact_match_rate": ("exact too", "{:.1%}"),
    "speed_up": ("speed-up", "{:.2f}x"),
}


def cells(row: dict[str, Any]) -> list[str]:
    """One row as text, '' where it has no such figure."""
    return [form.format(row[name]) if name in row else "" for name, (_, form) in _COLUMNS.items()]


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table as the README shows it."""
    heads = [head for head, _ in _COLUMNS.values()]
    lines = [heads, ["---"] * len(heads), *map(cells, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Prints the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*(head for head, _ in _COLUMNS.values()))
    for row in rows:
        table.add_row(*cells(row))
    Console(width=160).print(table)


def save(folder: Path, result: dict[str, Any]) -> None:
    """Writes evaluation.json, evaluation.md and evaluation.png to a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "evaluation.json") as partial:
        partial.write_text(json.dumps(result, indent=1) + "\n")
    with replacing(folder / "evaluation.md") as partial:
        partial.write_text(markdown(result["rows"]) + "\n")
    draw(folder / "evaluation.png", result["rows"])


def draw(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Word error rate of each row with its interval, and word error rate against codes a round."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.6), layout="constrained")
    bars, curve = figure.subplots(1, 2, width_ratios=(3, 2))
    names, wer = [row["row"] for row in rows], [row["wer"] for row in rows]
    spread = [[w - row["wer_interval"][0] for w, row in zip(wer, rows, strict=True)]]
    spread.append([row["wer_interval"][1] - w for w, row in zip(wer, rows, strict=True)])
    bars.barh(names, wer, xerr=spread, color="#4c72b0", ecolor="#333333", capsize=2)
    bars.invert_yaxis()
    bars.set(xlabel="word error rate (pocketsphinx), 95 % interval")
    families = {"exact": "o", "tolerance": "s", "coarse-grained": "^"}
    for family, marker in families.items():
        some = [row for row in rows if row["row"].split()[0] == family]
        points = sorted((row["tokens_per_round"], row["wer"], row["row"]) for row in some)
        curve.plot([x for x, _, _ in points], [y for _, y, _ in points], marker=marker, label=family)
    plain = next((row["wer"] for row in rows if row["row"] == "autoregressive"), None)
    if plain is not None:
        curve.axhline(plain, color="#888888", linestyle="--", linewidth=0.8, label="autoregressive")
    curve.set(xlabel="codes a round", ylabel="word error rate")
    curve.legend()
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=110)
