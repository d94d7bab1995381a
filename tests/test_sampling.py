"""The sampling distribution, against transformers' processors and CosyVoice's procedure, and draws from it.

The statistical tests have fixed seeds; with fresh ones each would raise a false alarm once in 10,000 runs.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from chi_square import assert_distribution

from jaxspec import sampling as sampling_module
from jaxspec.sampling import MAX_WINDOW, Sampling, invert, rows, sample
from jaxspec.types import History

VOCAB = 40
LOGITS = np.random.default_rng(0).normal(0, 3, (16, VOCAB)).astype(np.float32)
TOKENS = np.random.default_rng(1).integers(0, VOCAB, (16, 12))


compiled = jax.jit(sampling_module.probabilities)


def probabilities(logits, sampling, history=None):
    """One compilation for each shape, whatever the settings."""
    if isinstance(sampling, Sampling):
        sampling = jax.tree.map(lambda field: field[0], rows(sampling, 1))
    return compiled(logits, sampling, history)


def whole_history(tokens):
    length = jnp.full(tokens.shape[:-1], tokens.shape[-1])
    return History(jnp.asarray(tokens), jnp.zeros_like(length), length)


def transformers_probs(sampling, logits, tokens):
    processors = transformers.LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(transformers.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    processors.append(transformers.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(transformers.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(transformers.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        processors.append(transformers.MinPLogitsWarper(sampling.min_p))
    return torch.softmax(processors(torch.tensor(tokens), torch.tensor(logits)), -1).numpy()


WARPERS = [
    Sampling(),
    Sampling(temperature=0.7),
    Sampling(top_k=1),
    Sampling(top_k=5, temperature=1.5),
    Sampling(top_k=VOCAB + 9),
    Sampling(top_p=0.8),
    Sampling(top_p=0.01),
    Sampling(min_p=0.2),
    Sampling(temperature=2.0, top_k=10, top_p=0.9, min_p=0.1),
    Sampling(repetition_penalty=1.3),
    Sampling(repetition_penalty=0.8, temperature=0.6, top_k=7, top_p=0.95),
]


@pytest.mark.parametrize("sampling", WARPERS)
def test_equals_transformers(sampling):
    probs = probabilities(jnp.asarray(LOGITS), sampling, whole_history(TOKENS))
    np.testing.assert_allclose(probs, transformers_probs(sampling, LOGITS, TOKENS), atol=2e-6)


def test_penalty_covers_the_prompt_and_nothing_beyond_the_length():
    tokens = np.concatenate([TOKENS, np.full((16, 3), VOCAB + 5), np.full((16, 2), -1), TOKENS[::-1]], axis=1)
    history = History(jnp.asarray(tokens), jnp.full(16, 4), jnp.full(16, 17))
    probs = probabilities(jnp.asarray(LOGITS), Sampling(repetition_penalty=1.5), history)
    np.testing.assert_allclose(probs, transformers_probs(Sampling(repetition_penalty=1.5), LOGITS, TOKENS), atol=2e-6)


def test_each_row_has_its_own_settings_and_greedy_rows_stay_greedy():
    settings = [*WARPERS, Sampling(temperature=0), Sampling(temperature=0, top_p=0.5), Sampling(top_p=0.8, repetition_window=10)]
    settings += [Sampling(temperature=0, repetition_penalty=1.3)] * (16 - len(settings))
    history = whole_history(TOKENS)
    together = probabilities(jnp.asarray(LOGITS), rows(settings, 16), history)
    for row, sampling in enumerate(settings):
        alone = probabilities(jnp.asarray(LOGITS[row]), sampling, jax.tree.map(lambda field, row=row: field[row], history))
        np.testing.assert_allclose(together[row], alone, atol=1e-7)
    np.testing.assert_array_equal(together[11], np.arange(VOCAB) == LOGITS[11].argmax())
    assert together[15].max() == 1


@pytest.mark.parametrize("sampling", [one for one in WARPERS if not (one.top_k and one.top_p < 1)])
def test_rough_limits_keep_little_more(sampling):
    """One token more by top-k may let top-p keep another, so that each limit is looked at alone."""
    logits = jnp.asarray(np.random.default_rng(5).normal(0, 3, (16, 5000)), jnp.float32)
    history = whole_history(TOKENS)
    probs, rough = (np.asarray(sampling_module.probabilities(logits, sampling, history, rough)) for rough in (False, True))
    np.testing.assert_allclose(rough.sum(-1), 1, rtol=1e-5)
    assert (rough[probs > 0] > 0).all()
    for exact, kept in zip(probs, rough, strict=True):
        assert (kept[kept > 0] >= kept[exact > 0].min() * np.exp(-0.01)).all()


def test_greedy_takes_the_lowest_of_equals():
    probs = probabilities(jnp.array([[1.0, 2.0, 2.0, -jnp.inf], [-jnp.inf] * 2 + [-5.0] * 2]), Sampling(temperature=0))
    np.testing.assert_array_equal(probs, [[0, 1, 0, 0], [0, 0, 1, 0]])


def test_ties_at_a_threshold_are_all_kept():
    logits = jnp.array([2.0, 1.0, 1.0, 1.0, 0.0])
    for sampling in (Sampling(top_k=2), Sampling(top_p=0.5)):
        np.testing.assert_array_equal(probabilities(logits, sampling) > 0, [True, True, True, True, False])


def test_forbidden_tokens_have_no_mass_and_bad_logits_give_nan():
    logits = jnp.array([[0.0, -jnp.inf, 1.0], [0.0, jnp.nan, 1.0], [0.0, -jnp.nan, 1.0], [jnp.inf, 0.0, 1.0], [-jnp.inf] * 3])
    for sampling in (Sampling(), Sampling(temperature=0), Sampling(top_k=1), Sampling(top_k=3, top_p=0.99, min_p=0.1)):
        probs = probabilities(logits, sampling)
        assert probs[0, 1] == 0
        np.testing.assert_allclose(probs[0].sum(), 1, rtol=1e-6)
        assert jnp.isnan(probs[1:]).all()


def test_a_block_sees_the_history_of_each_position():
    """Settings [B] and tokens [B S] with logits [B T V] and lengths [B T]."""
    rng = np.random.default_rng(5)
    logits, tokens = rng.normal(0, 2, (3, 4, 9)).astype(np.float32), rng.integers(0, 9, (3, 20))
    start, length = np.array([2, 6, 0]), np.array([[3, 4, 5, 6], [6, 7, 8, 9], [16, 17, 18, 19]])
    for variant in (False, True):
        each = [
            Sampling(top_k=w + 2, repetition_window=w, repetition_penalty=1.2, repetition_redraw_all=variant) for w in (1, 5, 9)
        ]
        probs = probabilities(
            jnp.asarray(logits), rows(each, 3), History(jnp.asarray(tokens), jnp.asarray(start), jnp.asarray(length))
        )
        for b in range(3):
            for t in range(4):
                history = History(jnp.asarray(tokens[b]), jnp.asarray(start[b]), jnp.asarray(length[b, t]))
                np.testing.assert_allclose(probs[b, t], probabilities(jnp.asarray(logits[b, t]), each[b], history), atol=1e-7)


def cosyvoice_nucleus(probs, top_p, top_k):
    """cosyvoice/utils/common.py: keep while the mass is below top_p and the count below top_k."""
    kept, mass = [], 0.0
    for token in np.argsort(-probs, kind="stable"):
        if mass >= top_p or len(kept) >= top_k:
            break
        kept.append(token)
        mass += probs[token]
    nucleus = np.zeros_like(probs)
    nucleus[kept] = probs[kept] / probs[kept].sum()
    return nucleus


def cosyvoice_draw(rng, probs, decoded, top_p, top_k, window, redraw_all):
    token = rng.choice(len(probs), p=cosyvoice_nucleus(probs, top_p, top_k))
    if token in decoded[-window:]:
        again = probs.copy()
        if not redraw_all:
            again[token] = 0
        token = rng.choice(len(probs), p=again / again.sum())
    return token


def repetition_case(seed, redraw_all, scale=2.0, vocab=12):
    """(softmax, emitted tokens, distribution), with prompt tokens before the window's start that must not count."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, scale, vocab).astype(np.float32)
    best = np.argsort(-logits)
    tokens = np.array([best[2], best[2], best[3], best[0], best[5], best[1], best[0], 0])
    history = History(jnp.asarray(tokens), jnp.int32(2), jnp.int32(7))
    sampling = Sampling(top_p=0.8, top_k=6, repetition_window=4, repetition_redraw_all=redraw_all)
    probs = np.exp(logits.astype(np.float64))
    return probs / probs.sum(), tokens[2:7], probabilities(jnp.asarray(logits), sampling, history)


