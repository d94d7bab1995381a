"""The loop in segments: equal to ``generate`` however it is cut, also for rows that arrive and leave at any time."""

import itertools

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec import groups, request, speculate, verify
from jaxspec.draft import model_draft, ngram_draft
from jaxspec.sampling import Sampling
from jaxspec.state import PAD, RUNNING, Counts

V, K, N, SLOTS = 6, 3, 9, 3
LM = fakes.hash_model()
TARGET = fakes.table(0, V)
CELLS = 5 + N + K + 1
SAMPLINGS = [Sampling(temperature=0.0), Sampling(), Sampling(top_k=3), Sampling(top_p=0.9), Sampling(repetition_window=3)]
GROUPS = groups.acoustic_similarity_groups(np.random.default_rng(0).normal(size=(V, 3)), 0.3)
DRAFTS = {
    "model": (model_draft(LM, K), TARGET + fakes.table(1, V, scale=0.5)),
    "ngram": (ngram_draft(K, V), None),
    "heads on the features": (fakes.feature_heads(K), jnp.stack([TARGET] * K)),
    "block": (fakes.block_drafter(K, V), jax.random.normal(jax.random.key(8), (V, K, V))),
    "none": (None, None),
}
VERIFIERS = {"exact": verify.exact(), "tolerance": verify.tolerance(0.4), "coarse_grained": verify.coarse_grained(GROUPS)}


def one_request(i):
    """Request i of a stream: a prompt of one of two widths, its own key, limit, stop ids and sampling."""
    rng = np.random.default_rng(i)
    width = int(rng.choice([3, 5]))
    prompt, length = rng.integers(0, V, (1, width)).astype(np.int32), np.array([rng.integers(1, width + 1)], np.int32)
    stops = ((5, 5), (0, 5), (4, 5))[i % 3]
    return jax.random.split(jax.random.key(100 + i), 1), prompt, length, int(rng.integers(1, N + 1)), stops, SAMPLINGS[i % 5]


def checked(i):
    key, prompt, length, limit, stops, sampling = one_request(i)
    return request.check(key, prompt, length, N, limit, stops, sampling)


def alone(i, models, rule):
    key, prompt, length, limit, stops, sampling = one_request(i)
    prompt = np.pad(prompt, ((0, 0), (0, 5 - prompt.shape[1])))  # one width, so that one program serves all
    settings = {"max_new_tokens": N, "limit": limit, "stop_ids": stops, "sampling": sampling}
    if models[2] is None:
        out = speculate.autoregressive(key, *models[:2], prompt, length, **settings)
    else:
        out = speculate.generate(key, *models, rule, prompt, length, **settings)
    said = slice(0, int(out.length[0]))
    counts = [np.asarray(getattr(out.info, name)[0]).tolist() for name in Counts._fields]
    return np.asarray(out.tokens[0, said]).tolist(), np.asarray(out.info.origin[0, said]).tolist(), counts


def empty_state(models):
    """Slots that have all finished."""
    prompt = np.zeros((SLOTS, 5), np.int32)
    idle = request.check(jax.random.key(0), prompt, np.ones(SLOTS, np.int32), N, 0, (1, 2), Sampling())
    return speculate.init(*models, idle, CELLS)


@pytest.mark.parametrize(("draft", "verifier"), list(zip(DRAFTS, itertools.cycle(VERIFIERS))))
def test_rows_that_arrive_and_leave_at_random_equal_themselves_alone(draft, verifier):
    built, params = DRAFTS[draft]
    models, rule = (LM, TARGET, built, params), VERIFIERS[verifier]
    rng, waiting, running, said = np.random.default_rng(1), list(range(8)), {}, {i: ([], []) for i in range(8)}
    counts = {}
    state, since = empty_state(models), np.zeros(SLOTS, np.int32)
    while waiting or running:
        for slot in range(SLOTS):
            if slot not in running and waiting and rng.random() < 0.6:
                running[slot] = waiting.pop(0)
                state, since[slot] = speculate.admit(*models, state, slot, checked(running[slot])), 0
        state = speculate.advance(*models, rule, state, int(rng.integers(1, 3)))
        new = speculate.emitted(state, since)
        for slot in list(running):
            count = int(new.length[slot])
            assert (np.asarray(new.tokens[slot, count:]) == PAD).all()
            for parts, row in zip(said[running[slot]], (new.tokens, new.origin), strict=True):
                parts += np.asarray(row[slot, :count]).tolist()
            counts[running[slot]] = [np.asarray(total[slot]).tolist() for total in new.counts]
            since[slot] += count
            if int(new.stop_reason[slot]) != RUNNING:
                del running[slot]
    for i, parts in said.items():
        assert (*parts, counts[i]) == alone(i, models, rule), i


