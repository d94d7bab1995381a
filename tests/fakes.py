"""Models, drafts and verifiers small enough to be solved by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec import sampling
from jaxspec.state import ACCEPTED, PAD, RUNNING
from jaxspec.types import Draft, History, LanguageModel, Proposal, Verdict

HASHES = 97


def table(seed, vocab, scale=1.5):
    """Parameters of a hash model: a row of logits [V] for each hash of a prefix."""
    return scale * jax.random.normal(jax.random.key(seed), (HASHES, vocab))


def prefix_hash(tokens):
    """The hash of a prefix, in numpy: every token and its place matter."""
    return int(sum((int(token) + 1) * pow(5, place, HASHES) for place, token in enumerate(tokens)) % HASHES)


def _apply(params, tokens, cache, length, trace=None):
    if trace is not None:
        trace.append(tokens.shape)
    put = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
    cache = jax.vmap(put)(cache, tokens, length)
    weight = jnp.array([pow(5, place, HASHES) for place in range(cache.shape[1])])
    position = length[:, None] + jnp.arange(tokens.shape[1])[None]
    seen = jnp.arange(cache.shape[1])[None, None] <= position[:, :, None]
    hashed = (jnp.where(seen, (cache[:, None] + 1) % HASHES, 0) * weight[None, None] % HASHES).sum(-1) % HASHES
    return params[hashed], jax.nn.one_hot(hashed, HASHES), cache


@functools.lru_cache
def hash_model(garbage=0):
    """A model whose logits depend on the whole prefix through the tokens in its cache; cells start as ``garbage``."""
    return LanguageModel(_apply, lambda batch, cells: jnp.full((batch, cells), garbage, jnp.int32))


def counting_model(trace):
    """The hash model that appends to ``trace`` the shape of the block at each tracing."""
    return LanguageModel(functools.partial(_apply, trace=trace), hash_model().init_cache)


def feature_heads(draft_length):
    """Heads on the target's features, all drawn at once, each blind to what the others draw (like Medusa): params [K F V]."""

    def propose(params, keys, context, state):
        state = newest(context.features, context.num_fresh, state)
        logits = jnp.einsum("bf,kfv->bkv", state, params)
        return _independent(keys, logits, context), state

    def init(params, prompt, prompt_length, cells, features):
        """The features that predicted the last token of the prompt; zeros for a prompt of one token."""
        return newest(features, prompt_length - 1, jnp.zeros_like(features[:, 0]))

    return Draft(draft_length, init, propose)


def newest(features, count, otherwise):
    """Row count - 1 of the features [B T F], or ``otherwise`` [B F] where the count [B] is 0."""
    last = jnp.take_along_axis(features, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
    return jnp.where(count[:, None] > 0, last, otherwise)


def block_drafter(draft_length, vocab):
    """A drafter that fills a block from its own state and the last token: params [V K V], state the number of rounds so far."""

    def propose(params, keys, context, state):
        logits = params[jnp.minimum(context.last, vocab - 1)] / (1 + state[:, None, None])
        return _independent(keys, logits, context), state + 1

    return Draft(draft_length, lambda params, prompt, prompt_length, cells, features: jnp.zeros(prompt.shape[0]), propose)


def _independent(keys, logits, context):
    """Draws every token of a block by the row's distribution, each without sight of the others."""
    probs = sampling.probabilities(logits, context.sampling, History(context.tokens, context.start, context.length))
    return Proposal(jax.vmap(sampling.sample)(keys, probs), probs)


def accept_all(key, draft_tokens, draft_probs, target_probs):
    """Takes every drafted token, and then the target's most probable one."""
    return Verdict(jnp.int32(draft_tokens.shape[0]), jnp.argmax(target_probs[-1]).astype(jnp.int32))


def reject_all(key, draft_tokens, draft_probs, target_probs):
    """Takes no drafted token, and draws from the target's first distribution with the key as it is, as the plain loop does."""
    return Verdict(jnp.int32(0), sampling.sample(key, target_probs[0]))


def prompts(seed, batch, width, vocab):
    """Ragged prompts whose padding is garbage: (int32 [B P], int32 [B])."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, vocab, (batch, width)).astype(np.int32), rng.integers(1, width + 1, batch).astype(np.int32)


def assert_counted(generation):
    """What is true of every Info."""
    info, length = generation.info, np.asarray(generation.length)
    assert (np.asarray(generation.tokens) != PAD).sum(1).tolist() == length.tolist()
    by_origin = [(np.asarray(info.origin) == kind).sum(1) for kind in range(3)]
    np.testing.assert_array_equal(sum(by_origin), length)
    np.testing.assert_array_equal(by_origin[ACCEPTED], info.accepted)
    np.testing.assert_array_equal(info.accepted_per_position.sum(1), info.accepted)
    assert (info.accepted <= info.drafted).all()
    assert (info.exact_matches <= info.accepted).all()
    assert (info.stop_reason != RUNNING).all()
