"""The key/value cache of one attention layer: preallocated cells, written in place, visible up to the query's position.

Heads come before cells, and a key's cells are the last axis: a step then reads both as they lie, and copies neither.

Invariant: cell s of a row holds position s. A query at position t sees the cells s <= t, so a cell that was written for a
rejected token is overwritten before any query can see it, and rolling a row back means setting its length.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Float32, Int32

from jaxspec import mesh
from jaxspec.types import Array

_FEW_ROWS = 4  # for which XLA's product on CPU is slower than a multiplication and a sum
_UNROLLED = 64  # rows; unrolling more compiles for minutes


class KVCache(NamedTuple):
    """Keys [B H_kv D_head S] and values [B H_kv S D_head] of one layer, in S cells; those of a block are a cache of T cells."""

    key: Array
    value: Array

    @property
    def cells(self) -> int:
        """S."""
        return self.key.shape[-1]


_CELLS = KVCache(3, 2)  # pyright: ignore[reportArgumentType]  the axis of the cells
_AXES = ("batch", "kv_heads")  # that a mesh divides


def init(batch: int, cells: int, kv_heads: int, head_dim: int, dtype: jnp.dtype) -> KVCache:
    """An empty cache."""
    empty = jnp.zeros((batch, kv_heads, head_dim, cells), dtype)
    return jax.tree.map(lambda cells: mesh.constrain(cells, *_AXES), KVCache(empty, empty.swapaxes(2, 3)))


def of_block(key: Float[Array, "B T H D"], value: Float[Array, "B T H D"]) -> KVCache:
    """The keys and values [B T H_kv D_head] of a block, as a cache of T cells."""
    return KVCache(key.transpose(0, 2, 3, 1), value.swapaxes(1, 2))


def join(first: KVCache, then: KVCache) -> KVCache:
    """The cells of one cache and those of another after them."""
    return jax.tree.map(lambda axis, *pair: jnp.concatenate(pair, axis), _CELLS, first, then)


def write(cache: KVCache, block: KVCache, length: Int32[Array, " B"]) -> KVCache:
    """Writes a block of T cells to the cells length .. length + T - 1 of each row, ``length`` int32 [B].

    Like ``dynamic_update_slice``, a block that would pass the last cell is moved back: callers keep K + 1 cells of slack.
    """
    block = jax.tree.map(lambda new, cells: new.astype(cells.dtype), block, cache)
    return mesh.on_each(_write, (_AXES, _AXES, ("batch",)), cache, block, length)


def _write(cache: KVCache, block: KVCache, length: Array) -> KVCache:
    return jax.lax.platform_dependent(cache, block, length, tpu=_row_by_row, default=_at_once)


def _at_once(cache: KVCache, block: KVCache, length: Array) -> KVCache:
    """One scatter, which a GPU runs in place as one kernel."""

    def put(axis: int, cells: Array, new: Array) -> Array:
        return jax.vmap(functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=axis - 1))(cells, new, length)

    return jax.tree.map(put, _CELLS, cache, block)


def _row_by_row(cache: KVCache, block: KVCache, length: Array) -> KVCache:
    """One write after another: XLA for TPU turns a scatter into a slow loop over a layout of twice the size."""

    def put(axis: int, cells: Array, new: Array) -> Array:
        def row(i: Array, cells: Array) -> Array:
            start = [i.astype(jnp.int32), *[jnp.int32(0)] * 3]
            start[axis] = length[i]
            return jax.lax.dynamic_update_slice(cells, jax.lax.dynamic_slice_in_dim(new, i, 1), start)

        batch = len(length)
        return jax.lax.fori_loop(0, batch, row, cells, unroll=min(batch, _UNROLLED))

    return jax.tree.map(put, _CELLS, cache, block)


def attend(rows: Float[Array, "B H G T N"], cells: Float[Array, "B H N M"]) -> Float32[Array, "B H G T M"]:
    """The product of the rows of each group of heads with the keys or the values they share."""
    batch, heads, group, block, _ = rows.shape
    flat = rows.reshape(batch, heads, group * block, -1)

    def product(flat: Array, cells: Array) -> Array:
        return jnp.einsum("bhrn,bhnm->bhrm", flat, cells, preferred_element_type=jnp.float32)

    def reduction(flat: Array, cells: Array) -> Array:
        return (flat[..., None].astype(jnp.float32) * cells[:, :, None].astype(jnp.float32)).sum(axis=-2)

    few = flat.shape[2] <= _FEW_ROWS
    out = jax.lax.platform_dependent(flat, cells, cpu=reduction if few else product, default=product)
    return out.reshape(batch, heads, group, block, -1)


def span(first: Int32[Array, "*rows"], count: int) -> Int32[Array, "*rows {count}"]:
    """The positions first .. first + count - 1: int32 [... T] from [...].

    >>> span(jnp.array([3, 0], jnp.int32), 2).tolist()
    [[3, 4], [0, 1]]
    """
    return first[..., None] + jnp.expand_dims(jnp.arange(count, dtype=jnp.int32), range(first.ndim))


def visible(length: Int32[Array, " B"], block: int, cells: int) -> Bool[Array, "B {block} {cells}"]:
    """Which cells each query of a block sees: bool [B T S], true where s <= length + t."""
    return jnp.arange(cells, dtype=jnp.int32)[None, None] <= span(length, block)[:, :, None]
