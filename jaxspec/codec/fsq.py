"""Finite scalar quantisation: a code is a mixed-radix number whose digits are rounded coordinates (arXiv 2309.15505).

Digit 0 is the least significant. Coordinates run over -1 .. 1, digits over 0 .. L - 1.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.types import Array


def codebook_size(levels: tuple[int, ...]) -> int:
    """The number of codes.

    >>> codebook_size((7, 5, 5, 5, 5))
    4375
    """
    return math.prod(levels)


def quantize(z: Array, levels: tuple[int, ...]) -> tuple[Array, Array]:
    """Unbounded coordinates [... n] -> ([-1, 1] grid points with straight-through gradients, digits int32 [... n])."""
    half = (jnp.array(levels, jnp.float32) - 1) / 2
    bounded = jnp.tanh(z) * half
    # An even number of levels has its grid on half-integers.
    offset = jnp.array([0.5 if level % 2 == 0 else 0.0 for level in levels], jnp.float32)
    rounded = jnp.clip(jnp.round(bounded - offset) + offset, -half, half)
    straight = bounded + jax.lax.stop_gradient(rounded - bounded)
    return straight / half, jnp.round(rounded + half).astype(jnp.int32)


def to_codes(digits: Array, levels: tuple[int, ...]) -> Array:
    """Digits int32 [... n] -> codes int32 [...].

    >>> int(to_codes(jnp.array([6, 4, 0, 0, 1]), (7, 5, 5, 5, 5)))
    909
    """
    return (digits * _radix(levels)).sum(-1)


def to_digits(codes: Array, levels: tuple[int, ...]) -> Array:
    """Codes int32 [...] -> digits int32 [... n], the inverse of ``to_codes``."""
    return (codes[..., None] // _radix(levels)) % jnp.array(levels, jnp.int32)


def vectors(codes: Array, levels: tuple[int, ...]) -> Array:
    """Codes int32 [...] -> coordinates in [-1, 1], float32 [... n]."""
    half = (jnp.array(levels, jnp.float32) - 1) / 2
    return to_digits(codes, levels) / half - 1


def _radix(levels: tuple[int, ...]) -> Array:
    return jnp.array(np.cumprod((1, *levels[:-1])), jnp.int32)
