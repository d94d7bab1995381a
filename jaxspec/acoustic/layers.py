"""Layers that the networks of a flow share.

Rows are padded on the right. Convolutions look back only, and attention sees the steps before a limit, int32 [B T], which each
step has: the row's length or, in a stream, the end of the step's chunk. So padding does not change a row.
"""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jaxspec.codec.layers import constant, lecun, linear
from jaxspec.types import Array

HEAD_DIM = 64


def conv(features: int, taps: int, into: str | None, out: str | None, ahead: int = 0, *, name: str) -> nn.Conv:
    """A convolution over the step, ``ahead`` steps after it and the others before it."""
    padding = ((taps - 1 - ahead, ahead),)
    return nn.Conv(features, (taps,), padding=padding, kernel_init=lecun(None, into, out), bias_init=constant(0, out), name=name)


def linears(count: int, features: int, out: str | None, x: Array, *, name: str) -> Array:
    """Linear layers of one input, with their parameters stacked on a first axis: [S D] -> [S count features]."""
    stacked: Any = nn.vmap(
        nn.Dense,
        in_axes=None,  # pyright: ignore[reportArgumentType]
        out_axes=1,
        axis_size=count,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return stacked(features, kernel_init=lecun("embed", out), bias_init=constant(0, out), name=name)(x)


def limits(length: Array, steps: int, chunk: Array) -> Array:
    """How many steps each step sees: those of the chunks up to its own, within its row.

    Args:
        length: int32 [B].
        steps: T.
        chunk: steps in a chunk, int32 [].

    Returns:
        int32 [B T].

    >>> limits(jnp.array([3, 5]), 5, jnp.array(2)).tolist()
    [[2, 2, 3, 3, 3], [2, 2, 4, 4, 5]]
    """
    ends = (jnp.arange(steps, dtype=jnp.int32) // chunk + 1) * chunk
    return jnp.minimum(ends[None], length[:, None])


def attention(q: Array, k: Array, v: Array, limit: Array, position: Array | float = 0.0) -> Array:
    """softmax((q k + position) / 8) v over the steps before the limit, the softmax in float32.

    Args:
        q: [B T H 64]; k and v likewise.
        limit: int32 [B T].
        position: [B H T T], or 0.

    Returns:
        [B T H*64].
    """
    scores = (jnp.einsum("bthd,bshd->bhts", q, k) + position).astype(jnp.float32) / math.sqrt(HEAD_DIM)
    visible = jnp.arange(k.shape[1], dtype=limit.dtype)[None, None] < limit[:, :, None]
    weights = nn.softmax(jnp.where(visible[:, None], scores, jnp.finfo(jnp.float32).min)).astype(v.dtype)
    return jnp.einsum("bhts,bshd->bthd", weights, v).reshape(*q.shape[:2], -1)


def heads(count: int, bias: bool, x: Array) -> tuple[Array, Array, Array]:
    """Query, key and value, linear in x [B T D], within a compact module: each [B T count 64]."""
    q, k, v = (linear(count * HEAD_DIM, "embed", "heads", bias, name=name)(x) for name in ("query", "key", "value"))
    shape = (*x.shape[:2], count, HEAD_DIM)
    return q.reshape(shape), k.reshape(shape), v.reshape(shape)


def sinusoid(times: np.ndarray, width: int) -> np.ndarray:
    """Sines and cosines of 1000 t at frequencies from 1 down to 1e-4, float32 [S] -> float32 [S width].

    On the host and in float32: the angles reach 1000, where another rounding is seen.
    """
    half = width // 2
    frequencies = np.exp(np.arange(half, dtype=np.float32) * np.float32(-math.log(10_000) / (half - 1)))
    angles = (1000 * times.astype(np.float32))[:, None] * frequencies[None]
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


class LookAhead(nn.Module):
    """x + conv(leaky relu(conv of the step and the three after it))."""

    hidden: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B T D], 0 from each row's length on -> [B T D]."""
        y = nn.leaky_relu(conv(self.hidden, 4, "embed", "mlp", ahead=3, name="conv1")(x))
        return x + conv(x.shape[-1], 3, "mlp", "embed", name="conv2")(y)
