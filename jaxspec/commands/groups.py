"""The command `groups`: builds the acoustic similarity groups of a converted checkpoint, saves and reports them."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from jaxspec import groups as asg
from jaxspec.checkpoint import pretrained
from jaxspec.commands.console import progress_bar, report
from jaxspec.commands.outputs import check_picture
from jaxspec.synthesis import converted


@dataclasses.dataclass(frozen=True)
class Groups:
    """Builds the acoustic similarity groups of a converted checkpoint, saves them in its folder, and reports them."""

    model: tyro.conf.Positional[Path]
    """A folder that `jaxspec convert` made."""
    threshold: float = 0.4
    """The cosine above which two codes share a group."""
    plot: Path | None = None
    """A PNG with a histogram of the group sizes."""
    json: bool = False
    """Print one JSON object on standard output, and the table on standard error."""

    def run(self) -> None:
        """Builds."""
        result = build(self.model, self.threshold, self.plot)
        report("\n".join(f"{name:24}{value}" for name, value in result.items()), result, self.json)


def build(folder: Path, threshold: float, plot: Path | None) -> dict[str, Any]:
    """Builds the groups of a model, or reads those that its folder holds, and summarizes them.

    Args:
        folder: of the model.
        threshold: the cosine above which two codes share a group.
        plot: a PNG of the histogram of their sizes.

    Returns:
        The figures of ``summarize``, the threshold, and the file that holds the groups.

    Raises:
        ValueError: the folder holds no language model, or the threshold is not a cosine.
    """
    if plot:
        check_picture(plot)
    target = pretrained.load(folder)
    with progress_bar("groups") as progress:
        made = converted.groups(target, threshold, progress)
    if plot:
        plot_sizes(made, plot)
    return summarize(made) | {"threshold": threshold, "file": str(converted.groups_path(target, threshold))}


def summarize(groups: asg.Groups) -> dict[str, float]:
    """How many groups there are, how large, in how many of them a token is, and how much memory they take."""
    sizes, count = np.asarray(groups.sizes), np.asarray(groups.token_count)
    singletons = np.asarray(groups.members)[sizes == 1, 0]
    return {
        "tokens": count.size,
        "groups": sizes.size,
        "size_mean": float(sizes.mean()),
        "size_median": float(np.median(sizes)),
        "size_max": int(sizes.max()),
        "singletons": int((count[singletons] == 1).sum()),
        "groups_per_token_mean": float(count.mean()),
        "groups_per_token_max": int(count.max()),
        "memory_bytes": sum(int(array.nbytes) for array in groups),
    }


def plot_sizes(groups: asg.Groups, path: str | os.PathLike[str]) -> None:
    """Draws a histogram of the group sizes as PNG."""
    from matplotlib.figure import Figure  # slow to import

    sizes = np.asarray(groups.sizes)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    edges = np.arange(0.5, sizes.max() + 1.5, max(1, sizes.max() // 60))
    axes.hist(sizes, bins=edges.tolist(), log=True)
    axes.set(xlabel="tokens in the group", ylabel="groups", title=f"{sizes.size:,} groups, mean size {sizes.mean():.1f}")
    figure.savefig(path, format="png", dpi=120)
