"""What holds for a request in any batch with a real transformer: the same draws; the same tokens up to the rounding of logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec import speculate, verify
from jaxspec.draft import model_draft
from jaxspec.models.transformer import Config, Transformer, init_params, language_model
from jaxspec.sampling import Sampling

V, K, N, B = 64, 3, 24, 12
CONFIG = Config((V, 8), V, width=64, layers=3, heads=4, kv_heads=2, head_dim=16, mlp_width=96)
SMALL = dataclasses.replace(CONFIG, layers=1)
PARAMS, DRAFT_PARAMS = init_params(jax.random.key(0), CONFIG), init_params(jax.random.key(1), SMALL)
RNG = np.random.default_rng(0)
PROMPT, LENGTH = RNG.integers(0, V + 8, (B, 6)).astype(np.int32), RNG.integers(1, 7, B).astype(np.int32)
KEYS = jax.random.split(jax.random.key(5), B)
ROUNDING = 1e-4  # of logits that are of order 1; float32 on CPU differs by 3e-6 between shapes of a batch


def say(rows, params=PARAMS):
    """The emitted tokens of some rows in one batch."""
    draft = model_draft(language_model(SMALL), K)
    models = (language_model(CONFIG), params, draft, DRAFT_PARAMS)
    sampling = [Sampling(temperature=0.8, top_p=0.95) if row % 3 else Sampling(temperature=0) for row in rows]
    out = speculate.generate(KEYS[rows], *models, verify.exact(), PROMPT[rows], LENGTH[rows], max_new_tokens=N, sampling=sampling)
    return np.asarray(out.tokens)


def test_the_logits_of_a_row_differ_between_batches_by_rounding_only():
    together, _, _ = Transformer(CONFIG).apply({"params": PARAMS}, jnp.asarray(PROMPT))
    for row in range(B):
        alone, _, _ = Transformer(CONFIG).apply({"params": PARAMS}, jnp.asarray(PROMPT[row : row + 1]))
        np.testing.assert_allclose(alone[0], together[row], atol=ROUNDING)


def test_a_request_gets_the_same_tokens_alone_and_in_any_slot():
    """Up to rounding: a first difference must lie where rounding can decide. With these seeds in float32 there is none."""
    everything = np.arange(B)
    whole = say(everything)
    order = RNG.permutation(B)
    np.testing.assert_array_equal(say(order), whole[order])
    for row in range(0, B, 5):
        np.testing.assert_array_equal(say(np.array([row])), whole[[row]])


def test_other_randomness_gives_other_tokens():
    """So that the test above can fail."""
    rows = np.arange(B)
    draft = model_draft(language_model(SMALL), K)
    out = speculate.generate(
        jax.random.split(jax.random.key(6), B),
        language_model(CONFIG),
        PARAMS,
        draft,
        DRAFT_PARAMS,
        verify.exact(),
        PROMPT,
        LENGTH,
        max_new_tokens=N,
        sampling=Sampling(temperature=0.8, top_p=0.95),
    )
    assert (np.asarray(out.tokens) != say(rows)).any(1).sum() > B // 2


def test_few_rows_differ_in_bfloat16_and_where_they_do_the_logits_are_close():
    """bfloat16 keeps some 3 digits of a logit: rows may part where two tokens are closer than that."""
    half = dataclasses.replace(CONFIG, dtype="bfloat16")
    lm, params = language_model(half), jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    call = lambda rows: np.asarray(  # noqa: E731
        speculate.autoregressive(KEYS[rows], lm, params, PROMPT[rows], LENGTH[rows], max_new_tokens=N).tokens
    )
    whole, rows = call(np.arange(B)), np.arange(0, B, 2)
    same = [(call(np.array([row]))[0] == whole[row]).all() for row in rows]
    assert sum(same) >= len(rows) - 3
