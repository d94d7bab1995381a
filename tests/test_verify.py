"""Every verifier: its contract, its limits, and the distribution of what it emits.

The statistical tests have fixed seeds; with fresh ones each chi-square would raise a false alarm once in 10,000 runs.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chi_square import FALSE_ALARM, assert_distribution
from scipy import stats

from jaxspec.groups import acoustic_similarity_groups, tabulate
from jaxspec.sampling import Sampling, probabilities, rows, sample
from jaxspec.types import History
from jaxspec.verify import block_coarse_grained, block_exact, block_tolerance, coarse_grained, exact, tolerance
from jaxspec.verify.coarse_grained import _correct
from jaxspec.verify.exact import accepted, correct

VOCAB = 8
ROUNDS = 10_000


def groups(distinct=True, threshold=0.5):
    embeddings = np.random.default_rng(4).normal(size=(VOCAB, 3))
    return acoustic_similarity_groups(embeddings, threshold, num_codes=VOCAB - 1, distinct=distinct)


RULES = {
    "exact": exact,
    "tolerance": lambda: tolerance(0.4),
    "coarse-grained": lambda: coarse_grained(groups()),
    "coarse-grained per token": lambda: coarse_grained(groups(distinct=False)),
    "block exact": block_exact,
    "block tolerance": lambda: block_tolerance(0.4),
    "block coarse-grained": lambda: block_coarse_grained(groups()),
}
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def random_probs(seed, positions, sharpness=1.5):
    return jax.nn.softmax(sharpness * jax.random.normal(jax.random.key(seed), (positions, VOCAB)))


def proposal_probs():
    """A draft [2 V] and a target [3 V] that agree in part, so that every branch is taken often."""
    draft = random_probs(0, 2)
    return draft, 0.5 * random_probs(1, 3) + 0.5 * jnp.concatenate([draft, draft[:1]])


@jax.jit
def rounds(verify, key, draft, target):
    """Many rounds of one proposal: draft [K V] and target [K+1 V], or with a leading axis of rounds."""
    draft_key, verify_key = jax.random.split(key)
    axis = 0 if draft.ndim == 3 else None
    number = len(draft) if draft.ndim == 3 else ROUNDS
    tokens = jax.vmap(sample, (0, axis))(jax.random.split(draft_key, number), draft)
    verdict = jax.vmap(verify, (0, 0, axis, axis))(jax.random.split(verify_key, number), tokens, draft, target)
    return tokens, verdict


def emitted_at(position, tokens, verdict):
    """The tokens emitted at one position, by the rounds that reach it."""
    reached = np.asarray(verdict.num_accepted) >= position
    taken = np.asarray(verdict.num_accepted) > position
    drafted = np.asarray(tokens)[:, min(position, tokens.shape[1] - 1)]
    return np.where(taken, drafted, verdict.token)[reached]


def weights(table, vocab=VOCAB):
    """w[k, t] as a matrix [M V]."""
    membership = (np.asarray(table.members)[:, :, None] == np.arange(vocab)).any(1)
    return membership / membership.sum(0)


def emitted_probs(draft, target, keep, residual):
    """The distribution [V] or [M V] of what is emitted: accepted with probability ``keep``, else drawn from the residual."""
    accepted = draft * keep
    rest = 1 - accepted.sum()
    return accepted + (rest * residual / residual.sum() if residual.sum() else 0)


WARPERS = [
    Sampling(),
    Sampling(temperature=0.8, top_k=5, top_p=0.9, min_p=0.05, repetition_penalty=1.2),
    Sampling(top_k=4, top_p=0.7, repetition_window=3),
    Sampling(top_k=4, top_p=0.7, repetition_window=3, repetition_redraw_all=True),
]


@jax.jit
def rounds_of_exact(settings):
    """Rounds whose distributions depend on the tokens drafted before: (draft tokens [N 3], target probs [N 4 V], verdict)."""
    logits = jax.random.normal(jax.random.key(1), (2, 4, VOCAB)) * 1.5
    start = jnp.full(ROUNDS, 1)

    def probs_after(logits, tokens, length):
        history = History(tokens, start, jnp.broadcast_to(length, (ROUNDS, len(logits))))
        return probabilities(jnp.broadcast_to(logits, (ROUNDS, *logits.shape)), settings, history)

    def draw(tokens, place):
        probs = probs_after(logits[0, place][None], tokens, place + 2)[:, 0]
        return tokens.at[:, place + 2].set(sample(jax.random.fold_in(jax.random.key(10), place), probs)), probs

    tokens = jnp.broadcast_to(jnp.array([1, 3, 0, 0, 0]), (ROUNDS, 5))
    tokens, draft = jax.lax.scan(draw, tokens, jnp.arange(3))
    target = probs_after(logits[1], tokens, jnp.arange(2, 6))
    keys = jax.random.split(jax.random.key(20), ROUNDS)
    return tokens[:, 2:], target, jax.vmap(exact())(keys, tokens[:, 2:], draft.swapaxes(0, 1), target)


@pytest.mark.parametrize("sampling", WARPERS)
def test_exact_emits_the_target_distribution(sampling):
    """The first token's distribution, and the second's given each first."""
    tokens, target, verdict = rounds_of_exact(rows(sampling, ROUNDS))
    assert_distribution(emitted_at(0, tokens, verdict), target[0, 0])
    for first in range(VOCAB):
        chosen = np.asarray(tokens[:, 0]) == first
        if chosen.any():
            some = jax.tree.map(lambda leaf, chosen=chosen: np.asarray(leaf)[chosen], verdict)
            assert_distribution(emitted_at(1, np.asarray(tokens)[chosen], some), target[np.argmax(chosen), 1])


def test_exact_emits_the_bonus_and_accepts_one_minus_tv():
    draft, target = proposal_probs()
    tokens, verdict = rounds(exact(), jax.random.key(2), draft, target)
    for position in range(3):
        assert_distribution(emitted_at(position, tokens, verdict), target[position])
    for position in range(2):
        reached = np.asarray(verdict.num_accepted) >= position
        accepted = (np.asarray(verdict.num_accepted) > position).sum()
        rate = float(jnp.minimum(draft[position], target[position]).sum())
        assert stats.binomtest(int(accepted), int(reached.sum()), rate).pvalue > FALSE_ALARM


@pytest.mark.parametrize("beta", [0.0, 0.2, 0.4, 1.0])
def test_tolerance_is_as_far_from_the_target_as_it_says(beta):
    draft, target = proposal_probs()
    tokens, verdict = rounds(tolerance(beta), jax.random.key(3), draft, target)
    for position in range(2):
        p, q = np.float64(draft[position]), np.float64(target[position])
        keep = np.minimum(1, np.minimum(1, q / p) + beta)
        probs = emitted_probs(p, q, keep, np.maximum(q - p, 0))
        distance = np.minimum(np.maximum(p - q, 0), beta * p).sum()
        np.testing.assert_allclose(np.abs(probs - q).sum() / 2, distance, atol=1e-6)
        np.testing.assert_allclose((p * keep).sum(), np.minimum(p, q).sum() + distance, atol=1e-6)
        assert_distribution(emitted_at(position, tokens, verdict), probs)
    assert_distribution(emitted_at(2, tokens, verdict), target[2])


@pytest.mark.parametrize("distinct", [True, False])
@pytest.mark.parametrize("threshold", [0.1, 0.6])
def test_coarse_grained_emits_the_group_distribution_of_the_target(distinct, threshold):
    table = groups(distinct, threshold)
    weight = weights(table)
    draft, target = proposal_probs()
    tokens, verdict = rounds(coarse_grained(table), jax.random.key(3), draft, target)
    for position in range(2):
        p, q = np.float64(draft[position]) * weight, np.float64(target[position]) * weight
        coarse_p, coarse_q = p.sum(1, keepdims=True), q.sum(1, keepdims=True)
        keep = np.minimum(1, coarse_q / coarse_p)
        probs = emitted_probs(p, q, keep, q * np.maximum(0, 1 - coarse_p / coarse_q))
        np.testing.assert_allclose(probs.sum(1), coarse_q[:, 0], atol=1e-6)  # the proposition of the paper
        assert_distribution(emitted_at(position, tokens, verdict), probs.sum(0))
        reached = np.asarray(verdict.num_accepted) >= position
        accepted = (np.asarray(verdict.num_accepted) > position).sum()
        assert stats.binomtest(int(accepted), int(reached.sum()), float((p * keep).sum())).pvalue > FALSE_ALARM
    assert_distribution(emitted_at(2, tokens, verdict), target[2])


@pytest.mark.parametrize(
    "rule", [lambda: tolerance(0.0), lambda: coarse_grained(singletons())], ids=["tolerance", "coarse-grained"]
)
def test_limits_are_exact(rule):
    draft, target = proposal_probs()
    tokens, verdict = rounds(rule(), jax.random.key(5), draft, target)
    _, reference = rounds(exact(), jax.random.key(5), draft, target)
    np.testing.assert_array_equal(verdict.num_accepted, reference.num_accepted)
    np.testing.assert_array_equal(verdict.num_exact, reference.num_exact)
    for position in range(3):
        assert_distribution(emitted_at(position, tokens, verdict), target[position])


def singletons():
    return acoustic_similarity_groups(np.eye(VOCAB), 0.5)


@each_rule
def test_num_exact_counts_what_the_exact_rule_takes(rule):
    draft, target = proposal_probs()
    _, verdict = rounds(rule(), jax.random.key(5), draft, target)
    _, reference = rounds(exact(), jax.random.key(5), draft, target)
    assert (verdict.num_exact <= verdict.num_accepted).all()
    # The exact rule's prefix is accepted by the others too, or cut where they stop.
    assert (verdict.num_exact >= jnp.minimum(reference.num_accepted, verdict.num_accepted)).all()


@pytest.mark.parametrize("name", [name for name in RULES if not name.startswith("block")])
def test_num_exact_has_the_exact_acceptance_rate(name):
    """Of one drafted token; all decisions are made with one uniform, so the smaller ratio decides."""
    draft, target = random_probs(0, 1), random_probs(1, 2)
    p, q = np.float64(draft[0]), np.float64(target[0])
    rate = np.minimum(p, q)
    if name.startswith("coarse-grained"):
        weight = weights(groups(distinct=name == "coarse-grained"))
        coarse = (q * weight).sum(1) / (p * weight).sum(1)
        rate = p * (weight * np.minimum(np.minimum(1, q / p), coarse[:, None])).sum(0)
    _, verdict = rounds(RULES[name](), jax.random.key(6), draft, target)
    assert stats.binomtest(int(verdict.num_exact.sum()), ROUNDS, float(rate.sum())).pvalue > FALSE_ALARM
    if name != "exact":
        assert int(verdict.num_accepted.sum()) > 1.02 * int(verdict.num_exact.sum())


@each_rule
def test_nothing_drafted_is_a_bonus_token(rule):
    target = random_probs(1, 1)
    keys = jax.random.split(jax.random.key(0), ROUNDS)
    verdict = jax.jit(jax.vmap(rule(), (0, None, None, None)))(keys, jnp.zeros(0, jnp.int32), jnp.zeros((0, VOCAB)), target)
    assert (verdict.num_accepted == 0).all()
    assert (verdict.num_exact == 0).all()
    assert_distribution(np.asarray(verdict.token), target[0])


@each_rule
def test_a_draft_like_its_target_is_always_accepted(rule):
    probs = random_probs(0, 3)
    _, verdict = rounds(rule(), jax.random.key(1), probs[:2], probs)
    assert (verdict.num_accepted == 2).all()


@pytest.mark.parametrize("rule", [exact, lambda: coarse_grained(groups())], ids=["exact", "coarse-grained"])
def test_greedy_distributions(rule):
    """One-hot distributions: the first agrees, the second is another token of another group."""
    target = jax.nn.one_hot(jnp.array([2, VOCAB - 1, 0]), VOCAB)
    draft = jax.nn.one_hot(jnp.array([2, 1]), VOCAB)
    _, verdict = rounds(rule(), jax.random.key(1), draft, target)
    assert (verdict.num_accepted == 1).all()
    assert (verdict.token == VOCAB - 1).all()


@each_rule
def test_forbidden_tokens_are_not_emitted_as_corrections(rule):
    target = probabilities(jnp.zeros((3, VOCAB)).at[:, ::2].set(-jnp.inf), Sampling())
    _, verdict = rounds(rule(), jax.random.key(1), random_probs(0, 2), target)
    assert (verdict.token % 2 == 1).all()


@each_rule
def test_nan_probs_end_and_accept_nothing(rule):
    target = random_probs(0, 3).at[0].set(jnp.nan)
    verdict = jax.jit(lambda verify, *proposal: verify(*proposal))(
        rule(), jax.random.key(0), jnp.array([1, 2]), random_probs(1, 2), target
    )
    assert verdict.num_accepted == 0
    assert 0 <= verdict.token < VOCAB


@pytest.mark.parametrize("drafted", [0.0, 0.5])
def test_a_token_the_target_forbids_is_rejected_at_a_uniform_of_zero(drafted):
    assert not accepted(jnp.float32([0]), jnp.float32([drafted]), jnp.float32([0]))
    assert accepted(jnp.float32([0]), jnp.float32([drafted]), jnp.float32([1e-30]))


@pytest.mark.parametrize("position", [0, 1, 2])
def test_the_correction_without_a_residual_has_the_target_distribution(position):
    target = random_probs(0, 3).at[:, 0].set(0)
    draw = jax.jit(jax.vmap(lambda key: correct(key, jnp.int32(position), target[:2], target)))
    assert_distribution(draw(jax.random.split(jax.random.key(0), ROUNDS)), target[position])


def overlapping_groups(vocab, supported):
    """24 overlapping groups of the supported tokens, their order the same for each token; all others are singletons."""
    rng = np.random.default_rng(0)
    sets = [np.sort(rng.choice(supported, 6, replace=False)) for _ in range(24)]
    assert set(np.concatenate(sets)) == set(supported)
    return tabulate([np.int32(members) for members in [*sets, *np.setdiff1d(np.arange(vocab), supported)[:, None]]], vocab)


def test_the_groups_of_a_correction_are_independent_of_its_block():
    """Above 256 tokens the first uniform of a candidate chooses a block of the vocabulary, and must choose nothing else."""
    vocab, supported = 512, np.concatenate([start + 31 * np.arange(8) for start in (0, 256)])
    rng = np.random.default_rng(1)
    draft, target = np.zeros((2, vocab))
    draft[supported], target[supported] = rng.dirichlet(np.ones(16), 2)
    table = overlapping_groups(vocab, supported)
    weight = weights(table, vocab)
    p, q = draft * weight, target * weight
    residual = np.maximum(q.sum(1) - p.sum(1), 0)
    expected = (residual / residual.sum() / q.sum(1).clip(1e-30)) @ q
    draw = jax.jit(jax.vmap(lambda key: _correct(key, table, jnp.float32(draft), jnp.float32(target))))
    assert_distribution(draw(jax.random.split(jax.random.key(0), ROUNDS)), expected)


def test_an_empty_residual_emits_from_the_target():
    probs = random_probs(0, 1)[0].at[3].set(0)
    drawn = jax.jit(jax.vmap(lambda key: _correct(key, groups(), probs, probs)))(jax.random.split(jax.random.key(0), 200))
    assert (probs[drawn] > 0).all()
    assert len(set(drawn.tolist())) > 1


def test_a_small_residual_is_still_exact():
    """What the groups gain is small beside what their tokens gain and lose, so of about 300 candidates one is kept.

    The trips of the loop do not end too early: all corrections are of the group that gained, and split as its target is.
    """
    gain = 0.2 / 150
    target = jnp.array([0.3, 0.2, 0.3, 0.2, 0, 0, 0, 0])
    draft = target - jnp.array([0.2, gain - 0.2, 0.2, -0.2 - gain, 0, 0, 0, 0])
    table = acoustic_similarity_groups(np.repeat(np.eye(4), 2, axis=0), 0.5)
    draw = jax.jit(jax.vmap(lambda key: _correct(key, table, draft, target)))
    tokens = np.asarray(draw(jax.random.split(jax.random.key(0), 2000)))
    assert set(tokens.tolist()) == {0, 1}
    assert stats.binomtest(int((tokens == 0).sum()), len(tokens), 0.6).pvalue > FALSE_ALARM


@pytest.mark.parametrize("rules", [[tolerance(0.1), tolerance(0.3)], [coarse_grained(groups()), coarse_grained(groups())]])
def test_other_arrays_do_not_recompile(rules):
    traces = []

    @jax.jit
    def verify(rule, key):
        traces.append(0)
        return rule(key, jnp.array([1, 2]), *proposal_probs())

    for rule in rules:
        verify(rule, jax.random.key(0))
    assert len(traces) == 1


def test_bad_arguments():
    for beta in (-0.1, 1.5, float("nan"), float("inf"), True, "0.4", None):
        with pytest.raises(ValueError, match="expected beta to be"):
            tolerance(beta)
    with pytest.raises(ValueError, match="over the 8 tokens of the groups, got 9"):
        coarse_grained(groups())(jax.random.key(0), jnp.array([1]), jnp.ones((1, 9)) / 9, jnp.ones((2, 9)) / 9)
