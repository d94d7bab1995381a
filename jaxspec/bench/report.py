"""The result of a benchmark as a table for people, JSON, and plots."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxspec.bench.roofline import expected_tokens
from jaxspec.common.files import replacing

Row = Mapping[str, Any]


def _seconds(name: str) -> Callable[[Row], str]:
    return lambda row: f"{1e3 * row[name]:.2f}" if name in row else ""


def _percent(name: str) -> Callable[[Row], str]:
    return lambda row: f"{row[name]:.0%}" if name in row else ""


def _share(row: Row) -> float:
    return row["roofline_target"] if row["draft_length"] else row["roofline_step"]


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "verifier": lambda row: f"auto ({row['taken']})" if "taken" in row else row["rule"],
    "K": lambda row: str(row["draft_length"] or ""),
    "batch": lambda row: str(row["batch"]),
    "prompt": lambda row: str(row["prompt"]),
    "type": lambda row: row["dtype"],
    "prefill ms": _seconds("prefill_s"),
    "round ms": _seconds("round_s"),
    "draft": _seconds("draft_s"),
    "target": _seconds("target_s"),
    "verify": _seconds("settle_s"),
    "codes/s": lambda row: _rate(row["codes_per_s"]),
    "spread": lambda row: "-".join(map(_rate, row["codes_per_s_spread"])),
    "codes a round": lambda row: f"{row['tokens_per_round']:.2f}",
    "speed-up": lambda row: f"{row['speed_up']:.2f}x",
    "at the bound": lambda row: f"{row['ideal_speed_up']:.2f}x" if "ideal_speed_up" in row else "",
    "of the bound": lambda row: f"{_share(row):.0%}" if row["rule"] != "auto" else "",
    "peak GB": lambda row: f"{row['peak_bytes'] / 1e9:.1f}",
    "compile s": lambda row: f"{row['compile_s']:.1f}",
    "recompiled": lambda row: str(row["compilations_after_warm_up"]),
}


def show(result: Mapping[str, Any]) -> None:
    """Prints the table, and what it was measured on."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title(result))
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "verifier" else "right")
    for row in result["rows"]:
        table.add_row(*(cell(row) for cell in COLUMNS.values()))
    Console(width=220).print(table)
    for peer in result.get("peers", []):
        print(
            f"{peer['name']}: {peer['codes_per_s']:.1f} codes/s; jaxspec {peer['against']} is {peer['ratio']:.2f} times as fast"
        )


def title(result: Mapping[str, Any]) -> str:
    """What was measured, in a line."""
    names = ("processor", "jax", "python", "commit")
    return f"{result['preset']}, {result['acceptance']} acceptance; " + ", ".join(f"{name} {result[name]}" for name in names)


def markdown(result: Mapping[str, Any]) -> str:
    """The table for a README."""
    lines = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS)]
    lines += [" | ".join(cell(row) for cell in COLUMNS.values()) for row in result["rows"]]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def save(folder: Path, result: Mapping[str, Any]) -> None:
    """Writes bench.json, bench.md and bench.png into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "bench.json") as partial:
        partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    with replacing(folder / "bench.md") as partial:
        partial.write_text(f"{title(result)}\n\n{markdown(result)}", encoding="utf-8")
    _plot(folder / "bench.png", result)


def _plot(path: Path, result: Mapping[str, Any]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    drafted = [row for row in result["rows"] if row["draft_length"]]
    _speed_ups(axes[0, 0], result["rows"], drafted)
    _parts(axes[0, 1], drafted)
    _throughput(axes[1, 0], result["rows"])
    _bounds(axes[1, 1], result["rows"])
    figure.suptitle(title(result), fontsize=9)
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=110)


def _label(row: Row) -> str:
    return (
        f"{row['rule']} K={row['draft_length']} b={row['batch']} {row['dtype']}"
        if row["draft_length"]
        else f"plain b={row['batch']}"
    )


def _speed_ups(axes: Any, rows: Sequence[Row], drafted: Sequence[Row]) -> None:
    """Measured points, and for each the curve that its own parts give at other acceptances."""
    a = np.linspace(0, 1, 101)
    for row in drafted:
        shape = ("autoregressive", row["batch"], row["prompt"], row["dtype"])
        plain = next(r for r in rows if (r["rule"], r["batch"], r["prompt"], r["dtype"]) == shape)
        curve = [expected_tokens(x, row["draft_length"]) * plain["round_s"] / row["round_s"] for x in a]
        (line,) = axes.plot(a, curve, linewidth=1)
        at = np.interp(row["tokens_per_round"], [expected_tokens(x, row["draft_length"]) for x in a], a)
        axes.plot(at, row["speed_up"], "o", color=line.get_color(), label=_label(row))
    axes.axhline(1, color="grey", linewidth=0.8, linestyle="--")
    axes.set(xlabel="acceptance of a position", ylabel="speed-up over autoregressive")
    axes.legend(fontsize=7)


def _parts(axes: Any, drafted: Sequence[Row]) -> None:
    left = np.zeros(len(drafted))
    for name in ("draft", "target", "settle"):
        width = np.array([1e3 * row[f"{name}_s"] for row in drafted])
        axes.barh(range(len(drafted)), width, left=left, label={"settle": "verify and commit"}.get(name, name))
        left = left + width
    axes.plot([1e3 * row["round_s"] for row in drafted], range(len(drafted)), "k|", markersize=14, label="a round in the loop")
    axes.set(yticks=range(len(drafted)), yticklabels=[_label(row) for row in drafted], xlabel="ms")
    axes.tick_params(axis="y", labelsize=7)
    axes.legend(fontsize=7)


def _throughput(axes: Any, rows: Sequence[Row]) -> None:
    names = list(dict.fromkeys((row["rule"], row["draft_length"], row["dtype"]) for row in rows))
    for name in names:
        some = sorted(
            (row["batch"], row["codes_per_s"]) for row in rows if (row["rule"], row["draft_length"], row["dtype"]) == name
        )
        axes.plot(*zip(*some, strict=True), "o-", label=f"{name[0]} K={name[1]} {name[2]}", alpha=0.6)
    axes.set(xlabel="batch", ylabel="codes/s", xscale="log", yscale="log")
    axes.legend(fontsize=7)


def _bounds(axes: Any, rows: Sequence[Row]) -> None:
    rows = [row for row in rows if row["rule"] != "auto"]
    axes.barh(range(len(rows)), list(map(_share, rows)))
    axes.set(
        yticks=range(len(rows)),
        yticklabels=[_label(row) for row in rows],
        xlabel="of the bound: a plain step, or the scoring of a round",
    )
    axes.tick_params(axis="y", labelsize=7)
    axes.axvline(1, color="grey", linewidth=0.8, linestyle="--")
