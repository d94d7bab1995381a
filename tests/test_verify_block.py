"""Block verification against its enumeration: toys whose distributions depend on every token before, overlapping groups.

The seeds are fixed; with fresh ones each chi-square would raise a false alarm once in 10,000 runs.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chi_square import assert_distribution

from jaxspec.groups import Groups, tabulate
from jaxspec.sampling import sample
from jaxspec.speculate import as_pytree
from jaxspec.verify import block_coarse_grained, block_exact, block_tolerance, coarse_grained, exact, tolerance

V, ROUNDS = 4, 30_000
SINGLETONS = tabulate([np.array([t], np.int32) for t in range(V)], V)
OVERLAPPING = tabulate([np.array(s, np.int32) for s in ([0, 1], [1, 2], [2, 3], [0, 2, 3])], V)
FAMILIES = {"singletons": SINGLETONS, "overlapping": OVERLAPPING}


def toy(seed, K, sharpness=1.2):
    """p and q after every prefix of up to K tokens: dicts from prefix to [V] in float64."""
    rng = np.random.default_rng(seed)

    def table(length):
        logits = {x: rng.normal(size=V) * sharpness for n in range(length) for x in itertools.product(range(V), repeat=n)}
        return {x: np.exp(row) / np.exp(row).sum() for x, row in logits.items()}

    return table(K), table(K + 1)


def weights(groups):
    """w[k, t] as a matrix [M V]."""
    membership = (np.asarray(groups.members)[:, :, None] == np.arange(V)).any(1)
    return membership / membership.sum(0)


def emitted_by_tolerance(p, q, beta):
    """The distribution that ``tolerance(beta)`` emits where the draft is p and the target q."""
    accepted = p * np.minimum(1, np.minimum(1, q / p) + beta)
    residual = np.maximum(q - p, 0)
    return accepted + (1 - accepted.sum()) * residual / residual.sum()


def rounds_of(p, q, w, K):
    """Every possible round: tokens, groups, its probability, and (i, P(i accepted), the residual of the groups) for each i."""
    for x in itertools.product(range(V), repeat=K):
        for k in itertools.product(range(len(w)), repeat=K):
            chance, rho = 1.0, [1.0]
            for i in range(K):
                coarse_p, coarse_q = w[k[i]] @ p[x[:i]], w[k[i]] @ q[x[:i]]
                chance *= p[x[:i]][x[i]] * w[k[i], x[i]]
                rho.append(min(rho[-1] * coarse_q / coarse_p, 1.0) if coarse_p else 1.0)
            above, counts = 1.0, []
            for i in range(K, -1, -1):
                residual = w @ q[x[:i]] if i == K else np.maximum(rho[i] * (w @ q[x[:i]]) - w @ p[x[:i]], 0)
                mass = residual.sum()
                h = rho[K] if i == K else (mass / (mass + 1 - rho[i]) if i else 1.0)
                counts.append((i, above * h, residual / mass if mass else residual))
                above *= 1 - h
            if chance:
                yield x, k, chance, counts


def enumerate_block(p, q, w, K):
    """P(num_accepted, accepted tokens, group that follows) by the definition, as a dict."""
    out = {}
    for x, _, chance, counts in rounds_of(p, q, w, K):
        for i, probability, residual in counts:
            for group, part in enumerate(residual):
                name = (i, x[:i], group)
                out[name] = out.get(name, 0.0) + chance * probability * part
    return out


def run(rule, p, q, K, rounds=ROUNDS, seed=0):
    """Rounds of a rule on a toy: drafted tokens [N K] and verdicts."""
    prefixes = [x for n in range(K + 1) for x in itertools.product(range(V), repeat=n)]
    index = {x: i for i, x in enumerate(prefixes)}
    table_p = jnp.asarray([p.get(x, np.ones(V)) for x in prefixes], jnp.float32)
    table_q = jnp.asarray([q[x] for x in prefixes], jnp.float32)
    child = jnp.asarray([[index.get((*x, t), 0) for t in range(V)] for x in prefixes])
    keys = jax.random.split(jax.random.key(seed), rounds)
    return _run(as_pytree(rule), table_p, table_q, child, keys, K)


@functools.partial(jax.jit, static_argnames="K")
def _run(rule, table_p, table_q, child, keys, K):
    """Compiled once for each rule and K: the tables of the toy are arguments."""

    def one(key):
        draft_key, verify_key = jax.random.split(key)
        at, tokens, places = jnp.int32(0), [], [jnp.int32(0)]
        for i in range(K):
            token = sample(jax.random.fold_in(draft_key, i), table_p[at])
            tokens.append(token)
            at = child[at, token]
            places.append(at)
        tokens, places = jnp.stack(tokens), jnp.stack(places)
        return tokens, rule(verify_key, tokens, table_p[places[:-1]], table_q[places])

    return jax.vmap(one)(keys)


def observed(tokens, verdict):
    """(num_accepted, accepted tokens, the token that follows) of each round."""
    out = []
    for x, count, token in zip(np.asarray(tokens), np.asarray(verdict.num_accepted), np.asarray(verdict.token), strict=True):
        out.append((int(count), tuple(map(int, x[:count])), int(token)))
    return out


@pytest.mark.parametrize("K", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_joint_distribution_is_the_enumerated_one(family, K):
    """Of the count, the accepted tokens and the token that follows, whose distribution in its group is q(t) w[k, t]."""
    groups: Groups = FAMILIES[family]
    p, q = toy(K, K)
    w = weights(groups)
    expected = {}
    for (count, prefix, group), chance in enumerate_block(p, q, w, K).items():
        inside = w[group] * q[prefix]
        for token in np.flatnonzero(inside):
            name = (count, prefix, int(token))
            expected[name] = expected.get(name, 0.0) + chance * inside[token] / inside.sum()
    names = list(expected)
    rule = block_exact() if family == "singletons" else block_coarse_grained(groups)
    tokens, verdict = run(rule, p, q, K)
    drawn = observed(tokens, verdict)
    assert set(drawn) <= set(names)
    ids = {name: i for i, name in enumerate(names)}
    assert_distribution(np.array([ids[name] for name in drawn]), np.array([expected[name] for name in names]))


def test_singleton_groups_are_the_exact_rule():
    p, q = toy(7, 3)
    expected = enumerate_block(p, q, weights(SINGLETONS), 3)
    ids = {name: i for i, name in enumerate(expected)}
    tokens, verdict = run(block_coarse_grained(SINGLETONS), p, q, 3)
    drawn = observed(tokens, verdict)
    assert_distribution(np.array([ids[name] for name in drawn]), np.array(list(expected.values())))


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_tolerance_is_the_exact_rule_against_what_it_emits(beta):
    p, q = toy(5, 2)
    emitted = {x: emitted_by_tolerance(p[x], q[x], beta) if x in p else q[x] for x in q}
    expected = enumerate_block(p, emitted, weights(SINGLETONS), 2)
    ids = {name: i for i, name in enumerate(expected)}
    tokens, verdict = run(block_tolerance(beta), p, q, 2)
    drawn = observed(tokens, verdict)
    assert_distribution(np.array([ids[name] for name in drawn]), np.array(list(expected.values())))


@pytest.mark.parametrize("K", [2, 3])
def test_the_next_group_has_the_targets_distribution_given_the_groups_before(K):
    """The claim itself, on the enumeration: P(next group | tokens and groups before, at least i accepted) = Q_c."""
    p, q = toy(K + 10, K)
    w = weights(OVERLAPPING)
    reach, following = {}, {}
    for x, k, chance, counts in rounds_of(p, q, w, K):
        for i in range(K + 1):
            past = (x[:i], k[:i])
            row = following.setdefault(past, np.zeros(len(w)))
            for count, probability, residual in counts:
                if count == i:
                    row += chance * probability * residual
                elif count > i:
                    row[k[i]] += chance * probability
                if count >= i:
                    reach[past] = reach.get(past, 0.0) + chance * probability
    for past, row in following.items():
        if reach.get(past, 0.0) > 1e-12:
            np.testing.assert_allclose(row / reach[past], w @ q[past[0]], atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", FAMILIES)
def test_no_fewer_tokens_a_round_than_token_by_token(family, seed):
    """On toys of three drafted tokens; the gain is several standard errors."""
    p, q = toy(20 + seed, 3, sharpness=0.8)
    token_rule, block_rule = {
        "singletons": (exact(), block_exact()),
        "overlapping": (coarse_grained(OVERLAPPING), block_coarse_grained(OVERLAPPING)),
    }[family]
    by_token = np.asarray(run(token_rule, p, q, 3)[1].num_accepted)
    by_block = np.asarray(run(block_rule, p, q, 3)[1].num_accepted)
    error = np.sqrt((by_token.var() + by_block.var()) / ROUNDS)
    assert by_block.mean() > by_token.mean() + error
    tolerant = np.asarray(run(tolerance(0.2), p, q, 3)[1].num_accepted).mean()
    assert np.asarray(run(block_tolerance(0.2), p, q, 3)[1].num_accepted).mean() > tolerant - error


def test_corrections_above_one_block_of_the_inverse():
    """V = 512 with groups of neighbours: the two uniforms of an inverse and the choice of the group must not be shared."""
    vocab, K = 512, 2
    rng = np.random.default_rng(3)
    sets = [np.arange(first, min(first + 12, vocab), dtype=np.int32) for first in range(0, vocab, 8)]
    groups = tabulate(sets, vocab)
    membership = np.zeros((len(sets), vocab))
    for k, members in enumerate(sets):
        membership[k, members] = 1
    w = membership / membership.sum(0)
    p, q = (rng.dirichlet(np.full(vocab, 0.4)) for _ in range(2))
    draft, target = jnp.asarray(np.tile(p, (K, 1)), jnp.float32), jnp.asarray(np.tile(q, (K + 1, 1)), jnp.float32)

    def one(key):
        draft_key, verify_key = jax.random.split(key)
        tokens = jax.vmap(sample)(jax.random.split(draft_key, K), draft)
        return tokens, block_coarse_grained(groups)(verify_key, tokens, draft, target)

    _, verdict = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), 20_000))
    assert abs(np.asarray(verdict.num_accepted).mean() - _expected_count(w @ p, w @ q)) < 0.03
    # With nothing accepted, the group of the correction has the residual's distribution and its token that of q in the group.
    residual = np.maximum(w @ q - w @ p, 0)
    coarse_q = np.maximum(w @ q, 1e-300)
    assert_distribution(np.asarray(verdict.token)[np.asarray(verdict.num_accepted) == 0], (residual / coarse_q) @ w * q)


def _expected_count(coarse_p, coarse_q):
    """E[num_accepted] for K = 2 and distributions that do not depend on the prefix."""
    rho1 = np.minimum(coarse_q / coarse_p, 1)  # [M], of the first group
    total = 0.0
    for k in range(len(coarse_p)):
        r1 = rho1[k]
        rho2 = np.minimum(r1 * coarse_q / coarse_p, 1)
        mass = np.maximum(r1 * coarse_q - coarse_p, 0).sum()
        h1 = mass / (mass + 1 - r1) if mass + 1 - r1 > 0 else 0.0
        two = (coarse_p * rho2).sum()
        total += coarse_p[k] * (2 * two + (1 - two) * h1)
    return total
