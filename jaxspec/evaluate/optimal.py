"""The most that any verifier of one step could accept: the best coupling of a drafted token with a group, on the host.

p is the draft's distribution and q the target's, as in the PCG and SSD papers.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxspec import request as requests
from jaxspec import rounds, speculate
from jaxspec.groups import Groups
from jaxspec.state import RUNNING
from jaxspec.synthesis.contract import Settings, Synthesizer
from jaxspec.verify.exact import exact


class Ceiling(NamedTuple):
    """The acceptance of one step by the exact rule, by the coarse-grained rule, and the most of any with its guarantee."""

    exact: float
    coarse_grained: float
    best: float


def ceiling(draft_probs: np.ndarray, target_probs: np.ndarray, groups: Groups) -> Ceiling:
    """The acceptance of the exact and of the coarse-grained rule, and that of the best coupling.

    Any verifier of one drafted token x ~ p that emits x where it accepts, in a group k of x, such that k has the distribution Q_c
    of PCG (arXiv 2511.13732, equation 5), is a coupling of p and Q_c, and accepts with the mass that it puts on pairs with k in
    S(x). The largest mass is a linear programme: maximise the sum of m(x, k) over k in S(x), where the sum over k is at most p(x)
    and the sum over x at most Q_c(k). The coarse-grained rule draws k ~ w[., x] before it looks at p and q, which the best
    coupling does not: the difference is what a better rule could gain. What "in the group" promises is then weaker too, so report
    the fidelity within groups beside it.

    Tokens and groups without probability are left out, so truncated distributions make small programmes.

    Args:
        draft_probs: p, [V].
        target_probs: q, [V].
        groups: of the V tokens.

    Returns:
        1 - TV(p, q), 1 - TV(P_c, Q_c), and the best; each is at least the one before it.

    Raises:
        ImportError: scipy is missing.
        ValueError: the distributions are not over the vocabulary of the groups.

    >>> from jaxspec.groups import tabulate
    >>> pairs = tabulate([np.array([0, 1]), np.array([1, 2])], 3)
    >>> [round(value, 3) for value in ceiling(np.array([0.0, 1.0, 0.0]), np.array([0.5, 0.0, 0.5]), pairs)]
    [0.0, 1.0, 1.0]
    """
    p, q = (np.asarray(probs, np.float64) for probs in (draft_probs, target_probs))
    count = np.asarray(groups.token_count)
    if p.shape != count.shape or q.shape != count.shape:
        raise ValueError(
            f"expected distributions over the {len(count)} tokens of the groups, got {p.shape} and {q.shape}: "
            "make the groups from this model's embeddings"
        )
    token, group = np.repeat(np.arange(len(count)), count), np.asarray(groups.token_groups)
    coarse_p, coarse_q = (np.bincount(group, (probs / count)[token], len(groups.sizes)) for probs in (p, q))
    exact, coarse = float(np.minimum(p, q).sum()), float(np.minimum(coarse_p, coarse_q).sum())
    return Ceiling(exact, coarse, max(coarse, _most(p, coarse_q, token, group)))


def _most(p: np.ndarray, coarse_q: np.ndarray, token: np.ndarray, group: np.ndarray) -> float:
    """The largest mass of a coupling of p and Q_c on the pairs (token, group)."""
    try:
        from scipy.optimize import linprog
        from scipy.sparse import coo_array
    except ImportError as error:
        raise ImportError("expected scipy for the best coupling, got none: pip install 'jaxspec[eval]'") from error
    kept = (p[token] > 0) & (coarse_q[group] > 0)
    if not kept.any():
        return 0.0
    tokens, x = np.unique(token[kept], return_inverse=True)
    groups, k = np.unique(group[kept], return_inverse=True)
    pairs = len(x)
    rows, columns = np.concatenate([x, len(tokens) + k]), np.tile(np.arange(pairs), 2)
    limits = coo_array((np.ones(2 * pairs), (rows, columns)), (len(tokens) + len(groups), pairs)).tocsr()
    bounds = np.concatenate([p[tokens], coarse_q[groups]])
    found = linprog(-np.ones(pairs), A_ub=limits, b_ub=bounds, method="highs")
    if not found.success:
        raise RuntimeError(f"expected the linear programme to be solved, got {found.message!r}: report the distributions")
    return float(-found.fun)


def steps(
    synthesizer: Synthesizer, pieces: Sequence[str], settings: Settings, count: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """p and q of single steps as they are met in synthesis, each [V]: one code is drafted and verified by the exact rule.

    Args:
        synthesizer: with a draft.
        pieces: parts of texts, synthesized together.
        settings: of prompts and sampling.
        count: rounds, at most.

    Raises:
        ValueError: there is no draft.
    """
    if synthesizer.drafter is None:
        raise ValueError("expected a synthesizer with a draft, got one without: load it with one")
    draft, draft_params = synthesizer.drafter.make(1), synthesizer.drafter.params
    target, params, asked = synthesizer.target, synthesizer.target_params, synthesizer.requests(pieces, settings)
    request = requests.check(settings.key(), **asked._asdict())
    cells = asked.prompt.shape[1] + asked.max_new_tokens + 2
    state = speculate.init(target, params, draft, draft_params, request, cells)
    propose, score = (jax.jit(part, static_argnums=0) for part in (rounds.propose, rounds.score))
    verify = jax.jit(rounds.verify_and_commit)
    for _ in range(count):
        running = np.flatnonzero(np.asarray(state.stop_reason) == RUNNING)
        proposal, state = propose(draft, draft_params, state)
        probs, features, state = score(target, params, proposal, state)
        p, q = np.asarray(proposal.probs[:, 0]), np.asarray(probs[:, 0])
        yield from ((p[row], q[row]) for row in running)
        state = verify(exact(), state, proposal, probs, features)


def mean_ceiling(pairs: Sequence[tuple[np.ndarray, np.ndarray]], groups: Groups) -> Ceiling:
    """The means of ``ceiling`` over pairs of p and q."""
    return Ceiling(*(float(value) for value in np.mean([ceiling(p, q, groups) for p, q in pairs], axis=0)))
