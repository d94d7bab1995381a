"""The command `groups`: the acoustic similarity groups of a converted checkpoint, built, kept and reported."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import tyro

from jaxspec import groups as asg
from jaxspec.checkpoint import pretrained
from jaxspec.commands.outputs import check_writable
from jaxspec.synthesis import converted


@dataclasses.dataclass(frozen=True)
class Groups:
    """Builds the acoustic similarity groups of a converted checkpoint, keeps them in its folder, and reports them."""

    model: tyro.conf.Positional[Path]
    """A folder that `jaxspec convert` made."""
    threshold: float = 0.4
    """The cosine above which two codes share a group."""
    plot: Path | None = None
    """A PNG of the histogram of their sizes."""
    json: bool = False
    """Print the report as one JSON object."""

    def run(self) -> None:
        """Builds."""
        print(build(self.model, self.threshold, self.plot, self.json))


def build(folder: Path, threshold: float, plot: Path | None, as_json: bool) -> str:
    """Builds the groups of a model, or takes those that its folder holds, and says what they look like.

    Raises:
        ValueError: the folder holds no language model, or the threshold is no cosine.
    """
    from rich.progress import Progress

    if plot:
        check_writable(plot)
    target = pretrained.load(folder)
    with Progress(transient=True) as progress:
        task = progress.add_task("groups")
        made = converted.groups(target, threshold, lambda done, of: progress.update(task, completed=done, total=of))
    report = summarize(made) | {"threshold": threshold, "file": str(converted.groups_path(target, threshold))}
    if plot:
        plot_sizes(made, plot)
    return json.dumps(report) if as_json else "\n".join(f"{name:24}{value}" for name, value in report.items())


def summarize(groups: asg.Groups) -> dict[str, float]:
    """What the groups look like: how many, how large, how often tokens are shared, and what they cost in memory."""
    sizes, count = np.asarray(groups.sizes), np.asarray(groups.token_count)
    alone = np.asarray(groups.members)[sizes == 1, 0]
    return {
        "tokens": count.size,
        "groups": sizes.size,
        "size_mean": float(sizes.mean()),
        "size_median": float(np.median(sizes)),
        "size_max": int(sizes.max()),
        "singletons": int((count[alone] == 1).sum()),
        "groups_per_token_mean": float(count.mean()),
        "groups_per_token_max": int(count.max()),
        "memory_bytes": sum(int(array.nbytes) for array in groups),
    }


def plot_sizes(groups: asg.Groups, path: str | os.PathLike) -> None:
    """Draws the histogram of the sizes of the groups as PNG."""
    from matplotlib.figure import Figure  # slow to import, and needed here alone

    sizes = np.asarray(groups.sizes)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.hist(sizes, bins=np.arange(0.5, sizes.max() + 1.5, max(1, sizes.max() // 60)), log=True)
    axes.set(xlabel="tokens in the group", ylabel="groups", title=f"{sizes.size:,} groups, mean size {sizes.mean():.1f}")
    figure.savefig(path, format="png", dpi=120)
