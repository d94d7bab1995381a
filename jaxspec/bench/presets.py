"""Benchmarked shapes: pairs of target and draft by name, random weights of these shapes, and groups of a given size."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxspec import mesh
from jaxspec.common.trees import flatten, unflatten
from jaxspec.groups import Groups, acoustic_similarity_groups
from jaxspec.models import placement as placements
from jaxspec.models import transformer
from jaxspec.models.int8 import SUFFIX, UNIFORM_INT8, random_int8
from jaxspec.models.transformer import Config, RopeScaling
from jaxspec.sampling import BLOCK
from jaxspec.types import Array, Params

GROUP_SIZE = 140  # the mean of PCG's groups of LLaSA at a cosine of 0.4, arXiv 2511.13732

_DEVIATION = 0.02  # of random weights
_LLASA = (65_537, 128_264), 65_537  # input tables and the head of ``convert --head speech``: codes and the stop id
_LLAMA3 = functools.partial(Config, rope_theta=500_000.0, norm_eps=1e-5)


class Pair(NamedTuple):
    """The shapes of a target and its draft.

    Attributes:
        target: the target's.
        draft: the draft's; None where the draft is not a transformer.
        stops: how many ids at the end of the head's vocabulary are stop ids.
    """

    target: Config
    draft: Config | None
    stops: int

    @property
    def num_codes(self) -> int:
        """How many ids of the head's vocabulary come before the stop ids."""
        return self.target.vocab - self.target.padding - self.stops


def _cut(target: Config, layers: int) -> Config:
    return dataclasses.replace(target, layers=layers)


def _small() -> Config:
    return Config((16_384, 512), 16_384, 768, 12, 12, 4, 64, 2048, rope_theta=500_000.0)


def _llasa_1b() -> Config:
    return _LLAMA3(*_LLASA, width=2048, layers=16, heads=32, kv_heads=8, head_dim=64, mlp_width=8192, tied=True)


def _llasa_3b() -> Config:
    config = _LLAMA3(*_LLASA, width=3072, layers=28, heads=24, kv_heads=8, head_dim=128, mlp_width=8192, tied=True)
    return dataclasses.replace(config, rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192))


def _llasa_8b() -> Config:
    scaling = RopeScaling(8.0, 1.0, 4.0, 8192)
    return _LLAMA3(*_LLASA, width=4096, layers=32, heads=32, kv_heads=8, head_dim=128, mlp_width=14_336, rope_scaling=scaling)


def _cosyvoice2() -> Config:
    return Config(
        (6564, 2, 151_936), 6564, 896, 24, 14, 2, 64, 4864, rope_theta=1e6, norm_eps=1e-6, qkv_bias=True, head_bias=True
    )


PAIRS: dict[str, Callable[[], Pair]] = {
    "small": lambda: Pair(_small(), _cut(_small(), 2), 1),
    "llasa-1b": lambda: Pair(_llasa_1b(), _cut(_llasa_1b(), 3), 1),
    "llasa-3b": lambda: Pair(_llasa_3b(), _cut(_llasa_3b(), 3), 1),
    "llasa-8b": lambda: Pair(_llasa_8b(), _cut(_llasa_8b(), 3), 1),  # PCG's pair
    "cosyvoice2": lambda: Pair(_cosyvoice2(), _cut(_cosyvoice2(), 8), 3),  # SSD's pair
}


def pair(name: str, dtype: str, weights: str = "float", parts: int = 1) -> Pair:
    """The shapes of a preset.

    Args:
        name: a key of ``PAIRS``.
        dtype: of weights and caches.
        weights: of target and draft, see ``transformer.Config.weights``.
        parts: of the model axis of a mesh; head and tables are padded to a multiple of it, as ``jaxspec convert --pad-to`` does.

    Raises:
        ValueError: there is no such preset.
    """
    if name not in PAIRS:
        raise ValueError(f"expected a preset among {', '.join(PAIRS)}, got {name!r}: choose one of these")
    shapes = PAIRS[name]()

    def made(config: Config) -> Config:
        return dataclasses.replace(_padded(config, BLOCK * parts) if parts > 1 else config, dtype=dtype, weights=weights)

    return Pair(made(shapes.target), shapes.draft and made(shapes.draft), shapes.stops)


def _padded(config: Config, unit: int) -> Config:
    first, *others = (-(-rows // unit) * unit for rows in (config.vocab, *config.input_tables[1:]))
    return dataclasses.replace(config, vocab=first, padding=first - config.vocab, input_tables=(first, *others))


def automatic_mesh(config: Config, is_preset: bool, devices: Sequence[Any] | None = None) -> Mesh:
    """``mesh.automatic`` for a model.

    Args:
        config: its shape; the tables of a preset are padded to fit the mesh.
        is_preset: whether it is that of a preset.
        devices: by default all of JAX's.
    """
    heads = config.kv_heads, config.heads
    return mesh.automatic(parameter_bytes(config), heads if is_preset else (*heads, config.vocab), devices)


def random_params(key: Array, config: Config) -> Params:
    """Random parameters of a shape in its own dtype, made where they belong: of deviation 0.02; norms are ones."""
    leaves, placement = dict(sorted(flatten(transformer.stored_params(config)).items())), placements.current()
    places = flatten(transformer.shardings_of(config, placement, strict=False)) if placement else dict.fromkeys(leaves)

    def fill(key: Array, path: str, leaf: jax.ShapeDtypeStruct) -> Array:
        if leaf.ndim < 2:
            value = _DEVIATION / UNIFORM_INT8 if path.endswith(SUFFIX) else 1
            return jnp.full(leaf.shape, value, leaf.dtype, device=places[path])

        def make(key: Array) -> Array:
            if leaf.dtype == jnp.int8:
                return random_int8(key, leaf.shape)
            return (_DEVIATION * jax.random.normal(key, leaf.shape, leaf.dtype)).astype(leaf.dtype)

        return jax.jit(make, out_shardings=places[path])(key)

    keys = jax.random.split(key, len(leaves))
    filled = [fill(key, path, leaf) for key, (path, leaf) in zip(keys, leaves.items(), strict=True)]
    return unflatten(dict(zip(leaves, filled, strict=True)))


def neighbours(vocab: int, codes: int, size: int = GROUP_SIZE) -> Groups:
    """Overlapping groups of about ``size`` codes each, one for each code; other ids have singleton groups.

    Args:
        vocab: V.
        codes: the first so many ids are codes.
        size: mean number of codes of a group.
    """
    angle = 2 * np.pi * np.arange(codes) / codes
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    rows = np.concatenate([circle, np.zeros((vocab - codes, 2))])
    reach = np.cos(np.pi * min(size / codes, 0.9))
    return acoustic_similarity_groups(rows, float(reach), num_codes=codes)


def parameter_bytes(config: Config) -> int:
    """The bytes of the parameters of a shape, as it stores them."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(transformer.stored_params(config)))


def cache_bytes(config: Config, batch: int, cells: int) -> int:
    """The bytes of the KV caches of a batch with ``cells`` cells for each row, in the dtype of the shape."""
    return 2 * config.layers * config.kv_heads * config.head_dim * cells * batch * jnp.dtype(config.dtype).itemsize
