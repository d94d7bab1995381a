"""The key/value cache of one attention layer: preallocated cells, written in place, visible up to the query's position.

Invariant: cell s of a row holds position s. A query at position t sees the cells s <= t, so a cell that was written for a
rejected token is overwritten before any query can see it, and to roll a row back is to set its length.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxspec.types import Array


class KVCache(NamedTuple):
    """Keys and values of one layer, each [B S H_kv D_head]."""

    key: Array
    value: Array


def init(batch: int, cells: int, kv_heads: int, head_dim: int, dtype: jnp.dtype) -> KVCache:
    """An empty cache."""
    shape = (batch, cells, kv_heads, head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def write(cache: KVCache, key: Array, value: Array, length: Array) -> KVCache:
    """Writes a block [B T H_kv D_head] to the cells length .. length + T - 1 of each row, ``length`` int32 [B].

    Like ``dynamic_update_slice``, a block that would pass the last cell is moved back: callers keep K + 1 cells of slack.
    """

    def put(cells: Array, block: Array, start: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(cells, block.astype(cells.dtype), start, axis=0)

    return KVCache(jax.vmap(put)(cache.key, key, length), jax.vmap(put)(cache.value, value, length))


def visible(length: Array, block: int, cells: int) -> Array:
    """Which cells each query of a block sees: bool [B T S], true where s <= length + t."""
    position = length[:, None] + jnp.arange(block)
    return jnp.arange(cells) <= position[:, :, None]
