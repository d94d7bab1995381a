"""The loop against its oracle, the oracle against numpy, the distribution of whole sequences, and the independence of rows."""

import itertools
import json
import pathlib

import chi_square
import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec import request, rounds, sampling, speculate
from jaxspec import state as state_lib
from jaxspec.draft import model_draft, ngram_draft
from jaxspec.sampling import Sampling
from jaxspec.types import Draft, History
from jaxspec.verify import exact

V = 7
GREEDY = Sampling(temperature=0.0)
PROMPT, PROMPT_LENGTH = fakes.prompts(seed=0, batch=6, width=5, vocab=V)
TARGET = fakes.table(seed=0, vocab=V).at[:, 6].add(-1.5)  # 6 is the stop token; rows should not end at once
DRAFT = TARGET + fakes.table(seed=1, vocab=V, scale=0.4)
LM = fakes.hash_model()


N = 12
USUAL = {"max_new_tokens": N, "stop_ids": (6,)}  # tests that share it, and K = 3, share the compiled program


def speculative(
    K=3, key=None, draft_params=DRAFT, verify=None, prompt=PROMPT, prompt_length=PROMPT_LENGTH, lm=LM, params=TARGET, **settings
):
    key = jax.random.key(7) if key is None else key
    draft, verify, settings = model_draft(lm, K), verify or exact(), USUAL | settings
    return speculate.generate(key, lm, params, draft, draft_params, verify, prompt, prompt_length, **settings)


def plain(key=None, params=TARGET, prompt=PROMPT, prompt_length=PROMPT_LENGTH, lm=LM, **settings):
    key = jax.random.key(7) if key is None else key
    return speculate.autoregressive(key, lm, params, prompt, prompt_length, **USUAL | settings)


# --- the oracle ---------------------------------------------------------------------------------------------------------