@pytest.mark.parametrize("redraw_all", [False, True])
@pytest.mark.parametrize("scale", [0.5, 2.0, 8.0, 30.0])
def test_repetition_aware_distribution_equals_enumeration(redraw_all, scale):
    for seed in range(8):
        softmax, decoded, probs = repetition_case(seed, redraw_all, scale)
        nucleus = cosyvoice_nucleus(softmax, 0.8, 6)
        expected = np.zeros_like(softmax)
        for x in range(len(softmax)):
            if x not in decoded[-4:]:
                expected[x] += nucleus[x]
                continue
            again = np.where((np.arange(len(softmax)) == x) & (not redraw_all), 0, softmax)
            expected += nucleus[x] * again / again.sum()
        np.testing.assert_allclose(probs, expected, atol=2e-6)


@pytest.mark.parametrize("redraw_all", [False, True])
def test_repetition_aware_distribution_equals_the_procedure(redraw_all):
    rng = np.random.default_rng(7)
    softmax, decoded, probs = repetition_case(3, redraw_all)
    draws = [cosyvoice_draw(rng, softmax, decoded, 0.8, 6, 4, redraw_all) for _ in range(6000)]
    assert_distribution(draws, probs)


@pytest.mark.parametrize("window", [1, 3, MAX_WINDOW])
def test_the_window_ends_at_the_prompt_and_reaches_its_whole_length(window):
    """Each of 70 tokens is another id; those of the prompt, and those before the window, are not drawn again."""
    history = History(jnp.arange(80), jnp.int32(4), jnp.int32(74))
    logits = jnp.zeros(80)
    probs = probabilities(logits, Sampling(repetition_window=window), history)
    repeated = np.isin(np.arange(80), np.arange(74 - window, 74))
    expected = (np.where(repeated, 0, 1) + (window - repeated) / 79) / 80
    np.testing.assert_allclose(probs, expected, rtol=1e-5)
    short = History(jnp.arange(80), jnp.int32(72), jnp.int32(74))
    probs = probabilities(logits, Sampling(repetition_window=window), short)
    assert (probs < 1 / 80).sum() == min(window, 2)


