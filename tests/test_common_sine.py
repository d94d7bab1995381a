"""The square of a sine against that of numpy."""

import jax
import numpy as np
import pytest

from jaxspec.common.sine import sin_squared


@pytest.mark.parametrize("limit", [2, 300, 1e4])
def test_square_of_a_sine_is_numpys(limit):
    x = np.linspace(-limit, limit, 100_001, dtype=np.float32)
    np.testing.assert_allclose(sin_squared(x), np.sin(x.astype(np.float64)) ** 2, atol=5e-7)
    small = np.float32([0, 1e-20, 1e-6, -1e-3])
    np.testing.assert_allclose(sin_squared(small), np.sin(small.astype(np.float64)) ** 2, rtol=1e-6, atol=1e-38)
    assert (np.asarray(sin_squared(x)) >= 0).all()


def test_gradient_is_that_of_the_sine():
    x = np.linspace(-9, 9, 101, dtype=np.float32)
    gradient = jax.vmap(jax.grad(lambda x: sin_squared(x)))(x)
    np.testing.assert_allclose(gradient, np.sin(2 * x.astype(np.float64)), atol=1e-5)
