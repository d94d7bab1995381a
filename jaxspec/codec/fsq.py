"""Finite scalar quantisation (FSQ, arXiv 2309.15505): a code is a mixed-radix number whose digits are rounded coordinates.

Digit 0 is the least significant. Coordinates are in [-1, 1]; a digit of L levels is in 0 .. L - 1.
"""

import math
from collections.abc import Sequence

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
    """Rounds to the grid, with straight-through gradients.

    Args:
        z: float32 [... n], unbounded.
        levels: the number of levels of each of the n coordinates.

    Returns:
        The grid points in [-1, 1], float32 [... n], and their digits, int32 [... n].
    """
    half = _along_last([(level - 1) / 2 for level in levels], z.ndim, np.float32)
    # An even number of levels has its grid on half-integers.
    offset = _along_last([0.5 if level % 2 == 0 else 0.0 for level in levels], z.ndim, np.float32)
    bounded = jnp.tanh(z) * half
    rounded = jnp.clip(jnp.round(bounded - offset) + offset, -half, half)
    straight = bounded + jax.lax.stop_gradient(rounded - bounded)
    return straight / half, jnp.round(rounded + half).astype(jnp.int32)


def to_codes(digits: Array, levels: tuple[int, ...]) -> Array:
    """Digits int32 [... n] -> codes int32 [...].

    >>> int(to_codes(jnp.array([6, 4, 0, 0, 1]), (7, 5, 5, 5, 5)))
    909
    """
    return (digits * _radix(levels, digits.ndim)).sum(-1, dtype=np.int32)


def to_digits(codes: Array, levels: tuple[int, ...]) -> Array:
    """Codes int32 [...] -> digits int32 [... n], the inverse of ``to_codes``."""
    codes = jnp.asarray(codes, np.int32)[..., None]
    return (codes // _radix(levels, codes.ndim)) % _along_last(levels, codes.ndim, np.int32)


def vectors(codes: Array, levels: tuple[int, ...]) -> Array:
    """Codes int32 [...] -> coordinates in [-1, 1], float32 [... n]."""
    digits = to_digits(codes, levels)
    return digits.astype(np.float32) / _along_last([(level - 1) / 2 for level in levels], digits.ndim, np.float32) - 1


def _radix(levels: tuple[int, ...], ndim: int) -> np.ndarray:
    return _along_last(np.cumprod((1, *levels[:-1])), ndim, np.int32)


def _along_last(values: Sequence[float] | np.ndarray, ndim: int, dtype: type) -> np.ndarray:
    """Values [n] as [1 ... 1 n], to broadcast with an array of ``ndim`` axes."""
    return np.asarray(values, dtype).reshape((1,) * (ndim - 1) + (-1,))
