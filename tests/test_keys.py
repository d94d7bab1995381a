"""Keys of every implementation: rows stay independent, and threefry keys are unchanged.

The statistical tests have fixed seeds; with fresh ones each chi-square would raise a false alarm once in 10,000 runs.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chi_square import assert_distribution

from jaxspec.keys import threefry_key
from jaxspec.sampling import sample
from jaxspec.speculate import autoregressive
from jaxspec.types import LanguageModel


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
@pytest.mark.parametrize("each", [False, True], ids=["one key", "a key for each row"])
@pytest.mark.parametrize("raw", [False, True], ids=["typed", "raw"])
def test_draws_are_independent_whatever_the_keys(impl, each, raw):
    """Successive tokens of a uniform target are equal 1 time in V, and so are draws by different keys.

    rbg itself draws a vmapped batch from the first key: once row 0 is finished, all rows repeat their tokens for ever.
    """
    vocab, batch = 5, 400
    with jax.default_prng_impl(impl):
        first = jax.random.key(11)
        keys = jax.random.split(first, batch)
        others = jax.random.split(jax.random.key(12), batch).at[0].set(keys[0])
        first, keys, others = (jax.random.key_data(key) if raw else key for key in (first, keys, others))
        uniform = LanguageModel(
            lambda params, tokens, cache, length: (jnp.zeros((*tokens.shape, vocab)), None, cache),
            lambda batch, cells: jnp.zeros((batch, cells)),
        )
        prompt = np.zeros((batch, 1), np.int32), np.ones(batch, np.int32)
        limit = np.where(np.arange(batch) == 0, 1, 3)
        tokens = autoregressive(keys if each else first, uniform, (), *prompt, max_new_tokens=3, limit=limit).tokens[1:]
        draws = [jax.vmap(sample)(some, jnp.ones((batch, vocab)))[1:] for some in (keys, others)]
    for one, other in ((tokens[:, 1], tokens[:, 2]), draws):
        assert_distribution(one, np.ones(vocab))
        assert_distribution(one == other, [1 - 1 / vocab, 1 / vocab])


def test_threefry_keys_are_kept_and_others_derived_from_all_their_data():
    key = jax.random.key(3)
    assert threefry_key(key) is key
    np.testing.assert_array_equal(jax.random.key_data(threefry_key(jax.random.key_data(key))), jax.random.key_data(key))
    words = jnp.uint32([[1, 2, 3, 4], [0, 2, 3, 4], [1, 0, 3, 4], [1, 2, 0, 4], [1, 2, 3, 0]])
    derived = jax.random.key_data(threefry_key(words))
    assert len(set(map(tuple, derived.tolist()))) == len(words)
    np.testing.assert_array_equal(jax.random.key_data(threefry_key(words[1])), derived[1])
    np.testing.assert_array_equal(jax.random.key_data(threefry_key(jax.random.wrap_key_data(words, impl="rbg"))), derived)
    assert threefry_key(jax.random.wrap_key_data(words[None], impl="unsafe_rbg")).shape == (1, 5)


@pytest.mark.parametrize("key", [0, np.zeros(2, np.uint32), jnp.zeros(2), jnp.zeros(3, jnp.uint32), jnp.uint32(0)])
def test_what_is_no_key_is_refused(key):
    with pytest.raises(ValueError, match="expected a key, got"):
        threefry_key(key)