def by_hand(prompt, limit, stop):
    """Greedy decoding of one row in numpy, from the definition of the fake model."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < limit:
        tokens.append(int(np.argmax(np.asarray(TARGET)[fakes.prefix_hash(tokens)])))
        if tokens[-1] == stop:
            return tokens[len(prompt) :], state_lib.STOP_TOKEN
    return tokens[len(prompt) :], state_lib.LENGTH_LIMIT


def test_the_oracle_agrees_with_numpy():
    limits = [12, 5, 0, 12, 3, 12]
    out = plain(limit=limits, sampling=GREEDY)
    for i, limit in enumerate(limits):
        tokens, reason = by_hand(PROMPT[i, : PROMPT_LENGTH[i]], limit, stop=6)
        assert out.tokens[i, : len(tokens)].tolist() == tokens
        assert int(out.length[i]) == len(tokens)
        assert int(out.info.stop_reason[i]) == reason
    fakes.assert_counted(out)


@pytest.mark.parametrize("K", [0, 1, 4])
def test_greedy_speculation_is_greedy_decoding(K):
    prompt, length = fakes.prompts(seed=2, batch=32, width=5, vocab=V)
    settings = {"limit": [12, 10, 7, 3] * 8, "stop_ids": (3,), "sampling": GREEDY}
    expected = plain(prompt=prompt, prompt_length=length, **settings)
    out = speculative(K, prompt=prompt, prompt_length=length, **settings)
    np.testing.assert_array_equal(out.tokens, expected.tokens)
    np.testing.assert_array_equal(out.info.stop_reason, expected.info.stop_reason)
    fakes.assert_counted(out)
    if K > 1:  # the ends that are easy to get wrong do occur: inside an accepted block, that is on an accepted token
        last = np.asarray(out.info.origin)[np.arange(32), np.asarray(out.length) - 1]
        for reason in (state_lib.STOP_TOKEN, state_lib.LENGTH_LIMIT):
            assert ((last == state_lib.ACCEPTED) & (np.asarray(out.info.stop_reason) == reason)).any()


def test_without_drafts_the_same_keys_give_the_same_tokens():
    out = speculative(0, verify=fakes.reject_all)  # which draws with the round's key as it is
    jax.tree.map(np.testing.assert_array_equal, out, plain())


@pytest.mark.parametrize(("K", "N"), [(1, 8), (3, 11)])
def test_a_self_draft_is_always_accepted(K, N):
    """Fails when the draft's cache has a hole after a full accept, or when a prompt of one token confuses it."""
    lm = fakes.hash_model(garbage=50)
    out = speculative(
        K,
        draft_params=TARGET,
        prompt_length=[1, 2, 3, 4, 5, 1],
        max_new_tokens=N,
        stop_ids=(),
        lm=lm,
        sampling=[GREEDY, Sampling(), Sampling(repetition_window=3)] * 2,
    )
    assert (out.info.rounds == -(-N // (K + 1))).all()
    np.testing.assert_array_equal(out.info.accepted, out.info.drafted)
    assert (out.info.drafted == N - N // (K + 1)).all()
    fakes.assert_counted(out)


# --- the distribution of whole sequences ---------------------------------------------------------------------------------


SAMPLINGS = {
    "plain": Sampling(),
    "warped": Sampling(temperature=0.8, top_k=4, top_p=0.95, min_p=0.02, repetition_penalty=1.3),
    "repetition-aware": Sampling(top_p=0.8, top_k=4, repetition_window=2),
    "repetition-aware, older": Sampling(top_p=0.8, top_k=4, repetition_window=2, repetition_redraw_all=True),
    "withholding": Sampling(top_k=3, withheld=1, min_new_tokens=3),
}


def sequence_probs(settings, prompt, vocab, N, params):
    """The probability of each of the V^N continuations of a prompt, by the chain rule."""
    sequences = np.array(list(itertools.product(range(vocab), repeat=N)), np.int32)
    tokens = np.concatenate([np.tile(np.int32(prompt), (len(sequences), 1)), sequences], axis=1)
    logits = np.asarray(params)[[[fakes.prefix_hash(row[: len(prompt) + n]) for n in range(N)] for row in tokens]]
    start = np.full(len(tokens), len(prompt), np.int32)
    history = History(jnp.asarray(tokens), start, start[:, None] + np.arange(N))
    probs = jax.jit(sampling.probabilities)(logits, sampling.rows(settings, len(tokens)), history)
    return np.take_along_axis(np.asarray(probs, np.float64), sequences[:, :, None], axis=2).prod(axis=(1, 2))


@pytest.mark.parametrize("loop", ["autoregressive", "model", "ngram"])
def test_the_distribution_of_the_emitted_sequence(loop):
    """10,000 sequences of four tokens, so of two rounds or more, for each of the enumerated distributions, which share a batch.

    Four tests of ``chi_square.FALSE_ALARM`` each.
    """
    vocab, N, each = 4, 4, 10_000
    params, prompt = fakes.table(3, vocab), [2, 0]
    batch = each * len(SAMPLINGS)
    prompts, lengths = np.tile(np.int32(prompt), (batch, 1)), np.full(batch, 2, np.int32)
    mixed = [settings for settings in SAMPLINGS.values() for _ in range(each)]
    key, shared = jax.random.key(11), {"max_new_tokens": N, "sampling": mixed}
    if loop == "autoregressive":
        out = speculate.autoregressive(key, LM, params, prompts, lengths, **shared)
    else:
        draft = model_draft(LM, 2) if loop == "model" else ngram_draft(2, vocab, order=1)
        draft_params = params + fakes.table(4, vocab, scale=0.7)
        out = speculate.generate(key, LM, params, draft, draft_params, exact(), prompts, lengths, **shared)
        assert 0.1 < float(out.info.accepted.sum() / out.info.drafted.sum()) < 0.9
    for i, settings in enumerate(SAMPLINGS.values()):
        sequences = np.asarray(out.tokens[i * each : (i + 1) * each]) @ vocab ** np.arange(N)[::-1]
        chi_square.assert_distribution(sequences, sequence_probs(settings, prompt, vocab, N, params))


# --- rows are independent -----------------------------------------------------------------------------------------------


MIXED = [GREEDY, Sampling(), Sampling(temperature=0.7, top_k=3), Sampling(top_p=0.9), GREEDY, Sampling(repetition_window=4)]


@pytest.mark.parametrize("loop", [plain, speculative], ids=["plain", "speculative"])
def test_a_row_alone_is_the_row_in_its_batch(loop):
    """Beside rows that are greedy, sampled, and finished from the start or soon; in another slot too."""
    keys = jax.random.split(jax.random.key(5), 6)
    limits = np.array([12, 0, 12, 12, 1, 12], np.int32)
    whole = loop(key=keys, limit=limits, sampling=MIXED)
    order = np.array([3, 5, 0, 2, 1, 4])
    moved = loop(
        key=keys[order],
        prompt=PROMPT[order],
        prompt_length=PROMPT_LENGTH[order],
        limit=limits[order],
        sampling=[MIXED[i] for i in order],
    )
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[order], b), whole, moved)
    for i in range(6):
        one = slice(i, i + 1)
        alone = loop(
            key=keys[one],
            prompt=PROMPT[one],
            prompt_length=PROMPT_LENGTH[one],
            limit=limits[one],
            sampling=MIXED[i],
        )
        jax.tree.map(lambda a, b, one=one: np.testing.assert_array_equal(a[one], b), whole, alone)
    assert (whole.length <= limits).all()


def test_one_key_is_folded_by_row_and_decides_the_tokens():
    key = jax.random.key(9)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(6))
    out = speculative(key=key)
    np.testing.assert_array_equal(out.tokens, speculative(key=keys).tokens)
    np.testing.assert_array_equal(out.tokens, speculative(key=jax.random.PRNGKey(9)).tokens)
    assert not np.array_equal(out.tokens, speculative(key=jax.random.key(10)).tokens)


