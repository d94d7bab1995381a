"""The result of a benchmark as a table, JSON and Markdown."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from jaxspec.bench import picture
from jaxspec.common.files import replacing, write_json

if TYPE_CHECKING:
    from rich.table import Table

Row = Mapping[str, Any]


def _milliseconds(name: str) -> Callable[[Row], str]:
    return lambda row: f"{1e3 * row[name]:.2f}" if name in row else ""


def _percent(*names: str) -> Callable[[Row], str]:
    return lambda row: next((f"{row[name]:.0%}" for name in names if name in row), "")


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _method(row: Row) -> str:
    if "chosen" in row:
        return f"auto ({row['chosen']})"
    return f"{row['rule']} mirror {row['mirror']}" if row.get("mirror") else row["rule"]


def _ratio(name: str) -> Callable[[Row], str]:
    return lambda row: f"{row[name]:.2f}" if name in row else ""


def by_position(row: Row) -> list[float]:
    """How often each position was accepted in the rounds that accepted all positions before it.

    >>> by_position({"accepted_per_position": [0.5, 0.25, 0.0]})
    [0.5, 0.5, 0.0]
    """
    shares = row.get("accepted_per_position", [])
    return [share / before if before else 0.0 for share, before in zip(shares, [1.0, *shares], strict=False)]


COLUMNS: dict[str, Callable[[Row], str]] = {
    "draft": lambda row: row["draft"],
    "verifier": _method,
    "K": lambda row: str(row["draft_length"] or ""),
    "batch": lambda row: str(row["batch"]),
    "prompt": lambda row: str(row["prompt"] or "text"),
    "dtype": lambda row: row["dtype"],
    "prefill ms": _milliseconds("prefill_s"),
    "round ms": _milliseconds("round_s"),
    "draft ms": _milliseconds("draft_s"),
    "target ms": _milliseconds("target_s"),
    "verify ms": _milliseconds("verify_and_commit_s"),
    "codes/s": lambda row: _rate(row["codes_per_s"]),
    "spread": lambda row: "-".join(map(_rate, row["codes_per_s_spread"])),
    "accepted": _percent("acceptance_rate"),
    "reused": _percent("reused"),
    "codes/round": lambda row: f"{row['tokens_per_round']:.2f}",
    "speedup": lambda row: f"{row['speed_up']:.2f}x",
    "at roofline": lambda row: f"{row['ideal_speed_up']:.2f}x" if "ideal_speed_up" in row else "",
    "of roofline": _percent("roofline_target", "roofline_step"),
    "peak GB": lambda row: f"{row['peak_bytes'] / 1e9:.1f}",
    "compile s": lambda row: f"{row['compile_s']:.1f}" if row["compile_s"] else "",
    "recompiled": lambda row: str(row["compilations_after_warm_up"]),
}

# Of the drafts side by side; "/ step" is in plain steps that were timed beside it.
DRAFT_COLUMNS: dict[str, Callable[[Row], str]] = {
    **{name: COLUMNS[name] for name in ("draft", "verifier", "K", "batch", "prompt", "dtype")},
    "draft / step": _ratio("draft_over_step"),
    "round / step": _ratio("round_over_step"),
    "acceptance by position": lambda row: " ".join(f"{rate:.2f}" for rate in by_position(row)),
    "codes/round": COLUMNS["codes/round"],
    "accepted by exact": _percent("exact_match_rate"),
    "speedup": COLUMNS["speedup"],
}


def show(result: Mapping[str, Any], file: TextIO) -> None:
    """Prints the table and what it was measured on.

    Args:
        result: of ``suite.bench``.
        file: where to print.
    """
    from rich.console import Console

    console = Console(file=file, width=230)
    console.print(_table(title(result), COLUMNS, result["rows"]))
    console.print(_table("drafts", DRAFT_COLUMNS, drafted(result)))
    for peer in result.get("peers", []):
        line = (
            f"{peer['name']}: {peer['codes_per_s']:.1f} codes/s; jaxspec {peer['against']} is {peer['ratio']:.2f} times as fast"
        )
        print(line, file=file)


def _table(name: str, columns: Mapping[str, Callable[[Row], str]], rows: Sequence[Row]) -> "Table":
    from rich.table import Table

    table = Table(title=name)
    for column in columns:
        justify = "left" if column in ("draft", "verifier") else "right"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=column == "verifier")
    for row in rows:
        table.add_row(*(cell(row) for cell in columns.values()))
    return table


def drafted(result: Mapping[str, Any]) -> list[Row]:
    """The rows with a draft."""
    return [row for row in result["rows"] if row["draft_length"]]


def title(result: Mapping[str, Any]) -> str:
    """What was measured, in one line."""
    names = ("processor", "jax", "python", "commit")
    draft = f", draft {', '.join(result['drafts'])}"
    measured = ", ".join(f"{name} {result[name]}" for name in names)
    return f"{result['preset']}{draft}, {result['acceptance']} acceptance; {measured}"


def markdown(result: Mapping[str, Any]) -> str:
    """The tables in Markdown."""
    return f"{_markdown(COLUMNS, result['rows'])}\nDrafts:\n\n{_markdown(DRAFT_COLUMNS, drafted(result))}"


def _markdown(columns: Mapping[str, Callable[[Row], str]], rows: Sequence[Row]) -> str:
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(cell(row) for cell in columns.values()) for row in rows]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def save(folder: Path, result: Mapping[str, Any]) -> None:
    """Writes bench.json, bench.md and bench.png into a folder, each atomically.

    Args:
        folder: created where it does not exist.
        result: of ``suite.bench``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "bench.json", result)
    with replacing(folder / "bench.md") as partial:
        partial.write_text(f"{title(result)}\n\n{markdown(result)}", encoding="utf-8")
    with replacing(folder / "bench.png") as partial:
        picture.draw(result, title(result)).savefig(partial, format="png", dpi=110)