def test_rows_without_top_p_keep_their_tail_beside_rows_with_it():
    """The tail is smaller than the rounding of the whole mass."""
    probs = probabilities(jnp.array([[0.0, -40.0, -50.0]] * 2), rows([Sampling(), Sampling(top_p=0.9)], 2))
    assert (probs > 0).tolist() == [[True, True, True], [True, False, False]]


def test_min_p_of_one_keeps_the_best_tokens():
    np.testing.assert_array_equal(probabilities(jnp.array([1.0, 3.0, 3.0]), Sampling(min_p=1)), [0, 0.5, 0.5])


def test_repetition_aware_sampling_at_its_limits():
    history = whole_history(np.array([1]))
    greedy = Sampling(temperature=0, repetition_window=10)
    np.testing.assert_array_equal(probabilities(jnp.array([1.0, 3.0, 2.0]), greedy, history), [0, 0, 1])
    only = jnp.array([-jnp.inf, 3.0, -jnp.inf])
    for sampling in (greedy, Sampling(repetition_window=10)):
        np.testing.assert_array_equal(probabilities(only, sampling, history), [0, 1, 0])
    # 1 - f(best) is 0 in float32: the others still share the redraw in their true proportion.
    probs = probabilities(jnp.array([0.0, 60.0, jnp.log(3.0)]), Sampling(repetition_window=10), history)
    np.testing.assert_allclose(probs, [0.25, 0, 0.75], rtol=1e-5)
    assert jnp.isnan(probabilities(jnp.array([1.0, jnp.nan, 2.0]), Sampling(repetition_window=10), history)).all()


