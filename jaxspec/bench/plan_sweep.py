"""Plans of a model on every mesh of a topology and of several batches, and the best of them.

All layers are compiled: the schedule is not linear in their number, as it hides the reading of weights that it fetches ahead, and
reads those of few layers in other ways.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxspec.bench import chips, plan
from jaxspec.bench.plan_shapes import DoesNotFitError, Settings, pair_of
from jaxspec.bench.roofline import expected_tokens
from jaxspec.common.files import replacing, write_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HEADS = ("mesh", "batch", "GB a chip", "step ms", "round ms", "all-reduces", "plain codes/s", "codes/s", "ms a code", "")

Row = Mapping[str, Any]


def cell(settings: Settings, acceptance: float) -> dict[str, Any]:
    """The figures of one mesh and batch.

    Args:
        settings: what to plan for.
        acceptance: of each drafted token, assumed.

    Returns:
        The settings that differ in a sweep, and of a plan that fits: "layers" of the target, "gb" of a device, "compile_s",
        "failing", the names of the checks that do not hold, "step_s" and "round_s", the estimates, "cycles" of both, whether
        there is a "clock" to make seconds of them, "all_reduces" of a round, "plain_codes_per_s" and "codes_per_s" of the whole
        batch, by plain steps and by the better loop, and "code_s", the time of a code of one row by the latter. Where there is no
        such plan, "why" says so, and "fits" is false if it takes too much memory.

    Raises:
        ValueError: a setting is out of its range.
        ImportError: libtpu is not installed.
    """
    settings.check()
    named = {name: getattr(settings, name) for name in ("model", "topology", "mesh", "batch")} | {"acceptance": acceptance}
    try:
        made = plan.plan(settings, prefill=False)
    except ValueError as error:
        return named | {"why": str(error), "fits": not isinstance(error, DoesNotFitError)}
    memory, step_s, round_s = made["memory"], made["step"]["estimate_s"], made["round"]["estimate_s"]
    named |= {"layers": made["target_layers"], "gb": memory["total"] / 1e9, "compile_s": made["compile_s"]}
    named |= {"failing": [name for name, check in made["checks"].items() if not check["holds"]]}
    if not memory["fits"]:
        return named | {"why": f"{memory['total'] / 1e9:.1f} GB of {memory['room'] / 1e9:.1f} GB", "fits": False}
    tokens = expected_tokens(acceptance, settings.draft_length)
    counted = made["round"]["collectives"]
    return named | {
        "step_s": step_s,
        "round_s": round_s,
        "cycles": [made["step"]["cycles"], made["round"]["cycles"]],
        "all_reduces": sum(counted[when].get("all-reduce", {}).get("count", 0) for when in ("always", "trip")),
        "plain_codes_per_s": settings.batch / step_s,
        "codes_per_s": settings.batch * max(1 / step_s, tokens / round_s),
        "code_s": min(step_s, round_s / tokens),
        "clock": made["round"]["cycles_s"] is not None,
    }


def meshes(settings: Settings) -> list[str]:
    """The meshes of all devices of the topology, from one that divides only the batch to one that divides only the weights.

    Those that do not divide the heads and the key/value heads evenly are left out.
    """
    count, target = len(chips.devices(settings.topology)), pair_of(settings).target
    models = [m for m in range(1, count + 1) if not any(n % m for n in (count, target.heads, target.kv_heads))]
    return [f"data={count // model},model={model}" for model in models]


def sweep(settings: Settings, batches: Sequence[int], acceptance: float, say: Callable[[str], None]) -> dict[str, Any]:
    """The cells of all meshes and batches.

    Args:
        settings: what to plan for; the mesh and the batch are those of each cell.
        batches: B of each column; a mesh whose data axis does not divide one is left out there.
        acceptance: of each drafted token, assumed.
        say: called with a line before each cell.

    Returns:
        "rows", and the indices in it of the "most_codes" a second and of the "least_wait" for a code; None where none fits.

    Raises:
        ValueError: a setting is out of its range, or no mesh and batch are left.
        ImportError: libtpu is not installed.
    """
    if not 0 <= acceptance <= 1:
        raise ValueError(f"expected an acceptance from 0 to 1, got {acceptance:g}: change --acceptance")
    rows = []
    for mesh in meshes(settings):
        for batch in batches:
            wanted = dataclasses.replace(settings, mesh=mesh, batch=batch)
            if batch % wanted.axes[0] == 0:
                say(f"{settings.model} on {settings.topology}: {mesh}, batch {batch}")
                rows.append(cell(wanted, acceptance))
    if not rows:
        raise ValueError(f"expected a batch that a mesh of {settings.topology} divides, got {list(batches)}: give --batches 1")
    fitting = [i for i, row in enumerate(rows) if "why" not in row]
    return {
        "rows": rows,
        "most_codes": max(fitting, key=lambda i: rows[i]["codes_per_s"], default=None),
        "least_wait": min(fitting, key=lambda i: rows[i]["code_s"], default=None),
    }


def table(result: Mapping[str, Any]) -> str:
    """The rows as a table of Markdown, the best ones marked, and what the figures rest on."""
    rows = result["rows"]
    notes = {result["most_codes"]: ["most codes a second"]}
    notes.setdefault(result["least_wait"], []).append("least time a code")
    lines = [_line(row, ", ".join(notes.get(i, []))) for i, row in enumerate(rows)]
    head = ["| " + " | ".join(_HEADS) + " |", "|" + " --- |" * len(_HEADS)]
    return "\n".join([*head, *lines, "", said_of(rows[0])])


def said_of(row: Row) -> str:
    """What the figures of a row rest on, in a sentence."""
    return f"Planned, not measured: an acceptance of {row['acceptance']:g} is assumed, and the latency of collectives is a guess."


def refusal(row: Row) -> str:
    """What a table says in place of the figures of a row that has none."""
    return f"refused: {row['why']}" if row["fits"] else "does not fit"


def _line(row: Row, note: str) -> str:
    start = f"| {row['mesh']} | {row['batch']} | "
    if "why" in row:
        return start + " | ".join(["", "", "", "", "", "", "", refusal(row)]) + " |"
    note = ", ".join([*([note] if note else []), *(f"FAILS: {name}" for name in row["failing"])])
    cells = f"{row['gb']:.2f}", f"{1e3 * row['step_s']:.2f}", f"{1e3 * row['round_s']:.2f}", str(row["all_reduces"])
    rates = f"{row['plain_codes_per_s']:,.0f}", f"{row['codes_per_s']:,.0f}", f"{1e3 * row['code_s']:.2f}"
    return start + " | ".join([*cells, *rates, note]) + " |"


def save(folder: Path, result: Mapping[str, Any]) -> None:
    """Writes sweep.json, sweep.md and sweep.png.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "sweep.json", result)
    with replacing(folder / "sweep.md") as partial:
        partial.write_text(table(result) + "\n", encoding="utf-8")
    with replacing(folder / "sweep.png") as partial:
        _draw(partial, result)


