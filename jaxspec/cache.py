"""The key/value cache of one attention layer: preallocated cells, written in place, visible up to the query's position.

Invariant: cell s of a row holds position s. A query at position t sees the cells s <= t, so a cell that was written for a
rejected token is overwritten before any query can see it, and rolling a row back means setting its length.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int32

from jaxspec.types import Array

_UNROLLED = 64  # rows; unrolling more compiles for minutes


class KVCache(NamedTuple):
    """Keys and values of one layer, each [B S H_kv D_head]."""

    key: Array
    value: Array


def init(batch: int, cells: int, kv_heads: int, head_dim: int, dtype: jnp.dtype) -> KVCache:
    """An empty cache."""
    shape = (batch, cells, kv_heads, head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def write(cache: KVCache, key: Float[Array, "B T H D"], value: Float[Array, "B T H D"], length: Int32[Array, " B"]) -> KVCache:
    """Writes a block [B T H_kv D_head] to the cells length .. length + T - 1 of each row, ``length`` int32 [B].

    Like ``dynamic_update_slice``, a block that would pass the last cell is moved back: callers keep K + 1 cells of slack.
    """
    blocks = KVCache(key.astype(cache.key.dtype), value.astype(cache.value.dtype))
    return jax.lax.platform_dependent(cache, blocks, length, tpu=_row_by_row, default=_at_once)


def _at_once(cache: KVCache, blocks: KVCache, length: Array) -> KVCache:
    """One scatter, which a GPU runs in place as one kernel."""
    put = jax.vmap(functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0))
    return jax.tree.map(lambda cells, block: put(cells, block, length), cache, blocks)


def _row_by_row(cache: KVCache, blocks: KVCache, length: Array) -> KVCache:
    """One write after another: XLA for TPU turns a scatter into a slow loop over a layout of twice the size."""

    def put(cells: Array, block: Array) -> Array:
        def row(i: Array, cells: Array) -> Array:
            one = jax.lax.dynamic_slice_in_dim(block, i, 1)
            return jax.lax.dynamic_update_slice(cells, one, (i.astype(jnp.int32), length[i], jnp.int32(0), jnp.int32(0)))

        batch = len(length)
        return jax.lax.fori_loop(0, batch, row, cells, unroll=min(batch, _UNROLLED))

    return jax.tree.map(put, cache, blocks)


def span(first: Int32[Array, "*rows"], count: int) -> Int32[Array, "*rows {count}"]:
    """The positions first .. first + count - 1: int32 [... T] from [...].

    >>> span(jnp.array([3, 0], jnp.int32), 2).tolist()
    [[3, 4], [0, 1]]
    """
    return first[..., None] + jnp.expand_dims(jnp.arange(count, dtype=jnp.int32), range(first.ndim))


def visible(length: Int32[Array, " B"], block: int, cells: int) -> Bool[Array, "B {block} {cells}"]:
    """Which cells each query of a block sees: bool [B T S], true where s <= length + t."""
    return jnp.arange(cells, dtype=jnp.int32)[None, None] <= span(length, block)[:, :, None]