@pytest.mark.parametrize("emitted", [0, 3, 4, 5])
def test_withholding_equals_transformers(emitted):
    processor = transformers.MinNewTokensLengthLogitsProcessor(12 - emitted, 4, 7, device="cpu")
    expected = torch.softmax(processor(torch.tensor(TOKENS), torch.tensor(LOGITS)), -1)
    history = whole_history(TOKENS)._replace(start=jnp.full(16, 12 - emitted))
    probs = probabilities(jnp.asarray(LOGITS), Sampling(withheld=7, min_new_tokens=4), history)
    assert ((probs[:, 7] == 0) == (emitted < 4)).all()
    np.testing.assert_allclose(probs, expected, atol=2e-6)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0),
        Sampling(top_k=3, top_p=0.9, min_p=0.1),
        Sampling(repetition_penalty=1.5),
        Sampling(top_k=3, top_p=0.8, repetition_window=10),
        Sampling(top_p=0.8, repetition_window=10, repetition_redraw_all=True),
    ],
)
def test_a_withheld_token_equals_a_forbidden_logit(sampling):
    """At each position of a block and in each row, whatever follows; the withheld id is the best one, and was emitted before."""
    tokens, length = np.tile([3, 5, 0, 5, 1, 2, 5, 4], (4, 1)), 3 + np.arange(5) + np.zeros((4, 1), int)
    history = History(jnp.asarray(tokens), jnp.full(4, 2), jnp.asarray(length))
    logits = np.random.default_rng(8).normal(0, 2, (4, 5, 6)).astype(np.float32)
    logits[:, :, 5] = 4
    least = [0, 2, 4, 9]
    withheld = length - 2 < np.array(least)[:, None]
    without = np.where((np.arange(6) == 5) & withheld[:, :, None], -np.inf, logits)
    each = [dataclasses.replace(sampling, withheld=5, min_new_tokens=count) for count in least]
    probs = probabilities(jnp.asarray(logits), rows(each, 4), history)
    np.testing.assert_allclose(probs, probabilities(jnp.asarray(without), rows(sampling, 4), history), atol=1e-7)
    assert withheld.sum(1).tolist() == [0, 1, 3, 5]
    assert ((probs[:, :, 5] == 0) >= withheld).all()


def test_a_missing_history_is_never_ignored_silently():
    for sampling in (
        Sampling(repetition_window=1),
        Sampling(repetition_penalty=1.1),
        Sampling(withheld=0, min_new_tokens=1),
    ):
        with pytest.raises(ValueError, match="expected a history"):
            sampling_module.probabilities(jnp.zeros(3), sampling)
        probs = probabilities(jnp.zeros((2, 3)), rows([sampling, Sampling()], 2))
        assert jnp.isnan(probs[0]).all()
        assert probs[1].sum() == 1
    for sampling in (Sampling(withheld=0), Sampling(min_new_tokens=1)):
        np.testing.assert_array_equal(sampling_module.probabilities(jnp.zeros(2), sampling), [0.5, 0.5])


