"""The target's features as drafts get them: those of one full forward pass, whatever was accepted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec import request, rounds, speculate
from jaxspec.models.transformer import Config, Transformer, init_params, language_model
from jaxspec.sampling import Sampling
from jaxspec.types import Draft, Proposal, Verdict

V, K, N = 11, 3, 14
CONFIG = Config((V, 4), V, width=16, layers=3, heads=2, kv_heads=1, head_dim=8, mlp_width=24, feature_layers=(0, 2, 3))
PARAMS = init_params(jax.random.key(0), CONFIG)
PROMPT = np.random.default_rng(0).integers(0, V + 4, (4, 6)).astype(np.int32)
LENGTH = np.array([1, 6, 3, 5], np.int32)


def recorder():
    """A draft that proposes random tokens and writes the features it is given where its contract says they belong."""

    def init(params, prompt, prompt_length, cells, features):
        store = jnp.zeros((len(prompt), cells, features.shape[-1]))
        return store.at[:, : prompt.shape[1]].set(features)

    def propose(params, keys, context, store):
        first = context.length - 1 - context.num_fresh
        index = jnp.arange(store.shape[1])[None]
        for i in range(context.features.shape[1]):
            here = (index == (first + i)[:, None]) & (i < context.num_fresh)[:, None]
            store = jnp.where(here[:, :, None], context.features[:, i, None], store)
        tokens = jax.vmap(lambda key: jax.random.randint(key, (K,), 0, V))(keys)
        return Proposal(tokens, jnp.full((*tokens.shape, V), 1 / V)), store

    return Draft(K, init, propose)


def accept_some(key, draft_tokens, draft_probs, target_probs):
    """Accepts a random number of tokens, so that every count occurs."""
    count = jax.random.randint(key, (), 0, K + 1)
    return Verdict(count, jax.random.randint(jax.random.fold_in(key, 1), (), 0, V))


@jax.jit
def features_of(tokens):
    """The features of one full forward pass."""
    return Transformer(CONFIG).apply({"params": PARAMS}, tokens)[1]


def test_the_features_of_every_committed_position_are_those_of_one_forward_pass():
    lm, draft = language_model(CONFIG), recorder()
    checked = request.check(jax.random.key(3), PROMPT, LENGTH, N, [N, N, 2, N], (), Sampling())
    state = speculate.init(lm, PARAMS, draft, None, checked, PROMPT.shape[1] + N + K + 1)
    step = jax.jit(lambda state: rounds.step(lm, PARAMS, draft, None, accept_some, state))
    taken = []
    while bool(speculate.is_running(state)):
        state = step(state)
        taken += np.asarray(state.num_fresh).tolist()
    assert set(taken) >= {1, 2, 3, 4}
    state = step(state)  # so that the draft receives the last round's features too
    features = features_of(state.tokens)
    for row, length in enumerate(np.asarray(state.length)):
        committed = slice(0, int(length) - 1)  # the last token has no features yet
        np.testing.assert_allclose(state.draft[row, committed], features[row, committed], atol=2e-5)


def test_the_plain_loop_feeds_one_position_a_step():
    lm = language_model(CONFIG)
    checked = request.complete(request.check(jax.random.key(3), PROMPT, LENGTH, N, None, (), Sampling()))
    state, _ = speculate.prefill(lm, PARAMS, checked, PROMPT.shape[1] + N + 1, 0)
    step = jax.jit(lambda state: rounds.plain_step(lm, PARAMS, state))
    for _ in range(4):
        state = step(state)
        features = features_of(state.tokens)
        for row, length in enumerate(np.asarray(state.length)):
            np.testing.assert_allclose(state.features[row, 0], features[row, length - 2], atol=2e-5)
        assert state.features.shape == (4, 1, 3 * CONFIG.width)
        assert (state.num_fresh == 1).all()


def test_without_feature_layers_nothing_is_computed():
    plain = dataclasses.replace(CONFIG, feature_layers=())
    cache = language_model(plain).init_cache(1, 4)
    assert language_model(plain).apply(PARAMS, jnp.zeros((1, 2), jnp.int32), cache, jnp.zeros(1, jnp.int32))[1] is None
