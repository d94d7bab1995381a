"""Principled coarse-graining (PCG): acceptance by acoustic group, exact in the distribution of the group."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from jaxspec import sampling
from jaxspec.groups import Groups, pick_group
from jaxspec.keys import threefry_key
from jaxspec.types import Array, KeyLike, Verdict, Verify
from jaxspec.verify.exact import accepted, count_accepted, count_exact, drafted_probs, next_probs

_CANDIDATES = 2  # thinning candidates per iteration; one iteration is enough for most rejections
_MAX_ITERATIONS = 2048


def coarse_grained(groups: Groups) -> Verify:
    """The rule of PCG (arXiv 2511.13732, equations 4 to 10) with the weights w[k, t] = 1 / |S(t)| of equation 3.

    Guarantee: exact per group. With p the draft's distribution and q the target's, a token's latent group is drawn from w[., t];
    at each position the group of the emitted token has the distribution Q_c(k) = sum over t of q(t) w[k, t], the same as for a
    token of the target. Nothing is guaranteed about tokens within a group, nor about a relabelling of the emitted tokens. With
    singleton groups it accepts as ``exact()`` does and has the same distribution. The bonus token is drawn from q.

    A drafted x with its group K ~ w[., x] is accepted if u P_c(K) < Q_c(K), equations 6 and 7. The correction has the
    distribution of equations 8 to 10: its group that of the residual [Q_c - P_c]_+, and in the group K the token t that of
    q(t) w[K, t]. The paper thins candidates from q, and needs 1 / TV(P_c, Q_c) of them for a rejection. Here they come from the
    residual of the tokens, r = [q - p]_+, whose R_c(K) is never below Q_c(K) - P_c(K): z ~ r and K ~ w[., z] are kept with
    probability [Q_c(K) - P_c(K)]_+ / R_c(K), which takes TV(p, q) / TV(P_c, Q_c) candidates, and the token is drawn from the
    group that is kept. After 4,096 rejected candidates the last one's group is taken: the residual is then empty by rounding, or
    this changes the distribution of the group by less than 1e-4.

    Only the groups drawn are summed, at most G values each.

    Args:
        groups: of the target's vocabulary; arguments of the compiled program, not constants in it.

    Returns:
        A verifier, see ``jaxspec.types.Verify``; its key may be of any implementation, see ``jaxspec.keys.threefry_key``. It
        raises ValueError, when traced, for distributions over another vocabulary.
    """
    return jax.tree_util.Partial(_verify, groups)


def _verify(
    groups: Groups,
    key: KeyLike,
    draft_tokens: Int[Array, " K"],
    draft_probs: Float[Array, "K V"],
    target_probs: Float[Array, "K+1 V"],
) -> Verdict:
    length = draft_tokens.shape[0]
    check_vocabulary(groups, target_probs)
    accept_key, token_key = jax.random.split(threefry_key(key))
    group_key, token_key = jax.random.split(token_key)
    uniforms = jax.random.uniform(accept_key, (length,), jnp.float32)

    latent = pick_group(jax.random.uniform(group_key, (length,), jnp.float32), groups, draft_tokens)
    position = jnp.arange(length, dtype=jnp.int32)[:, None]
    draft_mass, target_mass = (group_mass(groups, latent, probs, position) for probs in (draft_probs, target_probs))
    num_accepted = count_accepted(accepted(uniforms, draft_mass, target_mass))

    exactly = accepted(uniforms, *drafted_probs(draft_tokens, draft_probs, target_probs))
    token = _correct(token_key, groups, *next_probs(num_accepted, draft_probs, target_probs))
    return Verdict(num_accepted, token, num_exact=count_exact(num_accepted, exactly))


def check_vocabulary(groups: Groups, target_probs: Float[Array, "T V"]) -> None:
    """Refuses distributions over another vocabulary than that of the groups."""
    if target_probs.shape[-1] != groups.token_start.shape[0]:
        raise ValueError(
            f"expected distributions over the {groups.token_start.shape[0]} tokens of the groups, got {target_probs.shape[-1]}: "
            "make the groups from this model's embeddings"
        )


def members_of(groups: Groups, group: Int[Array, "*N"]) -> tuple[Int[Array, "*N G"], Float[Array, "*N G"]]:
    """The tokens of some groups [N] and their weights in them, each [N G]; the weights of the padding have no effect."""
    members = groups.members[group]
    return members, 1.0 / groups.token_count.at[members].get(mode="fill", fill_value=1).astype(jnp.float32)


def group_mass(
    groups: Groups, group: Int[Array, " K"], probs: Float[Array, "T V"], position: Int[Array, "K 1"]
) -> Float[Array, " K"]:
    """The probability of each group under the distribution at its position: sum over its tokens t of probs[t] w[k, t]."""
    members, weights = members_of(groups, group)
    return (_at(probs, (position, members)) * weights).sum(-1)


def token_of(key: KeyLike, groups: Groups, group: Int[Array, ""], target: Float[Array, " V"]) -> Int[Array, ""]:
    """A token of a group, drawn from q(t) w[k, t]."""
    members, weights = members_of(groups, group)
    return members[sampling.sample(key, _at(target, members) * weights)]


def _at(probs: Array, index: Array | tuple[Array, Array]) -> Array:
    """The values at some tokens, and 0 for the padding."""
    return probs.at[index].get(mode="fill", fill_value=0)


def _correct(key: KeyLike, groups: Groups, draft: Float[Array, " V"], target: Float[Array, " V"]) -> Int[Array, ""]:
    """The correction: int32 []. Where ``draft`` is 0, beyond the last drafted token, the first candidate's group is kept."""
    thin_key, token_key = jax.random.split(key)
    difference = target - draft
    residual = jnp.maximum(difference, 0.0)
    proposed = jnp.where((residual > 0).any(), residual, target)

    def is_running(state: tuple[Array, Array, Array]) -> Array:
        iteration, kept, _ = state
        return ~kept & (iteration < _MAX_ITERATIONS)

    def draw(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        iteration, _, _ = state
        uniforms = jax.random.uniform(jax.random.fold_in(thin_key, iteration), (_CANDIDATES, 4), jnp.float32)
        group = pick_group(uniforms[:, 2], groups, sampling.invert(uniforms[:, :2], proposed))
        members, weights = members_of(groups, group)
        parts = _at(difference, members) * weights
        keep = accepted(uniforms[:, 3], jnp.maximum(parts, 0.0).sum(-1), parts.sum(-1))
        return iteration + 1, keep.any(), group[jnp.where(keep.any(), jnp.argmax(keep), _CANDIDATES - 1)]

    _, _, group = jax.lax.while_loop(is_running, draw, (jnp.int32(0), jnp.bool_(False), jnp.int32(0)))
    return token_of(token_key, groups, group, target)
