"""The report of an evaluation: a table for the terminal, evaluation.json, and the table and picture that are drawn from it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxspec.common.files import replacing, write_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Console

_COLUMNS = {
    "row": ("system", "{}"),
    "wer": ("WER", "{:.1%}"),
    "wer_interval": ("WER, 95% CI", "{0[0]:.1%} to {0[1]:.1%}"),
    "cer": ("CER", "{:.1%}"),
    "similarity": ("speaker similarity", "{:.3f}"),
    "similarity_to_others": ("similarity to other voice", "{:.3f}"),
    "dnsmos": ("DNSMOS", "{:.2f}"),
    "dnsmos_signal": ("DNSMOS signal", "{:.2f}"),
    "distill_mos": ("Distill-MOS", "{:.2f}"),
    "duration_ratio": ("relative duration", "{:.2f}"),
    "acceptance_rate": ("acceptance rate", "{:.1%}"),
    "tokens_per_round": ("codes per round", "{:.2f}"),
    "exact_match_rate": ("accepted by exact too", "{:.1%}"),
    "same": ("same code as exact", "{:.1%}"),
    "distance": ("levels from exact", "{:.2f}"),
    "speed_up": ("speedup", "{:.2f}x"),
}
_KINDS = {"recorded": "#8c8c8c", "codes swapped": "#dd8452", "generated": "#4c72b0"}
_MARKERS = {"exact": "o", "tolerance": "s", "coarse-grained": "^", "block-exact": "D", "block-coarse-grained": "v"}


def table(rows: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """The texts of the table.

    Args:
        rows: see ``measures.measure``.

    Returns:
        the head of each column that some row has a value for, and its text in each row; '' where the row has none.
    """
    some = {name: column for name, column in _COLUMNS.items() if any(name in row for row in rows)}
    return {head: [form.format(row[name]) if name in row else "" for row in rows] for name, (head, form) in some.items()}


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table in Markdown.

    Args:
        rows: see ``measures.measure``.

    Returns:
        the lines of the table, without a final newline.
    """
    columns = table(rows)
    lines = [list(columns), ["---"] * len(columns), *zip(*columns.values(), strict=True)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def show(rows: Sequence[dict[str, Any]], console: "Console") -> None:
    """Prints the table.

    Args:
        rows: see ``measures.measure``.
        console: where to print it.
    """
    from rich.table import Table

    columns, whole = table(rows), [_COLUMNS[name][0] for name in ("row", "wer_interval")]
    shown = Table()
    for head in columns:
        shown.add_column(head, no_wrap=head in whole)
    for line in zip(*columns.values(), strict=True):
        shown.add_row(*line)
    console.print(shown)


def save(folder: Path, result: dict[str, Any]) -> None:
    """Writes evaluation.json, evaluation.md and evaluation.png, each written atomically.

    Args:
        folder: created if it does not exist.
        result: what ``compare.compare`` returns.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "evaluation.json", result)
    render(folder)


def render(folder: Path) -> None:
    """Writes evaluation.md and evaluation.png anew from the evaluation.json of a folder.

    Raises:
        OSError: the folder has no evaluation.json, or cannot be written to.
    """
    rows = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["rows"]
    with replacing(folder / "evaluation.md") as partial:
        partial.write_text(markdown(rows) + "\n")
    draw(folder / "evaluation.png", rows)


def draw(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draws the word error rate of each row with its interval, and word error rate against codes per round, as PNG.

    Args:
        path: the file to write.
        rows: see ``measures.measure``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.8), layout="constrained")
    bars, curve = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_rates(bars, rows)
    _draw_tradeoff(curve, rows)
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=110)


def _kind(name: str) -> str:
    if name in ("recordings", "codec reconstruction"):
        return "recorded"
    return "codes swapped" if name.startswith("swapped") else "generated"


def _draw_rates(axes: "Axes", rows: Sequence[dict[str, Any]]) -> None:
    from matplotlib.patches import Patch

    names, wer = [row["row"] for row in rows], [100 * row["wer"] for row in rows]
    low, high = zip(*([100 * bound for bound in row["wer_interval"]] for row in rows), strict=True)
    errors = [[w - bound for w, bound in zip(wer, low, strict=True)], [bound - w for w, bound in zip(wer, high, strict=True)]]
    axes.barh(names, wer, xerr=errors, color=[_KINDS[_kind(name)] for name in names], ecolor="#333333", capsize=2)
    for index, (rate, bound) in enumerate(zip(wer, high, strict=True)):
        axes.text(bound + 1.5, index, f"{rate:.1f}", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="word error rate (%) with 95% confidence interval; lower is better")
    axes.margins(x=0.08)
    axes.legend(handles=[Patch(color=color, label=kind) for kind, color in _KINDS.items()], loc="upper right", fontsize=8)


def _draw_tradeoff(axes: "Axes", rows: Sequence[dict[str, Any]]) -> None:
    for verifier, marker in _MARKERS.items():
        some = [row for row in rows if row["row"].split()[0] == verifier]
        if not some:
            continue
        points = sorted((row["tokens_per_round"], 100 * row["wer"], row["row"]) for row in some)
        axes.plot([x for x, _, _ in points], [y for _, y, _ in points], marker=marker, label=verifier)
        for x, y, name in points:
            axes.annotate(name.removeprefix(verifier).strip(), (x, y), xytext=(5, -9), textcoords="offset points", fontsize=8)
    plain = next((100 * row["wer"] for row in rows if row["row"] == "autoregressive"), None)
    if plain is not None:
        axes.axhline(plain, color="#888888", linestyle="--", linewidth=0.8, label="autoregressive (1 code per step)")
    axes.set(xlabel="codes per round; higher is faster", ylabel="word error rate (%)")
    axes.margins(x=0.1)
    axes.legend(fontsize=8)
