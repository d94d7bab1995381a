"""Tensors of a checkpoint that are read on request, a few rows at a time, and views of such tensors."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxspec.models.int8 import quantize_rows


class Tensor(NamedTuple):
    """A name, a shape, and a function that reads the values; nothing is in memory until ``read`` is called.

    Attributes:
        name: in the checkpoint.
        shape: of the whole tensor.
        dtype: ml_dtypes.bfloat16 included.
        read: read(start, stop) -> rows [start, stop) of the first axis; a scalar is read by (0, 1), and has shape ().
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[int, int], np.ndarray]

    def all(self) -> np.ndarray:
        """The whole tensor."""
        return self.read(0, self.shape[0] if self.shape else 1)


def of_array(name: str, array: jax.Array | np.ndarray) -> Tensor:
    """An array in memory or on a device, fetched to the host a few rows at a time."""

    def read(start: int, stop: int) -> np.ndarray:
        whole = array.ndim == 0 or (start <= 0 and stop >= array.shape[0])
        return np.asarray(jax.device_get(array if whole else array[start:stop]))

    return Tensor(name, tuple(array.shape), np.dtype(array.dtype), read)


def rows(tensor: Tensor, start: int, stop: int) -> Tensor:
    """The rows [start, stop) of a tensor."""
    shape = (stop - start, *tensor.shape[1:])
    return tensor._replace(shape=shape, read=lambda first, last: tensor.read(start + first, start + min(last, shape[0])))


def padded(tensor: Tensor, count: int) -> Tensor:
    """A tensor followed by rows of zeros, ``count`` rows in all."""

    def read(start: int, stop: int) -> np.ndarray:
        stop = min(stop, count)
        own = tensor.read(min(start, tensor.shape[0]), min(stop, tensor.shape[0]))
        return np.concatenate([own, np.zeros((stop - start - len(own), *tensor.shape[1:]), own.dtype)])

    return tensor if count == tensor.shape[0] else tensor._replace(shape=(count, *tensor.shape[1:]), read=read)


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """The rows of several tensors, one after the other, as one tensor with the name of the first."""
    starts = np.cumsum([0, *(tensor.shape[0] for tensor in tensors)])

    def read(start: int, stop: int) -> np.ndarray:
        inside = [
            tensor.read(max(start - first, 0), min(stop - first, tensor.shape[0]))
            for first, tensor in zip(starts, tensors, strict=False)
            if start < first + tensor.shape[0] and stop > first
        ]
        return np.concatenate(inside)

    return tensors[0]._replace(shape=(int(starts[-1]), *tensors[0].shape[1:]), read=read)


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape on a new first axis, as one tensor with the name of the first."""

    def read(start: int, stop: int) -> np.ndarray:
        made = np.empty((min(stop, len(tensors)) - start, *tensors[0].shape), tensors[0].dtype)
        for row, tensor in zip(made, tensors[start:stop], strict=True):
            row[...] = tensor.all()
        return made

    return tensors[0]._replace(shape=(len(tensors), *tensors[0].shape), read=read)


def cast(tensor: Tensor, dtype: np.dtype) -> Tensor:
    """A tensor converted to another dtype as it is read."""
    return tensor._replace(dtype=dtype, read=lambda start, stop: tensor.read(start, stop).astype(dtype, copy=False))


def quantized(tensor: Tensor, block: int = 1024) -> tuple[Tensor, Tensor]:
    """A matrix as int8 values and the float32 scale of each row, see ``models.int8``, computed as they are read.

    Args:
        tensor: [R N].
        block: rows that are floats at a time.
    """

    def each(start: int, stop: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for first in range(start, stop, block):
            yield quantize_rows(tensor.read(first, min(first + block, stop)))

    def values(start: int, stop: int) -> np.ndarray:
        made = np.empty((min(stop, tensor.shape[0]) - start, *tensor.shape[1:]), np.int8)
        for i, (rows, _) in enumerate(each(start, start + len(made))):
            made[i * block : (i + 1) * block] = rows
        return made

    def scales(start: int, stop: int) -> np.ndarray:
        return np.concatenate([scale for _, scale in each(start, min(stop, tensor.shape[0]))])

    return (
        tensor._replace(dtype=np.dtype(np.int8), read=values),
        tensor._replace(shape=tensor.shape[:1], dtype=np.dtype(np.float32), read=scales),
    )


def equal(a: Tensor, b: Tensor, block: int = 4096) -> bool:
    """Whether two tensors have equal shapes and values, compared ``block`` rows at a time."""
    if a.shape != b.shape:
        return False
    starts = range(0, a.shape[0], block)
    return all(np.array_equal(a.read(i, i + block), b.read(i, i + block)) for i in starts)
