"""The counts of ``Info``, recomputed from where each token comes from."""

import fakes
import jax
import jax.numpy as jnp
import numpy as np

from jaxspec import generate, verify
from jaxspec.draft import model_draft
from jaxspec.state import ACCEPTED, BONUS, CORRECTION, PAD, STOP_TOKEN
from jaxspec.types import Verdict

V, K, N, B = 7, 3, 12, 24
LM = fakes.hash_model()
TARGET = fakes.table(0, V).at[:, 6].add(-1.0)
DRAFT = TARGET + fakes.table(1, V, scale=0.5)
PROMPT, LENGTH = fakes.prompts(seed=2, batch=B, width=5, vocab=V)
LIMIT = [12, 10, 7, 3, 2, 1] * 4


def run(rule):
    settings = {"max_new_tokens": N, "limit": LIMIT, "stop_ids": (6,)}
    return generate(jax.random.key(7), LM, TARGET, model_draft(LM, K), DRAFT, rule, PROMPT, LENGTH, **settings)


def rounds_of(origin):
    """How many tokens each round of a row emitted, and how many of them were accepted ones."""
    rounds, current = [], []
    for kind in origin[origin != PAD]:
        current.append(int(kind))
        if kind != ACCEPTED:
            rounds.append(current)
            current = []
    return [*rounds, current] if current else rounds


def test_counts_follow_from_the_origin_of_the_tokens():
    out = run(verify.exact())
    seen_short = 0
    for row in range(B):
        rounds = rounds_of(np.asarray(out.info.origin[row]))
        accepted = [sum(kind == ACCEPTED for kind in one) for one in rounds]
        for one, count in zip(rounds, accepted, strict=True):
            assert one[count:] in ([], [BONUS if count == K else CORRECTION])
        assert int(out.info.rounds[row]) == len(rounds)
        assert int(out.info.accepted[row]) == sum(accepted)
        assert out.info.accepted_per_position[row].tolist() == [sum(count > i for count in accepted) for i in range(K)]
        # Tokens drafted beyond the end of the row, be it its limit or where it stopped, do not count.
        ends = np.cumsum([len(one) for one in rounds])
        drafted = [min(K, LIMIT[row] - (end - len(one))) for one, end in zip(rounds, ends, strict=True)]
        drafted[-1] = min(K, len(rounds[-1]))
        assert int(out.info.drafted[row]) == sum(drafted)
        seen_short += sum(drafted) < K * len(rounds)
    assert seen_short > B // 4
    assert (out.info.stop_reason == STOP_TOKEN).any()


def test_exact_matches_are_the_verifiers_own_count():
    """Of K accepted tokens this rule says that the exact rule accepts all but one."""

    def rule(key, draft_tokens, draft_probs, target_probs):
        length = draft_tokens.shape[0]
        return Verdict(jnp.int32(length), jnp.argmax(target_probs[-1]).astype(jnp.int32), jnp.int32(length - 1))

    out = run(rule)
    full = np.array([sum(len(one) >= K for one in rounds_of(np.asarray(origin))) for origin in out.info.origin])
    assert full.any()
    # A round that was cut short of K - 1 accepted tokens has them all counted.
    np.testing.assert_array_equal(out.info.accepted - out.info.exact_matches, full)


def test_without_a_count_of_its_own_a_rule_matches_exactly():
    out = run(fakes.accept_all)
    np.testing.assert_array_equal(out.info.exact_matches, out.info.accepted)
    assert int(out.info.accepted.sum()) > 0


def test_exact_matches_of_groups_are_fewer_than_accepted_tokens():
    from jaxspec.groups import acoustic_similarity_groups

    groups = acoustic_similarity_groups(np.random.default_rng(0).normal(size=(V, 3)), 0.0, num_codes=6)
    out = run(verify.coarse_grained(groups))
    assert 0 < int(out.info.exact_matches.sum()) < int(out.info.accepted.sum())
