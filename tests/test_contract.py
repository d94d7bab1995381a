"""Every draft and every verifier: the names of the contract, and a loop that runs whatever they are."""

import inspect
import itertools

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec import groups, speculate, verify
from jaxspec.draft import model_draft, ngram_draft
from jaxspec.sampling import Sampling

V, K, N = 6, 3, 9
LM = fakes.hash_model()
TARGET = fakes.table(0, V)
NEAR = TARGET + fakes.table(1, V, scale=0.5)
PROMPT, PROMPT_LENGTH = fakes.prompts(seed=3, batch=5, width=4, vocab=V + 3)  # ids from V up occur in prompts alone
SAMPLINGS = [Sampling(temperature=0.0), Sampling(), Sampling(top_k=3), Sampling(top_p=0.9), Sampling(repetition_window=3)]
BLOCK = jax.random.normal(jax.random.key(8), (V, K, V))
HEADS = jnp.stack([TARGET] * K)

DRAFTS = {
    "model": (model_draft(LM, K), NEAR),
    "ngram": (ngram_draft(K, V), None),
    "heads on the features": (fakes.feature_heads(K), HEADS),
    "block": (fakes.block_drafter(K, V), BLOCK),
}
GROUPS = groups.acoustic_similarity_groups(np.random.default_rng(0).normal(size=(V, 3)), 0.3)
VERIFIERS = {
    "exact": verify.exact(),
    "tolerance": verify.tolerance(0.4),
    "coarse_grained": verify.coarse_grained(GROUPS),
    "block_exact": verify.block_exact(),
    "block_tolerance": verify.block_tolerance(0.4),
    "block_coarse_grained": verify.block_coarse_grained(GROUPS),
}
# A verifier is given only the tokens and probs of a draft: one verifier covers each draft, one draft each verifier.
PAIRS = [*((draft, "exact") for draft in DRAFTS), *zip(itertools.cycle(DRAFTS), list(VERIFIERS)[1:])]


@pytest.mark.parametrize("name", DRAFTS)
def test_a_draft_has_the_names_of_the_contract(name):
    draft, _ = DRAFTS[name]
    assert list(inspect.signature(draft.init).parameters) == ["params", "prompt", "prompt_length", "cells", "features"]
    assert list(inspect.signature(draft.propose).parameters) == ["params", "keys", "context", "state"]
    hash(draft)


@pytest.mark.parametrize("name", VERIFIERS)
@pytest.mark.parametrize("length", [0, 1, K])
def test_a_verifier_keeps_the_contract(name, length):
    names = ["key", "draft_tokens", "draft_probs", "target_probs"]
    assert list(inspect.signature(VERIFIERS[name]).parameters) == names
    probs = jax.nn.softmax(jax.random.normal(jax.random.key(1), (2 * K + 1, V)))
    verdict = VERIFIERS[name](jax.random.key(0), jnp.arange(length), probs[:length], probs[K : K + length + 1])
    for value in (verdict.num_accepted, verdict.token, verdict.num_exact):
        assert value.shape == ()
        assert value.dtype == jnp.int32
    assert 0 <= verdict.num_exact <= verdict.num_accepted <= length
    assert 0 <= verdict.token < V


def test_the_same_arguments_build_the_same_draft():
    """So that a second call finds the compiled program of the first."""
    assert model_draft(LM, K) is DRAFTS["model"][0]
    assert ngram_draft(K, V) is DRAFTS["ngram"][0]


@pytest.mark.parametrize(("draft", "verifier"), PAIRS)
def test_every_draft_and_every_verifier_in_the_loop(draft, verifier):
    built, params = DRAFTS[draft]
    settings = {"max_new_tokens": N, "stop_ids": (5,), "sampling": SAMPLINGS}
    out = speculate.generate(jax.random.key(2), LM, TARGET, built, params, VERIFIERS[verifier], PROMPT, PROMPT_LENGTH, **settings)
    fakes.assert_counted(out)
    drawn = np.asarray(out.tokens)
    assert ((drawn >= -1) & (drawn < V)).all()
    if verifier in ("exact", "block_exact"):
        oracle = speculate.autoregressive(jax.random.key(2), LM, TARGET, PROMPT, PROMPT_LENGTH, **settings)
        np.testing.assert_array_equal(out.tokens[0], oracle.tokens[0])  # the greedy row
        np.testing.assert_array_equal(out.info.exact_matches, out.info.accepted)


def test_other_groups_compile_nothing():
    trace = []
    lm = fakes.counting_model(trace)
    for i, members in enumerate((GROUPS.members, GROUPS.members[:, ::-1])):
        before, rule = len(trace), verify.coarse_grained(GROUPS._replace(members=members))
        speculate.generate(jax.random.key(0), lm, TARGET, model_draft(lm, K), NEAR, rule, PROMPT, PROMPT_LENGTH, max_new_tokens=N)
        assert (len(trace) > before) == (i == 0)
