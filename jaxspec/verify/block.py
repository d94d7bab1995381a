"""Block verification: a proposal is accepted as a whole, which keeps more of it than token by token, under each of the rules.

One construction serves all three (Sun et al. 2024, arXiv 2403.10444, is its exact case). Take pairs z = (x, k) of a drafted
token and a latent group k ~ w[., x]. With P_c and Q_c the distributions of the group under draft and target, and x^i the first
i tokens,

    rho_0 = 1,   rho_i = min(rho_{i-1} Q_c(k_i | x^{i-1}) / P_c(k_i | x^{i-1}), 1),
    R_i = sum over k of [rho_i Q_c(k | x^i) - P_c(k | x^i)]_+,   h_i = R_i / (R_i + 1 - rho_i) for i < K,   h_K = rho_K,

the number of accepted tokens is the largest i with eta_i < h_i for independent uniforms eta_i (h_0 is 1). The group of the
correction is drawn from [rho_i Q_c - P_c]_+, its token t from q(t) w[k, t]; the bonus token from q. By backward induction
P(at least i accepted | z_1 .. z_i) = rho_i, so the next group has the distribution Q_c given the tokens and groups before it.
Exact verification is the case of singleton groups; the tolerance rule is exact verification against the distribution that it
emits.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from jaxspec import sampling
from jaxspec.groups import Groups, pick_group
from jaxspec.keys import threefry_key
from jaxspec.types import Array, KeyLike, Verdict, Verify
from jaxspec.verify.coarse_grained import check_vocabulary, group_mass, members_of, token_of
from jaxspec.verify.exact import accepted, count_exact, drafted_probs
from jaxspec.verify.tolerance import check_beta

_MAX_TRIALS = 4096


def block_exact() -> Verify:
    """Block verification with the exact rule (arXiv 2403.10444, algorithm 2).

    Guarantee: exact per token, as ``exact()``; never fewer tokens a round in expectation. Differs from it for K of 2 or more.

    Returns:
        A verifier, see ``jaxspec.types.Verify``.
    """
    return jax.tree_util.Partial(_verify_tokens, None)


def block_tolerance(beta: float) -> Verify:
    """Block verification with the tolerance rule of SSD (arXiv 2505.15380).

    Guarantee: every token has the distribution that ``tolerance(beta)`` emits in its place, which is off the target's by a known
    amount; never fewer tokens a round in expectation.

    Args:
        beta: 0 to 1.

    Returns:
        A verifier, see ``jaxspec.types.Verify``.

    Raises:
        ValueError: beta is not a number from 0 to 1.
    """
    return jax.tree_util.Partial(_verify_tokens, jnp.float32(check_beta(beta)))


def block_coarse_grained(groups: Groups) -> Verify:
    """Block verification with the rule of PCG (arXiv 2511.13732), weights w[k, t] = 1 / |S(t)|.

    Guarantee: exact per group, as ``coarse_grained(groups)``: the group of each token has the target's distribution given the
    tokens and groups before it; never fewer tokens a round in expectation.

    The sums over all groups are not computed: trials from i = K down to 0 decide between i and less. With C_i = sum over x of
    [rho_i q(x) - p(x)]_+, a trial goes on to i - 1 with probability (1 - rho_i) / (C_i + 1 - rho_i). Otherwise it draws x from
    that residual and k ~ w[., x], and keeps k with probability [rho_i Q_c(k) - P_c(k)]_+ / R_c(k), where R_c(k) is the residual's
    mass in k. A kept k is the group of the correction after i accepted tokens; else the trial is repeated.

    Args:
        groups: of the target's vocabulary; arguments of the compiled program, not constants in it.

    Returns:
        A verifier, see ``jaxspec.types.Verify``. It raises ValueError, when traced, for distributions over another vocabulary.
    """
    return jax.tree_util.Partial(_verify_groups, groups)


def _verify_tokens(
    beta: Float[Array, ""] | None,
    key: KeyLike,
    draft_tokens: Int[Array, " K"],
    draft_probs: Float[Array, "K V"],
    target_probs: Float[Array, "K+1 V"],
) -> Verdict:
    """The exact rule, against the target or, with ``beta``, against what the tolerance rule emits."""
    length = draft_tokens.shape[0]
    accept_key, token_key = jax.random.split(threefry_key(key))
    target = target_probs if beta is None else _emitted_by_tolerance(beta, draft_probs, target_probs)
    ratios = _rho(*drafted_probs(draft_tokens, draft_probs, target))
    residuals = jnp.maximum(ratios[:-1, None] * target[:-1] - draft_probs, 0.0)  # [K V], after 0 .. K-1 tokens
    mass = residuals.sum(-1)
    stop = jnp.append(_ratio(mass, mass + 1.0 - ratios[:-1]), ratios[-1])
    uniforms = jax.random.uniform(accept_key, (length + 1,), jnp.float32)
    position = jnp.arange(length + 1, dtype=jnp.int32)
    num_accepted = jnp.max(jnp.where(uniforms < stop, position, 0))

    residual = jnp.concatenate([residuals, target[-1:]])[num_accepted]
    token = sampling.sample(token_key, jnp.where((residual > 0).any(), residual, target[num_accepted]))
    exactly = accepted(uniforms[:length], *drafted_probs(draft_tokens, draft_probs, target_probs))
    num_exact = num_accepted if beta is None else count_exact(num_accepted, exactly)
    return Verdict(num_accepted, token, num_exact)


def _emitted_by_tolerance(
    beta: Float[Array, ""], draft_probs: Float[Array, "K V"], target_probs: Float[Array, "K+1 V"]
) -> Float[Array, "K+1 V"]:
    """The distributions that ``tolerance(beta)`` emits in place of the target's; the bonus token's is the target's own."""
    target = target_probs[:-1]
    kept = jnp.minimum(draft_probs, target + beta * draft_probs)
    residual = jnp.maximum(target - draft_probs, 0.0)
    corrected = _ratio(1.0 - kept.sum(-1), residual.sum(-1))[:, None] * residual
    return jnp.concatenate([kept + jnp.maximum(corrected, 0.0), target_probs[-1:]])


