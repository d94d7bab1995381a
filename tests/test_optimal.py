"""The best coupling of one step: known values, the order of the rules, and a search over every subset of a tiny case."""

import itertools

import folders
import numpy as np
import pytest

from jaxspec.checkpoint import pretrained
from jaxspec.evaluate import optimal
from jaxspec.evaluate.optimal import ceiling
from jaxspec.groups import acoustic_similarity_groups, tabulate
from jaxspec.synthesis import converted, load
from jaxspec.synthesis.contract import Settings

folder = folders.folder


def distributions(vocab, seed):
    """A draft and a target that resemble each other."""
    rng = np.random.default_rng(seed)
    common, *own = rng.normal(size=(3, vocab))
    logits = [2 * common + 1.2 * each for each in own]
    return [np.exp(each) / np.exp(each).sum() for each in logits]


def overlapping(vocab, seed, threshold):
    """Groups of random vectors."""
    return acoustic_similarity_groups(np.random.default_rng(seed).normal(size=(vocab, 4)).astype(np.float32), threshold)


@pytest.mark.parametrize("threshold", [0.6, 0.8])
def test_a_better_rule_accepts_more(threshold):
    for seed in range(5):
        exact, coarse, best = ceiling(*distributions(64, seed), overlapping(64, seed, threshold))
        assert exact <= coarse + 1e-9
        assert coarse <= best + 1e-9
        assert best <= 1 + 1e-9
    assert best > coarse + 0.01


def test_singleton_groups_leave_nothing_to_gain():
    p, q = distributions(64, 0)
    exact, coarse, best = ceiling(p, q, tabulate([np.array([t]) for t in range(64)], 64))
    assert exact == pytest.approx(np.minimum(p, q).sum())
    assert coarse == pytest.approx(exact)
    assert best == pytest.approx(exact)


def test_one_group_of_everything_accepts_everything():
    assert ceiling(*distributions(16, 0), tabulate([np.arange(16)], 16)).best == pytest.approx(1)


@pytest.mark.parametrize("seed", range(4))
def test_the_best_coupling_is_that_of_a_search(seed):
    """By the theorem of Hall and Strassen: the best mass is the least, over sets A of tokens, of p(not A) + Q_c(groups of A)."""
    p, q = distributions(8, seed)
    groups = overlapping(8, seed, 0.5)
    count, start, of = (np.asarray(array) for array in (groups.token_count, groups.token_start, groups.token_groups))
    near = [set(of[start[t] : start[t] + count[t]].tolist()) for t in range(8)]
    coarse = np.zeros(len(groups.sizes))
    for t, some in enumerate(near):
        coarse[list(some)] += q[t] / len(some)
    subsets = itertools.chain.from_iterable(itertools.combinations(range(8), size) for size in range(9))
    least = min(p.sum() - p[list(a)].sum() + coarse[list(set().union(*(near[t] for t in a)))].sum() for a in subsets)
    assert ceiling(p, q, groups).best == pytest.approx(least)


def test_tokens_without_probability_are_left_out():
    """Whatever the tokens are that neither distribution gives: the value is that of the others."""
    p, q = distributions(16, 1)
    groups = overlapping(16, 1, 0.6)
    p[8:], q[8:] = 0, 0
    p, q = p / p.sum(), q / q.sum()
    rest = [np.asarray(members)[:size] for members, size in zip(groups.members, groups.sizes, strict=True)]
    kept = tabulate([members[members < 8] for members in rest if (members < 8).any()], 8)
    assert ceiling(p, q, groups).best == pytest.approx(ceiling(p[:8], q[:8], kept).best)


def test_another_vocabulary_is_refused():
    with pytest.raises(ValueError, match="expected distributions over the 16 tokens of the groups, got"):
        ceiling(*distributions(8, 0), tabulate([np.arange(16)], 16))


def test_the_steps_of_a_synthesis_have_the_distributions_of_both_models(folder):
    """The target drafts for itself, so that p is q at the same position; rows that have stopped are left out."""
    target = pretrained.load(folder("target"), "float32")
    synthesizer = converted.synthesizer(target, load.load_drafter(folder("target"), target))
    found = list(optimal.steps(synthesizer, ["Yes.", "The rain has stopped."], Settings(max_codes=6), 5))
    assert 2 <= len(found) <= 10
    for p, q in found:
        np.testing.assert_allclose(p, q, atol=1e-4)
        assert p.sum() == pytest.approx(1, abs=1e-3)
    assert len({p.tobytes() for p, _ in found}) == len(found)
    assert optimal.mean_ceiling(found, synthesizer.groups(0.3, "target")) == pytest.approx((1, 1, 1), abs=1e-3)


def test_the_mean_ceiling_is_that_of_the_steps():
    pairs, groups = [distributions(16, seed) for seed in range(3)], overlapping(16, 0, 0.6)
    expected = np.mean([ceiling(p, q, groups) for p, q in pairs], axis=0)
    assert optimal.mean_ceiling(pairs, groups) == pytest.approx(tuple(expected))
