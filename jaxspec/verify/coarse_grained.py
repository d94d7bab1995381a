"""Principled coarse-graining (PCG): acceptance by acoustic group, exact in the law of the group."""

import jax
import jax.numpy as jnp

from jaxspec import sampling
from jaxspec.groups import Groups, pick_group
from jaxspec.types import Array, Verdict, Verify
from jaxspec.verify.exact import exact_among, laws_after, leading, of_drafted

_CANDIDATES = 4  # thinning candidates per trip; one trip is enough for most rejections (the paper saw at most 3 trials)
_TRIPS = 1024


def coarse_grained(groups: Groups) -> Verify:
    """The rule of PCG (arXiv 2511.13732, equations 4 to 10) with the weights w[k, t] = 1 / |S(t)| of equation 3.

    Promise: exact per group. A token's latent group is drawn from w[., t]; at each position the group of the emitted token has
    the law Q_c(k) = sum over t of q(t) w[k, t], as the target's own token would have. It says nothing about tokens within a
    group, nor about a relabelling of the emitted tokens. With groups of one token it has the law of ``exact()`` and accepts
    alike. The bonus token has the law q.

    A drafted x with its group K ~ w[., x] stands if u P_c(K) < Q_c(K), equations 6 and 7. The correction comes from the group
    residual [Q_c - P_c]_+ by thinning, equations 8 to 10: y ~ q and K ~ w[., y] are kept with probability
    [1 - P_c(K) / Q_c(K)]_+, some candidates at a time. A rejection has probability TV(P_c, Q_c) and takes 1 / TV(P_c, Q_c)
    candidates, so a position takes one on average, whatever the laws. After 4,096 candidates in vain the last one is emitted, of
    law q: the residual is then empty by rounding, or TV(P_c, Q_c) is so small that this moves the law of the group by less than
    1e-4.

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
    draft_mass = _mass(draft_probs, (place, members), weights)
    target_mass = _mass(target_probs, (place, members), weights)
    num_accepted = leading(uniforms * draft_mass < target_mass)

    drafted, wanted = of_drafted(draft_tokens, draft_probs, target_probs)
    token = _thin(token_key, groups, *laws_after(num_accepted, draft_probs, target_probs))
    return Verdict(num_accepted, token, num_exact=exact_among(num_accepted, uniforms * drafted < wanted))


def _members(groups: Groups, group: Array) -> tuple[Array, Array]:
    """The tokens of some groups [N] and their weights in them, each [N G]; what the padding weighs does not matter."""
    members = groups.members[group]
    return members, 1.0 / groups.token_count.at[members].get(mode="fill", fill_value=1)


def _mass(law: Array, index: Array | tuple[Array, Array], weights: Array) -> Array:
    """P_c of some groups [N]: equations 4 and 5. The padding gathers 0."""
    return (law.at[index].get(mode="fill", fill_value=0) * weights).sum(-1)


def _thin(key: Array, groups: Groups, draft: Array, target: Array) -> Array:
    """A token of the group residual. Where ``draft`` is 0, beyond the last drafted token, the first candidate is the bonus."""

    def undone(state: tuple[Array, Array, Array]) -> Array:
        trip, kept, _ = state
        return ~kept & (trip < _TRIPS)

    def draw(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        trip, _, _ = state
        uniforms = jax.random.uniform(jax.random.fold_in(key, trip), (_CANDIDATES, 4))
        tokens = sampling.invert(uniforms[:, :2], target)
        members, weights = _members(groups, pick_group(uniforms[:, 2], groups, tokens))
        draft_mass, target_mass = (_mass(law, members, weights) for law in (draft, target))
        keep = uniforms[:, 3] * target_mass < target_mass - draft_mass
        return trip + 1, keep.any(), tokens[jnp.where(keep.any(), jnp.argmax(keep), _CANDIDATES - 1)]

    _, _, token = jax.lax.while_loop(undone, draw, (jnp.int32(0), jnp.bool_(False), jnp.int32(0)))
    return token