def _draw(path: Path, result: Mapping[str, Any]) -> None:
    """Codes a second over the time of a code: a line for each mesh through its batches, and the two best marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes: Axes = figure.subplots()
    rows = [row for row in result["rows"] if "why" not in row]
    for mesh in dict.fromkeys(row["mesh"] for row in rows):
        line = [row for row in rows if row["mesh"] == mesh]
        axes.plot([1e3 * row["code_s"] for row in line], [row["codes_per_s"] for row in line], "o-", label=mesh)
        for row in line:
            place = 1e3 * row["code_s"], row["codes_per_s"]
            axes.annotate(f"B={row['batch']}", place, xytext=(6, -10), textcoords="offset points", fontsize=8)
    for name, marker, label in (("most_codes", "s", "most codes a second"), ("least_wait", "D", "least time a code")):
        if result[name] is not None:
            row, shown = result["rows"][result[name]], {"marker": marker, "markersize": 15, "markerfacecolor": "none"}
            axes.plot(1e3 * row["code_s"], row["codes_per_s"], linestyle="", color="black", label=label, **shown)
    first = result["rows"][0]
    axes.set(xlabel="ms a code of one row", ylabel="codes a second of the batch", yscale="log")
    axes.set_title(f"{first['model']} on {first['topology']}\n{said_of(first)}", fontsize=9)
    axes.margins(0.15)
    axes.set_xlim(0, 1.06 * axes.get_xlim()[1])
    low, high = axes.get_ylim()
    ticks = [tick for tick in (m * 10.0**e for e in range(-1, 7) for m in (1, 2, 5)) if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(linewidth=0.3)
    if rows:
        figure.legend(loc="outside lower center", ncols=3, fontsize=8, markerscale=0.6, frameon=False)
    figure.savefig(path, format="png", dpi=110)
