"""The picture of a draft's training: loss, acceptance by position, tokens of a round and predicted speed-up, over the steps."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxspec.common.files import replacing
from jaxspec.train import log as logs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURE = "training.png"


def draw(directory: Path) -> None:
    """Draws ``training.png`` from ``log.jsonl``. A log without rows gives no picture."""
    from matplotlib.figure import Figure

    rows = logs.read(directory)
    if not rows:
        return
    measured = [row for row in rows if "acceptance_exact" in row]
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    axes[0, 0].plot([row["step"] for row in rows], [row["loss"] for row in rows], linewidth=0.8, color="tab:blue")
    axes[0, 0].set(title="loss on training rows")
    _lines(axes[0, 1], measured, "acceptance", "acceptance of position k, held out", "k = {}")
    _lines(axes[1, 0], measured, "tokens", "tokens of a round, held out", "K = {}")
    _lines(axes[1, 1], measured, "speed_up", "predicted speed-up at batch 1", "K = {}")
    axes[1, 1].axhline(1, color="grey", linewidth=0.8, linestyle="--")
    for panel in axes.flat:
        panel.set(xlabel="step")
        panel.grid(alpha=0.3)
    with replacing(directory / PICTURE) as partial:
        figure.savefig(partial, format="png", dpi=110)


def _lines(axes: "Axes", rows: Sequence[dict[str, Any]], name: str, title: str, label: str) -> None:
    """A solid line for each shown K by the exact rule, a dashed one of the same colour on groups."""
    axes.set(title=title)
    if not rows:
        return
    shown = [k for k in (1, 2, 3, 5, 8) if k <= len(rows[0][f"{name}_exact"])]
    for index, k in enumerate(shown):
        for rule, style in (("exact", "-"), ("groups", "--")):
            values = [row[f"{name}_{rule}"][k - 1] for row in rows]
            text = label.format(k) if rule == "exact" else None
            axes.plot([row["step"] for row in rows], values, style, linewidth=1, color=f"C{index}", label=text, marker=".")
    axes.plot([], [], "k-", linewidth=1, label="exact")
    axes.plot([], [], "k--", linewidth=1, label="groups")
    axes.legend(fontsize=7, frameon=False, ncols=2)
