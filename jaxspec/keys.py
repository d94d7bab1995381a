"""Random keys: the one place that decides which implementation the library draws with."""

import jax
import jax.numpy as jnp

from jaxspec.types import Array

_THREEFRY = "threefry2x32"


def threefry_key(key: Array) -> Array:
    """The key as a threefry2x32 key, whose draws stay independent under ``vmap``.

    ``rbg`` and ``unsafe_rbg`` keys do not: a vmapped draw takes the whole batch from the first row's key (``jax.random``,
    "Advanced RNG configuration"). Every function of jaxspec that consumes a key converts it here first, whether the
    implementation was chosen by the key or by ``jax_default_prng_impl``.

    Args:
        key: a key or keys [...] of any implementation, or raw uint32 key data [... 2] (threefry2x32) or [... 4] (rbg).

    Returns:
        threefry2x32 keys [...]: unchanged if they are threefry2x32 already, else derived from all words of their data.

    Raises:
        ValueError: not a key.

    >>> jax.random.key_impl(threefry_key(jax.random.key(0, impl="rbg")))
    'threefry2x32'
    """
    if not isinstance(key, jax.Array):
        raise ValueError(f"expected a key, got {type(key).__name__}: pass jax.random.key(0)")
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if str(jax.random.key_impl(key)) == _THREEFRY:
            return key
        return _derive(jax.random.key_data(key).reshape(*key.shape, -1))
    if key.dtype != jnp.uint32 or key.ndim == 0 or key.shape[-1] not in (2, 4):
        raise ValueError(f"expected a key, got an array {key.dtype} {key.shape}: pass jax.random.key(0)")
    return _derive(key)


@jax.jit
def _derive(data: Array) -> Array:
    """threefry2x32 keys [...] from uint32 words [... N], N >= 2: the first two are the key, the others are folded in."""

    def derive(words: Array) -> Array:
        key = jax.random.wrap_key_data(words[:2], impl=_THREEFRY)
        for word in words[2:]:
            key = jax.random.fold_in(key, word)
        return key

    return jax.vmap(derive)(data.reshape(-1, data.shape[-1])).reshape(data.shape[:-1])
