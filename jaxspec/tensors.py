"""A tensor of a checkpoint that is read when it is asked for, a few rows at a time."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Tensor(NamedTuple):
    """A name, a shape, and the way to the numbers; nothing is in memory until ``read`` is called."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype  # ml_dtypes.bfloat16 included
    read: Callable[[int, int], np.ndarray]  # rows [start, stop) of the first axis; a scalar is read by (0, 1), as shape ()

    def all(self) -> np.ndarray:
        """The whole tensor."""
        return self.read(0, self.shape[0] if self.shape else 1)


def rows(tensor: Tensor, start: int, stop: int) -> Tensor:
    """The rows [start, stop) of a tensor as one of its own."""
    shape = (stop - start, *tensor.shape[1:])
    return tensor._replace(shape=shape, read=lambda first, last: tensor.read(start + first, start + min(last, shape[0])))
