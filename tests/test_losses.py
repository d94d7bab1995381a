"""Losses of drafts against NumPy, and the measured acceptance against enumeration and simulation."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec import groups as asg
from jaxspec.sampling import Sampling
from jaxspec.train import acceptance, losses
from jaxspec.train.acceptance import Measured

ROWS, VOCAB = 5, 7
SETS = [np.array(members, np.int32) for members in ([0, 1, 2], [2, 3], [3, 4, 5, 0], [6], [1, 5])]  # overlapping


@pytest.fixture(scope="module")
def case():
    """log p, q with zeros, and tokens."""
    rng = np.random.default_rng(0)
    draft, q = rng.normal(size=(ROWS, VOCAB)).astype(np.float32), rng.dirichlet(np.ones(VOCAB), ROWS).astype(np.float32)
    q[:, 2] = 0
    q /= q.sum(1, keepdims=True)
    return jax.nn.log_softmax(draft), jnp.asarray(q), jnp.asarray(rng.integers(VOCAB, size=ROWS), jnp.int32)


def by_hand(name, log_p, q, token):
    p, logs = np.exp(log_p), np.where(q > 0, np.log(np.where(q > 0, q, 1)) - log_p, 0)
    ce, kl, tv = -log_p[np.arange(ROWS), token], (q * logs).sum(1), np.abs(p - q).sum(1) / 2
    share = np.exp(-3 * (1 - tv))
    return {"ce": ce, "kl": kl, "tv": tv, "lk": share * kl + (1 - share) * tv, "ce+tv": 0.1 * ce + 0.9 * tv}[name]


@pytest.mark.parametrize("name", ["ce", "kl", "tv", "lk", "ce+tv"])
def test_a_loss_is_what_numpy_gives(case, name):
    got = losses.LOSSES[name](*case, None)
    np.testing.assert_allclose(got, by_hand(name, *map(np.asarray, case)), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("entries", [2**24, 15])  # 15: the rows go one after the other
def test_the_loss_on_groups_is_one_minus_the_enumerated_acceptance(case, entries, monkeypatch):
    monkeypatch.setattr(losses, "_ENTRIES", entries)
    log_p, q, token = case
    p, weights = np.exp(np.asarray(log_p, np.float64)), np.zeros((len(SETS), VOCAB))
    for group, members in enumerate(SETS):
        weights[group, members] = 1
    weights /= weights.sum(0)
    draft_mass, target_mass = p @ weights.T, np.asarray(q, np.float64) @ weights.T
    accepted = [
        sum(
            p[row, x] * weights[k, x] * min(1, target_mass[row, k] / draft_mass[row, k])
            for x, k in itertools.product(range(VOCAB), range(len(SETS)))
        )
        for row in range(ROWS)
    ]
    membership = losses.membership(asg.tabulate(SETS, VOCAB))
    np.testing.assert_allclose(losses.group_variation(log_p, q, token, membership), 1 - np.array(accepted), atol=1e-6)
    numeric = jax.grad(lambda x: losses.group_variation(x, q, token, membership).sum())(log_p)
    assert jnp.isfinite(numeric).all()
    assert jnp.abs(numeric).max() > 1e-3


def test_singleton_groups_give_the_total_variation(case):
    membership = losses.membership(asg.tabulate([np.array([i], np.int32) for i in range(VOCAB)], VOCAB))
    np.testing.assert_allclose(losses.group_variation(*case, membership), losses.total_variation(*case), atol=1e-6)


def test_a_loss_on_groups_needs_groups(case):
    with pytest.raises(ValueError, match="expected groups"):
        losses.group_variation(*case, None)


@pytest.mark.parametrize("name", ["ce", "kl", "tv", "lk", "ce+tv"])
def test_gradients_are_finite_where_the_target_truncates_and_pads(case, name):
    _, q, _ = case
    logits = jnp.zeros((ROWS, VOCAB)).at[:, 2].set(-jnp.inf)  # a padded row of the head; q is 0 there

    def value(logits):
        log_p, warped = losses.warp(logits, jnp.log(q), Sampling(0.7, top_p=0.6))
        return losses.LOSSES[name](log_p, warped, jnp.zeros(ROWS, jnp.int32), None).sum()

    assert jnp.isfinite(jax.grad(value)(logits)).all()


def test_the_target_is_truncated_and_the_draft_is_not():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))
    log_p, q = losses.warp(logits, logits, Sampling(0.5, top_k=2))
    np.testing.assert_allclose(jnp.exp(log_p), np.array([[25, 9, 4]]) / 38, rtol=1e-5)
    np.testing.assert_allclose(q, np.array([[25, 9, 0]]) / 34, rtol=1e-5)
    greedy_p, greedy = losses.warp(logits, logits, Sampling(temperature=0))
    np.testing.assert_allclose(jnp.exp(greedy_p), [[0.5, 0.3, 0.2]], rtol=1e-5)
    assert greedy.tolist() == [[1, 0, 0]]


def test_slots_weigh_less_along_a_block():
    np.testing.assert_allclose(losses.slot_weights(3, 4), np.exp([0, -0.25, -0.5]), rtol=1e-6)


def simulated(accepted, length, rng, runs=4000):
    """Tokens and rounds of a loop on one row, whose drafted tokens are accepted with these probabilities, [A K]."""
    tokens = rounds = 0
    for _ in range(runs):
        at = 0
        while at < len(accepted):
            k = 0
            while k < length and at + k < len(accepted) and rng.random() < accepted[at, k]:
                k += 1
            if at >= length:  # as ``count_rounds`` leaves the first ones out
                rounds += 1
            at += k + 1
        tokens += len(accepted) - length
    return tokens / rounds


def test_rounds_are_counted_as_the_loop_runs_them():
    """Hard and easy stretches: a mean over positions would be a third too large. Within 2 %: six standard errors."""
    rng = np.random.default_rng(1)
    chance = np.where(np.arange(40)[:, None] // 10 % 2, 0.95, 0.1) * np.ones((40, 4))
    expected = simulated(chance, 4, rng)
    tokens, rounds = acceptance.count_rounds(chance[None], np.ones((1, 40, 4), bool), 4)
    assert tokens / rounds == pytest.approx(expected, rel=0.02)
    everywhere = (1 + np.cumprod(chance, axis=1).sum(1)).mean()
    assert everywhere > 1.3 * expected


def test_acceptance_by_position_is_that_of_the_exact_rule():
    """A draft and a target that are functions of the token before: enumerated against all samples, weighted by their chance."""
    rng = np.random.default_rng(2)
    p, q = rng.dirichlet(np.ones(3), 3), rng.dirichlet(np.ones(3), 3)
    expected = []
    reach = np.array([1.0, 0, 0])  # the last token is 0; mass of each last token when all were accepted
    for _ in range(3):
        accepted = reach @ np.minimum(p, q)
        expected.append(accepted.sum() / reach.sum())
        reach = accepted
    fields = {"ratio": [], "exact": []}
    counts = []
    for tokens in itertools.product(range(3), repeat=3):
        before = (0, *tokens[:-1])
        counts.append(round(1e5 * np.prod([q[a, b] for a, b in zip(before, tokens, strict=True)])))
        fields["ratio"].append([min(1, p[a, b] / q[a, b]) for a, b in zip(before, tokens, strict=True)])
        fields["exact"].append([np.minimum(p[a], q[a]).sum() for a in before])
    ratio, exact = (np.repeat(fields[name], counts, axis=0)[None] for name in ("ratio", "exact"))
    found = acceptance.by_position([Measured(ratio, exact, exact, np.ones(exact.shape, bool))])
    np.testing.assert_allclose(found["exact"], expected, rtol=1e-3)
