"""The fidelity of a rule to the exact one: by hand, in its limits, and against the law of acceptance."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec import verify
from jaxspec.codec import fsq
from jaxspec.evaluate.fidelity import fidelity
from jaxspec.groups import tabulate
from jaxspec.models.builtin import CODES, LEVELS, STOP, VOCAB

A, B = (int(fsq.to_codes(jnp.array(digits), LEVELS)) for digits in ([1, 2, 2, 0, 4], [3, 2, 1, 0, 4]))  # three levels apart


def on(*tokens):
    probs = np.zeros(VOCAB, np.float32)
    probs[list(tokens)] = 1 / len(tokens)
    return probs


def steps(count=12, seed=0):
    rng = np.random.default_rng(seed)
    pairs = rng.dirichlet(np.ones(6), (count, 2)).astype(np.float32)
    ids = rng.choice(CODES, (count, 6), replace=False)
    made = np.zeros((count, 2, VOCAB), np.float32)
    for step, where, pair in zip(made, ids, pairs, strict=True):
        step[:, where] = pair
    return [tuple(step) for step in made]


def test_the_exact_rule_is_its_own_measure():
    assert fidelity(verify.exact(), steps()) == (1, 0)


def test_the_distance_is_counted_in_levels():
    """The draft says A, the target B: the exact rule emits B, full tolerance and a group of both emit A."""
    together = tabulate([np.array([A, B]), *[np.array([i]) for i in range(VOCAB) if i not in (A, B)]], VOCAB)
    for rule in (verify.tolerance(1.0), verify.coarse_grained(together)):
        assert fidelity(rule, [(on(A), on(B))]) == (0, 3)
    assert fidelity(verify.tolerance(1.0), [(on(STOP), on(B))]) == (0, 0)  # the end of the speech is at no distance


def test_full_tolerance_agrees_as_often_as_the_exact_rule_accepts():
    """4 standard errors of 12 x 400 draws: a false alarm in 16,000."""
    some = steps()
    found, accepted = fidelity(verify.tolerance(1.0), some, draws=400).same, np.mean([np.minimum(p, q).sum() for p, q in some])
    assert abs(found - accepted) < 4 * np.sqrt(0.25 / (len(some) * 400))


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="one step or more"):
        fidelity(verify.exact(), [])