def test_garbage_in_the_caches_and_the_padding_changes_nothing():
    clean = speculative()
    jax.tree.map(np.testing.assert_array_equal, clean, speculative(lm=fakes.hash_model(garbage=10**6)))
    padded = np.where(np.arange(5) < PROMPT_LENGTH[:, None], PROMPT, -1)
    jax.tree.map(np.testing.assert_array_equal, clean, speculative(prompt=padded))


CELLS = PROMPT.shape[1] + N + 3 + 1


def started(limit=None):
    checked = request.check(jax.random.key(7), PROMPT, PROMPT_LENGTH, N, limit, (6,), Sampling())
    return speculate.init(LM, TARGET, model_draft(LM, 3), DRAFT, checked, CELLS)


@jax.jit
def advance(state):
    return rounds.step(LM, TARGET, model_draft(LM, 3), DRAFT, exact(), state)


def test_finished_rows_do_not_move():
    state = started(limit=[0, 12, 1, 12, 12, 0])
    seen = lambda state: state._replace(cache=(), draft=(), keys=())  # noqa: E731
    while bool(speculate.is_running(state)):
        new = advance(state)
        done = np.asarray(state.stop_reason != state_lib.RUNNING)
        for a, b in zip(seen(state), seen(new), strict=True):
            jax.tree.map(lambda a, b, done=done: np.testing.assert_array_equal(a[done], b[done]) if a.size else None, a, b)
        assert (new.length[~done] > state.length[~done]).all()
        state = new
    again = advance(state)
    jax.tree.map(np.testing.assert_array_equal, seen(state), seen(again))


def test_the_features_are_those_that_predicted_the_last_token():
    state = started()
    assert (state.features == 0).all()
    while bool(speculate.is_running(state)):
        state = advance(state)
        newest = fakes.newest(state.features, state.num_fresh, state.features[:, 0])
        for tokens, length, features in zip(state.tokens, state.length, newest, strict=True):
            assert int(features.argmax()) == fakes.prefix_hash(tokens[: length - 1].tolist())


