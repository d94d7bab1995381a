"""The picture of a benchmark: speedup, parts of a round, throughput, and the share of the roofline."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxspec.bench.roofline import expected_tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

_PARTS = {"draft_s": "draft", "target_s": "target", "verify_and_commit_s": "verify and commit"}


def draw(result: Mapping[str, Any], title: str) -> "Figure":
    """Draws the four panels.

    Args:
        result: of ``suite.bench``.
        title: above them.
    """
    from matplotlib.figure import Figure

    rows = result["rows"]
    names = _Names(rows)
    drafted = [row for row in rows if row["draft_length"]]
    in_parts = [row for row in drafted if "draft_s" in row]  # not of a mirror, whose parts overlap
    compared = len({(row["draft"], row["draft_length"]) for row in drafted}) > 1
    figure = Figure(figsize=(14, max(8.0, 0.42 * len(rows) + 5) + 5 * compared), layout="constrained")
    axes = figure.subplots(2 + compared, 2)
    _speedups(axes[0, 0], rows, drafted, names)
    _parts(axes[0, 1], in_parts, names)
    if len({row["batch"] for row in rows}) > 1:
        _throughput_by_batch(axes[1, 0], rows, names)
    else:
        _throughput(axes[1, 0], rows, names)
    _roofline(axes[1, 1], rows, names)
    if compared:
        _by_length(axes[2, 0], in_parts, names, "tokens_per_round", "codes a round")
        _by_length(axes[2, 1], in_parts, names, "draft_over_step", "the draft's part of a round, in plain steps")
    figure.suptitle(title, fontsize=9)
    return figure


class _Names:
    """Names of rows, with only those of their fields that differ between the rows."""

    def __init__(self, rows: Sequence[Row]):
        self.differing = {name for name in ("batch", "prompt", "dtype") if len({row[name] for row in rows}) > 1}
        self.drafts = len({row["draft"] for row in rows if row["draft"]}) > 1

    def method(self, row: Row) -> str:
        """The draft where it differs, the rule with K, and the dtype where it differs."""
        name = f"{self._draft(row)}{row['rule']} K={row['draft_length']}" if row["draft_length"] else row["rule"]
        name += f" mirror {row['mirror']}" if row.get("mirror") else ""
        name += f" P={row['prompt']}" if "prompt" in self.differing else ""
        return name + (f" {row['dtype']}" if "dtype" in self.differing else "")

    def _draft(self, row: Row) -> str:
        return f"{Path(row['draft']).name} " if self.drafts else ""

    def line(self, row: Row) -> str:
        """The case without K."""
        shape = [f"{name[0].upper()}={row[name]}" for name in ("batch", "prompt", "dtype") if name in self.differing]
        return " ".join([f"{self._draft(row)}{row['rule']}", *shape])

    def case(self, row: Row) -> str:
        """The method, and the batch where it differs."""
        return self.method(row) + (f" B={row['batch']}" if "batch" in self.differing else "")


def _below(axes: "Axes", columns: int) -> None:
    """Puts the legend below the axes and their label, where it hides nothing."""
    from matplotlib.transforms import ScaledTranslation

    points = axes.transAxes + ScaledTranslation(0, -36 / 72, axes.figure.dpi_scale_trans)
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "bbox_transform": points}
    axes.legend(**place, ncols=columns, fontsize=7, frameon=False)


def _speedups(axes: "Axes", rows: Sequence[Row], drafted: Sequence[Row], names: _Names) -> None:
    """Measured points, and for each the curve that its measured times give at other acceptance rates."""
    from matplotlib import colormaps

    a = np.linspace(0, 1, 101)
    axes.set_prop_cycle(color=colormaps["tab20"](range(20)))
    for row in drafted:
        shape = ("autoregressive", row["batch"], row["prompt"], row["dtype"])
        plain = next(r for r in rows if (r["rule"], r["batch"], r["prompt"], r["dtype"]) == shape)
        expected = [expected_tokens(x, row["draft_length"]) for x in a]
        (line,) = axes.plot(a, [tokens * plain["round_s"] / row["round_s"] for tokens in expected], linewidth=1)
        at = np.interp(row["tokens_per_round"], expected, a)
        axes.plot(at, row["speed_up"], "o", color=line.get_color(), label=names.case(row))
    axes.axhline(1, color="grey", linewidth=0.8, linestyle="--")
    axes.set(title="speedup over autoregressive", xlabel="acceptance rate of each position", ylabel="speedup")
    _below(axes, 3)


def _parts(axes: "Axes", drafted: Sequence[Row], names: _Names) -> None:
    left = np.zeros(len(drafted))
    for part, label in _PARTS.items():
        width = np.array([1e3 * row[part] for row in drafted])
        axes.barh(range(len(drafted)), width, left=left, label=label)
        left = left + width
    rounds = [1e3 * row["round_s"] for row in drafted]
    axes.plot(rounds, range(len(drafted)), "k|", markersize=12, label="round in the loop")
    axes.set(title="a round and its parts", xlabel="ms")
    _name_rows(axes, drafted, names)
    _below(axes, 4)


def _by_length(axes: "Axes", drafted: Sequence[Row], names: _Names, value: str, title: str) -> None:
    """A line for each draft and rule over K."""
    from matplotlib import colormaps

    axes.set_prop_cycle(color=colormaps["tab20"](range(20)))
    for line in dict.fromkeys(map(names.line, drafted)):
        points = sorted((row["draft_length"], row[value]) for row in drafted if names.line(row) == line)
        axes.plot(*zip(*points, strict=True), "o-", label=line)
    axes.set(title=title, xlabel="K, codes drafted in a round", ylim=(0, None))
    axes.set_xticks(sorted({row["draft_length"] for row in drafted}))
    _below(axes, 3)


def _throughput(axes: "Axes", rows: Sequence[Row], names: _Names) -> None:
    """A bar for each row, with the spread over the repeats."""
    rates = np.array([row["codes_per_s"] for row in rows])
    low, high = np.array([row["codes_per_s_spread"] for row in rows]).T
    axes.barh(range(len(rows)), rates, xerr=[rates - low, high - rates], color="tab:cyan", capsize=3)
    axes.set(title=f"throughput at batch {rows[0]['batch']}, with the spread over the repeats", xlabel="codes/s")
    _name_rows(axes, rows, names)


def _throughput_by_batch(axes: "Axes", rows: Sequence[Row], names: _Names) -> None:
    batches = sorted({row["batch"] for row in rows})
    for method in dict.fromkeys(map(names.method, rows)):
        points = sorted((row["batch"], row["codes_per_s"]) for row in rows if names.method(row) == method)
        axes.plot(*zip(*points, strict=True), "x--" if method.startswith("auto ") or method == "auto" else "o-", label=method)
    axes.set(title="throughput", xlabel="batch", ylabel="codes/s", xscale="log", yscale="log")
    axes.set_xticks(batches, map(str, batches))
    axes.minorticks_off()
    low, high = axes.get_ylim()
    ticks = [tick for tick in (m * 10.0**e for e in range(-1, 7) for m in (1, 2, 5)) if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    _below(axes, 3)


def _roofline(axes: "Axes", rows: Sequence[Row], names: _Names) -> None:
    """Removes the panel where no row has a share."""
    kinds = {"roofline_step": ("a plain step", "tab:grey"), "roofline_target": ("the target's pass of a round", "tab:blue")}
    rows = [row for row in rows if kinds.keys() & row.keys()]
    if not rows:
        axes.remove()
        return
    for name, (label, color) in kinds.items():
        axes.barh(range(len(rows)), [row.get(name, 0.0) for row in rows], color=color, label=label)
    axes.axvline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set(title="share of the roofline", xlabel="least time at the best measured rates / measured time")
    axes.set_xlim(0, max(1.05, axes.get_xlim()[1]))
    _name_rows(axes, rows, names)
    _below(axes, 2)


def _name_rows(axes: "Axes", rows: Sequence[Row], names: _Names) -> None:
    axes.set_yticks(range(len(rows)), map(names.case, rows), fontsize=7)
    axes.invert_yaxis()
