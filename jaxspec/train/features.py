"""The target's hidden states of samples, computed once and kept on disk, in place of its pass in every step.

A cache holds float16 [N F] for N tokens: the features that the draft reads, and the output of the target's final norm after them.
It pays where the disk is large and the target is much larger than the draft; the target's head is applied anew.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.common.files import replacing
from jaxspec.models import transformer
from jaxspec.train.drafts import Task
from jaxspec.train.packing import fill, first_fit, stack
from jaxspec.train.samples import Samples
from jaxspec.types import Array, Params

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
        OSError: the file cannot be written.
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
    size = len(task.shape.feature_layers) * task.config.target.width
    states = np.lib.format.open_memmap(path, "w+", np.float16, (len(samples.tokens), size))
    for first in range(0, len(members), rows):
        some = members[first : first + rows]
        batch = stack([fill(samples, one, width) for one in [*some, *[[]] * (rows - len(some))]])
        found = np.asarray(_states(task.shape, target, batch.tokens, batch.segment))
        if not np.isfinite(found).all():
            raise FloatingPointError("expected hidden states within float16, got larger ones: leave --cache-features out")
        for row, one in enumerate(some):
            at = 0
            for i in one:
                length = min(int(samples.start[i + 1] - samples.start[i]), width - at)
                states[samples.start[i] : samples.start[i] + length] = found[row, at : at + length]
                at += length
        progress(f"hidden states of {min(first + rows, len(members))} of {len(members)} rows")
    states.flush()


def _hidden(shape: transformer.Config, target: Params, tokens: Array, segment: Array) -> Array:
    output: Any = transformer.Transformer(shape).apply({"params": target}, tokens, segment=segment)
    return output[1].astype(jnp.float16)


_states = jax.jit(_hidden, static_argnums=0)