def _verify_groups(
    groups: Groups,
    key: KeyLike,
    draft_tokens: Int[Array, " K"],
    draft_probs: Float[Array, "K V"],
    target_probs: Float[Array, "K+1 V"],
) -> Verdict:
    length = draft_tokens.shape[0]
    check_vocabulary(groups, target_probs)
    accept_key, token_key = jax.random.split(threefry_key(key))
    group_key, trial_key, token_key = jax.random.split(token_key, 3)
    uniforms = jax.random.uniform(accept_key, (length + 1,), jnp.float32)
    latent = pick_group(jax.random.uniform(group_key, (length,), jnp.float32), groups, draft_tokens)
    position = jnp.arange(length, dtype=jnp.int32)[:, None]
    ratios = _rho(*(group_mass(groups, latent, probs, position) for probs in (draft_probs, target_probs)))

    # Beyond the last drafted token nothing was drafted: with p = 0 and rho = 1 the trial draws the bonus token's group from q.
    whole = uniforms[-1] < ratios[-1]
    draft = jnp.concatenate([draft_probs, jnp.zeros_like(target_probs[:1])])
    start = jnp.where(whole, length, length - 1 if length else 0).astype(jnp.int32)
    num_accepted, group = _search(trial_key, groups, start, ratios.at[-1].set(1.0), draft, target_probs)
    token = token_of(token_key, groups, group, target_probs[num_accepted])
    exactly = accepted(uniforms[:length], *drafted_probs(draft_tokens, draft_probs, target_probs))
    return Verdict(num_accepted, token, count_exact(num_accepted, exactly))


def _search(
    key: KeyLike,
    groups: Groups,
    start: Int[Array, ""],
    ratios: Float[Array, " T"],
    draft: Float[Array, "T V"],
    target: Float[Array, "T V"],
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """Runs trials from position ``start`` down to 0: the number of accepted tokens, and the group of the token that follows."""

    def is_running(state: tuple[Array, Array, Array, Array]) -> Array:
        trial, done, _, _ = state
        return ~done & (trial < _MAX_TRIALS)

    def run(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        trial, _, at, _ = state
        uniforms = jax.random.uniform(jax.random.fold_in(key, trial), (5,), jnp.float32)
        difference = ratios[at] * target[at] - draft[at]
        residual = jnp.maximum(difference, 0.0)
        mass, missing = residual.sum(), 1.0 - ratios[at]
        ends = (uniforms[0] * (mass + missing) < mass) | (at == 0)
        proposed = jnp.where(mass > 0, residual, target[at])  # the residual is empty by rounding only
        group = pick_group(uniforms[3], groups, sampling.invert(uniforms[1:3], proposed))
        members, weights = members_of(groups, group)
        parts = difference.at[members].get(mode="fill", fill_value=0) * weights
        kept = accepted(uniforms[4], jnp.maximum(parts, 0.0).sum(-1), parts.sum(-1)) | ~(mass > 0)
        return trial + 1, ends & kept, jnp.where(ends, at, at - 1), group

    _, _, at, group = jax.lax.while_loop(is_running, run, (jnp.int32(0), jnp.bool_(False), start, jnp.int32(0)))
    return at, group


def _rho(drafted: Float[Array, " K"], wanted: Float[Array, " K"]) -> Float[Array, " K+1"]:
    """rho_0 .. rho_K from p and q of the drafted tokens, or P_c and Q_c of their groups."""

    def step(rho: Array, pair: tuple[Array, Array]) -> tuple[Array, Array]:
        p, q = pair
        rho = jnp.where(rho * q >= p, 1.0, _ratio(rho * q, p))  # NaN stays NaN, and accepts nothing
        return rho, rho

    one = jnp.ones((), jnp.float32)
    return jnp.append(one, jax.lax.scan(step, one, (drafted, wanted))[1])


def _ratio(numerator: Array, denominator: Array) -> Array:
    """The quotient, and 0 where both are 0."""
    return numerator / jnp.where(denominator > 0, denominator, 1.0)