# --- distributions that are not finite ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("how", [GREEDY, Sampling()], ids=["greedy", "sampled"])
def test_a_distribution_that_is_not_finite_ends_its_row_and_no_other(bad, how):
    clean = plain(sampling=how)
    row = int(clean.length.argmax())
    after = int(clean.length[row]) - 2
    assert after > 1
    prefix = PROMPT[row, : PROMPT_LENGTH[row]].tolist() + clean.tokens[row, :after].tolist()
    broken = TARGET.at[fakes.prefix_hash(prefix), 2].set(bad)
    out = plain(sampling=how, params=broken)
    assert int(out.info.stop_reason[row]) == state_lib.NON_FINITE
    assert out.tokens[row].tolist() == clean.tokens[row, :after].tolist() + [state_lib.PAD] * (N - after)
    fine = np.asarray(out.info.stop_reason != state_lib.NON_FINITE)
    np.testing.assert_array_equal(out.tokens[fine], clean.tokens[fine])
    assert fine.any()
    drafted = speculative(params=broken, sampling=how)
    fakes.assert_counted(drafted)
    if how is GREEDY:
        np.testing.assert_array_equal(drafted.tokens, out.tokens)
        np.testing.assert_array_equal(drafted.info.stop_reason, out.info.stop_reason)


def test_a_draft_whose_distribution_is_not_finite_ends_its_row():
    out = speculative(draft_params=jnp.full_like(DRAFT, jnp.nan))
    assert (out.info.stop_reason == state_lib.NON_FINITE).all()
    assert (out.length == 0).all()


# --- compiling ----------------------------------------------------------------------------------------------------------


def test_one_trace_for_many_calls():
    trace = []
    lm = fakes.counting_model(trace)
    draft = model_draft(lm, 2)

    def call(seed, limit, how):
        prompt, length = fakes.prompts(seed, 4, 5, V)
        settings = {"max_new_tokens": 6, "limit": limit, "stop_ids": (1,), "sampling": how}
        speculate.generate(jax.random.key(seed), lm, TARGET * seed, draft, DRAFT, exact(), prompt, length, **settings)
        speculate.autoregressive(jax.random.key(seed), lm, TARGET * seed, prompt, length, **settings)

    call(1, None, Sampling())
    first = len(trace)
    assert first > 0
    call(2, [1, 2, 3, 4], [GREEDY, Sampling(top_k=3), Sampling(repetition_window=2), Sampling(top_p=0.5)])
    call(3, 2, GREEDY)
    assert len(trace) == first


def test_the_loop_runs_under_a_callers_jit():
    call = jax.jit(lambda prompt, length: plain(prompt=prompt, prompt_length=length).tokens)
    np.testing.assert_array_equal(call(PROMPT, PROMPT_LENGTH), plain().tokens)


# --- the border, beyond what tests/test_request.py has -------------------------------------------------------------------


def test_a_stop_id_that_cannot_be_drawn_is_named():
    for loop in (plain, speculative):
        with pytest.raises(ValueError, match="stop ids within the head's vocabulary, 0 to 6"):
            loop(stop_ids=(V,))


def test_a_draft_of_another_vocabulary_is_named():
    with pytest.raises(ValueError, match="propose tokens and probs of shapes"):
        speculative(draft_params=fakes.table(0, V + 1))
    lying = Draft(3, *model_draft(LM, 2)[1:])
    with pytest.raises(ValueError, match="propose tokens and probs of shapes"):
        speculate.generate(jax.random.key(0), LM, TARGET, lying, DRAFT, exact(), PROMPT, PROMPT_LENGTH, max_new_tokens=8)


@pytest.mark.parametrize("build", [lambda: model_draft(LM, -1), lambda: ngram_draft(-1, V), lambda: ngram_draft(2, V, order=0)])
def test_a_wrong_draft_length_is_named(build):
    with pytest.raises(ValueError, match="draft length of 0 or more"):
        build()


# --- the golden trace ---------------------------------------------------------------------------------------------------


def test_the_golden_trace():
    """A change to this trace is a decision, and is said in the commit that makes it."""
    out = speculative(sampling=MIXED)
    came = {"tokens": out.tokens, "accepted": out.info.accepted, "rounds": out.info.rounds}
    came = {name: np.asarray(value).tolist() for name, value in came.items()}
    assert came == json.loads(pathlib.Path(__file__).with_name("golden_trace.json").read_text())
