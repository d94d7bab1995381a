"""Principled coarse-graining (PCG): acceptance by acoustic group, exact in the law of the group."""

import jax
import jax.numpy as jnp

from jaxspec import sampling
from jaxspec.groups import Groups, pick_group
from jaxspec.types import Array, Verdict, Verify
from jaxspec.verify.exact import count_accepted, count_exact, drafted_probs, next_probs

_CANDIDATES = 2  # thinning candidates per trip; one trip is enough for most rejections
_TRIPS = 2048


def coarse_grained(groups: Groups) -> Verify:
    """The rule of PCG (arXiv 2511.13732, equations 4 to 10) with the weights w[k, t] = 1 / |S(t)| of equation 3.

    Promise: exact per group. A token's latent group is drawn from w[., t]; at each position the group of the emitted token has
    the law Q_c(k) = sum over t of q(t) w[k, t], as the target's own token would have. It says nothing about tokens within a
    group, nor about a relabelling of the emitted tokens. With groups of one token it has the law of ``exact()`` and accepts
    alike. The bonus token has the law q.

    A drafted x with its group K ~ w[., x] stands if u P_c(K) < Q_c(K), equations 6 and 7. The correction has the law of
    equations 8 to 10: its group that of the residual [Q_c - P_c]_+, and in the group K the token t that of q(t) w[K, t]. The
    paper thins candidates from q, and needs 1 / TV(P_c, Q_c) of them for a rejection. Here they come from the residual of the
    tokens, r = [q - p]_+, whose R_c(K) is never below Q_c(K) - P_c(K): z ~ r and K ~ w[., z] are kept with probability
    [Q_c(K) - P_c(K)]_+ / R_c(K), which takes TV(p, q) / TV(P_c, Q_c) candidates, and the token is drawn from the group that is
    kept. After 4,096 in vain the last one's group is taken: the residual is then empty by rounding, or this moves the law of the
    group by less than 1e-4.

    Only the groups drawn are summed, at most G values each.

    Args:
        groups: of the same vocabulary as the laws; arguments of the compiled program, not constants in it.
    """
    return jax.tree_util.Partial(_verify, groups)


def _verify(groups: Groups, key: Array, draft_tokens: Array, draft_probs: Array, target_probs: Array) -> Verdict:
    length, vocab = draft_tokens.shape[0], target_probs.shape[-1]
    if vocab != groups.token_start.shape[0]:
        raise ValueError(f"the groups are of {groups.token_start.shape[0]} tokens, but the laws are of {vocab}")
    accept_key, token_key = jax.random.split(key)
    group_key, token_key = jax.random.split(token_key)
    uniforms = jax.random.uniform(accept_key, (length,))

    latent = pick_group(jax.random.uniform(group_key, (length,)), groups, draft_tokens)
    members, weights = _members(groups, latent)
    place = jnp.arange(length)[:, None]
    draft_mass, target_mass = ((_at(law, (place, members)) * weights).sum(-1) for law in (draft_probs, target_probs))
    num_accepted = count_accepted(uniforms * draft_mass < target_mass)

    drafted, wanted = drafted_probs(draft_tokens, draft_probs, target_probs)
    token = _of_group_residual(token_key, groups, *next_probs(num_accepted, draft_probs, target_probs))
    return Verdict(num_accepted, token, num_exact=count_exact(num_accepted, uniforms * drafted < wanted))


def _members(groups: Groups, group: Array) -> tuple[Array, Array]:
    """The tokens of some groups [N] and their weights in them, each [N G]; what the padding weighs does not matter."""
    members = groups.members[group]
    return members, 1.0 / groups.token_count.at[members].get(mode="fill", fill_value=1)


def _at(law: Array, index: Array | tuple[Array, Array]) -> Array:
    """What a law has at some tokens, and 0 for the padding."""
    return law.at[index].get(mode="fill", fill_value=0)


def _of_group_residual(key: Array, groups: Groups, draft: Array, target: Array) -> Array:
    """The correction: int32 []. Where ``draft`` is 0, beyond the last drafted token, the first candidate's group is kept."""
    thin_key, token_key = jax.random.split(key)
    difference = target - draft
    residual = jnp.maximum(difference, 0.0)
    proposed = jnp.where((residual > 0).any(), residual, target)

    def undone(state: tuple[Array, Array, Array]) -> Array:
        trip, kept, _ = state
        return ~kept & (trip < _TRIPS)

    def draw(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        trip, _, _ = state
        uniforms = jax.random.uniform(jax.random.fold_in(thin_key, trip), (_CANDIDATES, 4))
        group = pick_group(uniforms[:, 2], groups, sampling.invert(uniforms[:, :2], proposed))
        members, weights = _members(groups, group)
        parts = _at(difference, members) * weights
        keep = uniforms[:, 3] * jnp.maximum(parts, 0.0).sum(-1) < parts.sum(-1)
        return trip + 1, keep.any(), group[jnp.where(keep.any(), jnp.argmax(keep), _CANDIDATES - 1)]

    _, _, group = jax.lax.while_loop(undone, draw, (jnp.int32(0), jnp.bool_(False), jnp.int32(0)))
    members, weights = _members(groups, group)
    return members[sampling.sample(token_key, _at(target, members) * weights)]
