"""The target's hidden states of samples, computed once and kept on disk, in place of its pass in every step.

A cache holds float16 [N F] for N tokens: the features that the draft reads, and the output of the target's final norm after them.
It pays where the disk is large and the target is much larger than the draft; the target's head is applied anew.
"""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from jaxspec.common.files import replacing
from jaxspec.train.drafts import Task, hidden_states
from jaxspec.train.packing import fill, first_fit, stack
from jaxspec.train.samples import Samples
from jaxspec.types import Params

FILE = "features.npy"


def cached(
    folder: Path, task: Task, target: Params, samples: Samples, rows: int, width: int, progress: Callable[[str], None] = print
) -> Samples:
    """The samples with the target's hidden states beside their tokens, read from ``folder`` page by page.

    Args:
        folder: of the cache, which is written unless it is there.
        task: what the draft reads.
        target: its parameters.
        samples: with prompts.
        rows, width: of the batches that are computed at once.
        progress: called with a line of text every now and then.

    Raises:
        FloatingPointError: a hidden state is beyond float16.
        OSError: the file cannot be written, or the disk has no room for it.
    """
    path = folder / FILE
    if not path.exists():
        with replacing(path) as partial:
            _write(partial, task, target, samples, rows, width, progress)
    return samples._replace(features=np.load(path, mmap_mode="r"))


def _write(
    path: Path, task: Task, target: Params, samples: Samples, rows: int, width: int, progress: Callable[[str], None]
) -> None:
    members = first_fit(np.diff(samples.start), width)
    shape = len(samples.tokens), len(task.shape.feature_layers) * task.config.target.width
    size = np.dtype(np.float16).itemsize * math.prod(shape)
    if shutil.disk_usage(path.parent).free < size:  # a disk that fills up would kill the process at a write to the map
        raise OSError(f"expected room for {size / 1e9:.1f} GB in {path.parent}, got less: leave --cache-features out")
    states = np.lib.format.open_memmap(path, "w+", np.float16, shape)
    for first in range(0, len(members), rows):
        some = [*members[first : first + rows], *[[]] * (first + rows - len(members))]
        batch = stack([fill(samples, one, width) for one in some])
        found = np.asarray(_hidden_states(task.shape, target, batch), np.float16)
        if not np.isfinite(found).all():
            raise FloatingPointError("expected hidden states within float16, got larger ones: leave --cache-features out")
        for one, row, segment in zip(some, found, np.asarray(batch.segment), strict=True):
            for number, i in enumerate(one, 1):
                mine = row[segment == number]
                states[samples.start[i] : samples.start[i] + len(mine)] = mine
        progress(f"hidden states of {min(first + rows, len(members))} of {len(members)} rows")
    states.flush()


_hidden_states = jax.jit(hidden_states, static_argnums=0)
