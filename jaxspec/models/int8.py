"""Int8 weights with a float32 scale for each output channel: w = values * scale, symmetric about 0.

A kernel [in out] has a scale for each column, "kernel_scale" [out]; an input table or a head [V D] one for each row, as
"table_0_scale" [V]. Norms and biases stay floats. A step reads half the bytes of bfloat16. A weight is off by half a scale at
most, which is 1/254 of the largest of its channel.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int8

from jaxspec.common.trees import flatten, unflatten
from jaxspec.types import Array, Params

SUFFIX = "_scale"  # of the path of a scale, after the path of its values
UNIFORM_INT8 = 73.6  # the deviation of ``random_int8``
_LARGEST = 127
_TABLE = re.compile(r"table_\d+|head")


def quantize_rows(rows: Float[np.ndarray, "R N"]) -> tuple[Int8[np.ndarray, "R N"], Float32[np.ndarray, " R"]]:
    """The values and the scale of each row: the scale is NaN where a value of the row is not finite, and 1 where all are 0.

    >>> values, scale = quantize_rows(np.array([[0.5, -1.0], [0.0, 0.0]], np.float32))
    >>> values.tolist(), scale.round(4).tolist()
    ([[64, -127], [0, 0]], [0.007899999618530273, 1.0])
    """
    rows = rows.astype(np.float32)
    largest = np.abs(rows).max(axis=1, initial=0)
    usable = np.isfinite(largest) & (largest > 0)
    scale = np.where(usable, np.maximum(largest / _LARGEST, np.finfo(np.float32).tiny), 1).astype(np.float32)
    values = np.rint(np.where(usable[:, None], rows, 0) / scale[:, None]).astype(np.int8)
    return values, np.where(np.isfinite(largest), scale, np.float32(np.nan))


def quantize(params: Params) -> Params:
    """Replaces each kernel, table and head of a transformer by int8 values and their scales.

    Args:
        params: a nested dict of arrays, see ``transformer.Config.weights``.

    Returns:
        A nested dict of numpy arrays, for the config with ``weights="int8"``.
    """
    quantized: dict[str, np.ndarray] = {}
    for path, array in flatten(params).items():
        array = np.asarray(array)
        if path.endswith("/kernel"):
            values, scale = quantize_rows(array.T)
            quantized |= {path: np.ascontiguousarray(values.T), path + SUFFIX: scale}
        elif _TABLE.fullmatch(path):
            values, scale = quantize_rows(array)
            quantized |= {path: values, path + SUFFIX: scale}
        else:
            quantized[path] = array
    return unflatten(quantized)


def dequantize(params: Params) -> Params:
    """The parameters, or a branch of them, with float32 weights in place of int8 values and scales."""
    flat, floats = flatten(params), {}
    for path, array in flat.items():
        scale = flat.get(path + SUFFIX)
        if scale is not None and path.endswith("kernel"):
            floats[path] = array.astype(np.float32) * scale[None]
        elif scale is not None:
            floats[path] = rows(params, path)
        elif not (path.endswith(SUFFIX) and path.removesuffix(SUFFIX) in flat):
            floats[path] = array
    return unflatten(floats)


def rows(params: Params, name: str, start: int = 0, stop: int | None = None) -> Array | np.ndarray:
    """The rows [start, stop) of a table or head of a transformer, as floats.

    Args:
        params: of the transformer.
        name: "table_0", ... or "head".
        start: the first row.
        stop: after the last row; None for all.
    """
    table, scale = params[name][start:stop], params.get(name + SUFFIX)
    return table if scale is None else table.astype(np.float32) * scale[start:stop, None]


def random_int8(key: Array, shape: tuple[int, ...], dtype: Any = jnp.int8) -> Array:
    """Integers drawn evenly from -127 to 127: the values of random weights."""
    return jax.random.randint(key, shape, -_LARGEST, _LARGEST + 1, dtype)


def scaled(y: Float[Array, "... N"], scale: Float32[Array, " N"]) -> Float[Array, "... N"]:
    """Products with int8 values times the scale of each channel, computed in float32, in the type of ``y``."""
    return (y * jnp.expand_dims(scale, range(y.ndim - 1))).astype(y.dtype)
