"""The log of a training run: JSON lines, its picture, and the lock that keeps a second trainer out of the folder."""

import contextlib
import fcntl
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxspec.common import hosts
from jaxspec.common.files import replacing

LOG = "log.jsonl"


def write(directory: Path, done: int, steps: int, metrics: Mapping[str, Any], step_s: float) -> str:
    """Appends a row to ``log.jsonl``, on the first host; the same as a line for people, lists left out."""
    row = {"step": done, "step_s": round(step_s, 4), **{name: _rounded(value) for name, value in metrics.items()}}
    if hosts.is_first():
        with (directory / LOG).open("a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")
    shown = {name: value for name, value in row.items() if name not in ("step", "step_s") and isinstance(value, float)}
    text = "  ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in shown.items())
    return f"step {done}/{steps}  {text}  {step_s:.2f} s per step, {(steps - done) * step_s / 60:.0f} min left"


def _rounded(value: Any) -> Any:
    return [round(float(one), 5) for one in value] if np.ndim(value) else round(float(value), 5)


def read(directory: Path) -> list[dict[str, Any]]:
    """The rows of a log; a last line that was cut off by a crash is left out."""
    path, rows = directory / LOG, []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def cut(directory: Path, step: int) -> None:
    """Removes the rows after a step: they are written again by the run that resumes from its checkpoint."""
    rows = read(directory)
    kept = [row for row in rows if row["step"] <= step]
    if len(kept) < len(rows) or (directory / LOG).exists():
        with replacing(directory / LOG) as partial:
            partial.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")


def plot(directory: Path) -> None:
    """Draws ``loss.png`` from ``log.jsonl``, a panel for each metric. A log without rows gives no picture."""
    from matplotlib.figure import Figure

    rows = read(directory)
    if not rows:
        return
    names = [name for name in rows[0] if name not in ("step", "step_s")]
    figure = Figure(figsize=(3.2 * len(names), 3), layout="constrained")
    for index, name in enumerate(names):
        axes = figure.add_subplot(1, len(names), index + 1)
        axes.plot([row["step"] for row in rows], [row[name] for row in rows], linewidth=0.8)
        axes.set(title=name, xlabel="step")
        axes.grid(alpha=0.3)
    with replacing(directory / "loss.png") as partial:
        figure.savefig(partial, format="png", dpi=110)


@contextlib.contextmanager
def locked(directory: Path, name: str = "lock") -> Iterator[None]:
    """Holds a folder for this process, by a file of this name; of several hosts the first one holds it.

    Raises:
        ValueError: another process holds it.
    """
    if not hosts.is_first():
        yield
        return
    with (directory / name).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"expected a folder in which nobody else trains, got {directory}: wait until the other run has ended"
            ) from error
        yield