def test_new_settings_do_not_recompile():
    traces = []

    @jax.jit
    def compute(logits, settings, history):
        traces.append(0)
        return sampling_module.probabilities(logits, settings, history)

    for sampling in (*WARPERS, Sampling(temperature=0), Sampling(repetition_window=3), Sampling(withheld=1, min_new_tokens=9)):
        compute(LOGITS, rows(sampling, 16), whole_history(TOKENS))
    assert len(traces) == 1


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": 1e-40},  # not a normal float32
        {"temperature": 1e39},
        {"temperature": True},
        {"temperature": "1"},
        {"top_k": -1},
        {"top_k": 2.5},
        {"top_k": True},
        {"top_k": 2**31},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": True},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"min_p": False},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 1e-46},  # 0 in float32
        {"repetition_penalty": 1e7},
        {"repetition_penalty": True},
        {"repetition_window": MAX_WINDOW + 1},
        {"repetition_window": True},
        {"repetition_redraw_all": 1},
        {"withheld": -2},
        {"withheld": 0.5},
        {"withheld": False},
        {"min_new_tokens": -1},
        {"min_new_tokens": np.bool_(True)},
    ],
    ids=str,
)
def test_settings_out_of_range(setting):
    name, value = next(iter(setting.items()))
    with pytest.raises(ValueError, match=rf"expected {name} .*, got {re.escape(repr(value))}: use "):
        Sampling(**setting)


def test_settings_may_be_numpy_scalars():
    settings = {"temperature": np.float32(0.5), "top_k": np.int64(5), "top_p": np.float64(0.9), "min_p": np.float32(0.25)}
    more = {"repetition_penalty": np.int32(2), "repetition_window": np.uint8(3), "repetition_redraw_all": np.bool_(True)}
    sampling = Sampling(**settings, **more, withheld=np.int16(4), min_new_tokens=np.int64(2))
    plain = Sampling(0.5, 5, 0.9, 0.25, 2.0, 3, True, 4, 2)
    assert sampling == plain
    assert hash(sampling) == hash(plain)
    assert [type(value) for value in dataclasses.astuple(sampling)] == [float, int, float, float, float, int, bool, int, int]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=float(np.finfo(np.float32).tiny)),
        Sampling(temperature=float(np.finfo(np.float32).max)),
        Sampling(top_p=1e-46),
        Sampling(repetition_penalty=1e-6),
        Sampling(repetition_penalty=1e6),
    ],
    ids=str,
)
def test_the_ends_of_the_ranges_give_distributions(sampling):
    probs = probabilities(jnp.array([5.0, -3.0, 5.0, 1.0]), sampling, whole_history(np.array([0, 1])))
    np.testing.assert_allclose(probs.sum(), 1, rtol=1e-6)


def test_one_sampling_for_each_row():
    with pytest.raises(ValueError, match="each of the 3 rows, got 2"):
        rows([Sampling()] * 2, 3)
    with pytest.raises(ValueError, match="one Sampling for each of the 2 rows, got"):
        rows([Sampling(), None], 2)


@pytest.mark.parametrize("vocab", [7, 256, 900])
def test_draws_follow_the_distribution_and_never_take_a_forbidden_token(vocab):
    weight = np.random.default_rng(2).gamma(0.3, size=vocab)
    weight[[0, vocab // 2, vocab - 1]] = 0
    draws = jax.jit(sample)(jax.random.key(4), jnp.broadcast_to(jnp.float32(weight), (20_000, vocab)))
    assert_distribution(draws, weight)


def test_draws_at_the_ends_of_the_unit_interval():
    probs = jnp.zeros(600).at[jnp.array([3, 300, 590])].set(jnp.array([1e-30, 0.1, 0.7]))
    ends = jnp.array([[a, b] for a in (0.0, 1 - 2**-24) for b in (0.0, 1 - 2**-24)], jnp.float32)
    assert set(invert(ends, probs).tolist()) <= {3, 300, 590}
    assert invert(jnp.float32([0.5, 0.5]), jnp.full(3, jnp.nan)) in (0, 1, 2)


def test_a_uniform_at_a_boundary_gives_the_next_token():
    """Token t has the half-open interval from the mass before it to the mass up to and including it."""
    uniforms = jnp.array([[0.0, 0.0], [0.0, 0.25], [0.0, 0.5], [0.0, 0.75]])
    assert invert(uniforms, jnp.ones(4)).tolist() == [0, 1, 2, 3]
    assert invert(jnp.array([0.5, 0.0]), jnp.ones(512)) == 256
