"""Rows of a fixed length, packed with several samples each: first fit, every sample once in an epoch."""

from collections.abc import Iterator

import jax
import numpy as np

from jaxspec.draft.family import Packed
from jaxspec.train.samples import Samples

_STEP, _SHORTEST = 128, 512


def row_length(samples: Samples) -> int:
    """T that holds every sample: the longest one, rounded up to a multiple of 128, and at least 512."""
    longest = int(np.diff(samples.start).max())
    return max(_SHORTEST, -(-longest // _STEP) * _STEP)


def first_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """The indices of samples in each row: every sample goes to the first row with room for it.

    Args:
        lengths: int [N], in the order in which they are placed; longer ones count as ``capacity``.
        capacity: T.

    >>> first_fit(np.array([5, 4, 3, 2]), 8)
    [[0, 2], [1, 3]]
    """
    free, rows = np.full(len(lengths), capacity, np.int64), []
    for index, length in enumerate(np.minimum(lengths, capacity)):
        row = int(np.argmax(free[: len(rows) + 1] >= length))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        free[row] -= length
    return rows


def fill(samples: Samples, members: list[int], capacity: int) -> Packed:
    """One row: int32 [T], int32 [T], bool [T]; a sample that is longer than the row is cut."""
    tokens, segment, emitted = np.zeros(capacity, np.int32), np.zeros(capacity, np.int32), np.zeros(capacity, bool)
    states = samples.features
    hidden = None if states is None else np.zeros((capacity, states.shape[1]), states.dtype)
    at = 0
    for number, i in enumerate(members, 1):
        row = samples.row(i)[: capacity - at]
        tokens[at : at + len(row)], segment[at : at + len(row)] = row, number
        prompt = 0 if samples.prompt_length is None else samples.prompt_length[i]
        emitted[at + prompt : at + len(row)] = True
        if hidden is not None and states is not None:
            hidden[at : at + len(row)] = states[samples.start[i] : samples.start[i] + len(row)]
        at += len(row)
    return Packed(tokens, segment, emitted, hidden)  # pyright: ignore[reportArgumentType]  host arrays


def stack(rows: list[Packed]) -> Packed:
    """Rows [T] as a batch [B T]."""
    return jax.tree.map(lambda *fields: np.stack(fields), *rows)


def batches(samples: Samples, rows: int, capacity: int, seed: int, step: int = 0) -> Iterator[Packed]:
    """Batches [B T] without end, beginning with that of ``step``; the same seed gives the same ones.

    Args:
        samples: to pack.
        rows: B.
        capacity: T.
        seed: of the order.
        step: how many batches to leave out.
    """
    skip, ready, number = step * rows, [], 0
    lengths = np.diff(samples.start)
    while True:
        order = np.random.default_rng((seed, number)).permutation(len(samples.texts))
        packed = first_fit(lengths[order], capacity)
        number += 1
        for members in packed[skip:]:
            ready.append(fill(samples, [int(order[i]) for i in members], capacity))
            if len(ready) == rows:
                yield stack(ready)
                ready = []
        skip = max(0, skip - len(packed))


def held_out(samples: Samples, rows: int, capacity: int) -> list[Packed]:
    """All samples in order as batches [B T]; the last is filled up with empty rows."""
    packed = [fill(samples, members, capacity) for members in first_fit(np.diff(samples.start), capacity)]
    empty = fill(samples, [], capacity)
    packed += [empty] * (-len(packed) % rows)
    return [stack(packed[i : i + rows]) for i in range(0, len(packed), rows)]