def test_segments_of_any_length_give_the_tokens_of_generate():
    built, params = DRAFTS["model"]
    models, rule = (LM, TARGET, built, params), VERIFIERS["exact"]
    prompt, length = fakes.prompts(seed=3, batch=5, width=4, vocab=V)
    settings = {"limit": [N, 3, 0, N, 5], "stop_ids": (5,), "sampling": SAMPLINGS}
    whole = speculate.generate(jax.random.key(2), *models, rule, prompt, length, max_new_tokens=N, **settings)
    for segment in (1, 2, 100):
        asked = request.check(jax.random.key(2), prompt, length, N, **settings)
        state = speculate.init(*models, asked, 4 + N + K + 1)
        asked_for = 0
        while bool(speculate.is_running(state)):
            state, asked_for = speculate.advance(*models, rule, state, segment), asked_for + segment
            assert int(state.counts.rounds.max()) == min(asked_for, int(whole.info.rounds.max()))
        jax.tree.map(np.testing.assert_array_equal, speculate.finish(state, N), whole)


def test_admission_leaves_the_other_rows_as_they_are():
    built, params = DRAFTS["heads on the features"]
    models = (LM, TARGET, built, params)
    state = speculate.admit(*models, empty_state(models), 0, checked(0))
    before = jax.tree.map(np.array, state._replace(keys=jax.random.key_data(state.keys)))
    after = speculate.admit(*models, state, 1, checked(1))
    after = after._replace(keys=jax.random.key_data(after.keys))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[[0, 2]], np.asarray(b)[[0, 2]]), before, after)
    assert int(after.stop_reason[1]) == RUNNING


def test_emitted_returns_at_most_a_width():
    built, params = DRAFTS["ngram"]
    models = (LM, TARGET, built, params)
    state = speculate.advance(*models, VERIFIERS["exact"], speculate.admit(*models, empty_state(models), 2, checked(3)), 99)
    everything = speculate.emitted(state, np.zeros(SLOTS, np.int32))
    some = speculate.emitted(state, np.array([0, 0, 1], np.int32), 2)
    assert some.tokens.shape == (SLOTS, 2)
    assert int(some.length[2]) == min(2, int(everything.length[2]) - 1)
    count = int(some.length[2])
    np.testing.assert_array_equal(some.tokens[2, :count], everything.tokens[2, 1 : 1 + count])


def test_a_request_that_does_not_fit_is_refused():
    built, params = DRAFTS["ngram"]
    models = (LM, TARGET, built, params)
    state = empty_state(models)
    key = jax.random.key(0)
    two = request.check(key, np.zeros((2, 3), np.int32), [1, 1], N)
    with pytest.raises(ValueError, match="of one row"):
        speculate.admit(*models, state, 0, two)
    with pytest.raises(ValueError, match="at most 2 stop ids"):
        speculate.admit(*models, state, 0, request.check(key, np.zeros((1, 3), np.int32), [1], N, None, (1, 2, 3)))
    with pytest.raises(ValueError, match="fits 18 cells, got one that needs 37"):
        speculate.admit(*models, state, 0, request.check(key, np.zeros((1, 3), np.int32), [3], 30))
    with pytest.raises(ValueError, match="at least 19 cells"):
        speculate.admit(*models, state, 0, request.check(key, np.zeros((1, 15), np.int32), [1], 1))
    speculate.admit(*models, state, 0, request.check(key, np.zeros((1, 14), np.int32), [1], 1))
