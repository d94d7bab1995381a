"""Standard speculative sampling, exact per token, and the parts that every verifier shares.

p is the draft's distribution and q the target's, as in the PCG and SSD papers. Every verifier splits its key in the same way and
accepts with the same uniforms for the same key: so the limits of the others are tested against this one draw by draw, and
``num_exact`` counts what this one would have accepted.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from jaxspec import sampling
from jaxspec.keys import threefry_key
from jaxspec.types import Array, KeyLike, Verdict, Verify


def exact() -> Verify:
    """The rule of Leviathan et al. 2022 (arXiv 2211.17192, algorithm 1) and Chen et al. 2023 (arXiv 2302.01318, algorithm 2).

    Guarantee: exact per token. For any draft, each emitted token has the target's distribution given the tokens before it.

    A drafted x is accepted with probability min(1, q(x) / p(x)). At the first rejection the correction is drawn from
    norm([q - p]_+), and after K accepted tokens a bonus token from q. If that residual is empty, which only rounding can cause at
    a rejection, the correction is drawn from q. (Leviathan et al. write p for the target and q for the draft.)

    Returns:
        A verifier, see ``jaxspec.types.Verify``; its key may be of any implementation, see ``jaxspec.keys.threefry_key``.

    >>> same = jnp.array([[0.25, 0.75]])
    >>> verdict = exact()(jax.random.key(0), jnp.array([1]), same, jnp.array([[0.25, 0.75], [1.0, 0.0]]))
    >>> verdict.num_accepted.item(), verdict.token.item()
    (1, 0)
    """
    return jax.tree_util.Partial(_verify)


def _verify(
    key: KeyLike, draft_tokens: Int[Array, " K"], draft_probs: Float[Array, "K V"], target_probs: Float[Array, "K+1 V"]
) -> Verdict:
    accept_key, token_key = jax.random.split(threefry_key(key))
    uniforms = jax.random.uniform(accept_key, draft_tokens.shape, jnp.float32)
    num_accepted = count_accepted(accepted(uniforms, *drafted_probs(draft_tokens, draft_probs, target_probs)))
    token = correct(token_key, num_accepted, draft_probs, target_probs)
    return Verdict(num_accepted, token, num_exact=num_accepted)


def drafted_probs(
    draft_tokens: Int[Array, " K"], draft_probs: Float[Array, "K V"], target_probs: Float[Array, "K+1 V"]
) -> tuple[Float[Array, " K"], Float[Array, " K"]]:
    """p(x) and q(x) of the drafted tokens.

    Args:
        draft_tokens: int32 [K].
        draft_probs: p, float32 [K V].
        target_probs: q, float32 [K+1 V].

    Returns:
        Two float32 [K].
    """
    position = jnp.arange(draft_tokens.shape[0], dtype=jnp.int32)
    return draft_probs[position, draft_tokens], target_probs[position, draft_tokens]


def accepted(uniforms: Float[Array, "*K"], drafted: Float[Array, "*K"], wanted: Float[Array, "*K"]) -> Bool[Array, "*K"]:
    """Whether u < q(x) / p(x), for each token by itself; written without the division, so p(x) = 0 gives no NaN.

    A token of probability 0 under the target is never accepted, not even at u = 0.

    Args:
        uniforms: u, float32 [K] in [0, 1).
        drafted: p(x), float32 [K].
        wanted: q(x), float32 [K].

    Returns:
        bool [K].

    >>> accepted(jnp.array([0.0, 0.4, 0.6]), jnp.array([0.5, 0.5, 0.5]), jnp.array([0.0, 0.25, 0.25])).tolist()
    [False, True, False]
    """
    return uniforms * drafted < wanted


def count_accepted(accepted: Bool[Array, " K"]) -> Int[Array, ""]:
    """The number of tokens before the first rejection: int32 [] from bool [K].

    >>> count_accepted(jnp.array([True, True, False, True])).item()
    2
    """
    return jnp.cumprod(accepted.astype(jnp.int32)).sum(dtype=jnp.int32)


def count_exact(num_accepted: Int[Array, ""], accepted: Bool[Array, " K"]) -> Int[Array, ""]:
    """The number of accepted tokens that the exact rule accepts too: int32 [] from its decisions ``accepted``, bool [K].

    >>> count_exact(jnp.int32(2), jnp.array([False, True, True])).item()
    1
    """
    return (accepted & (jnp.arange(accepted.size, dtype=jnp.int32) < num_accepted)).sum(dtype=jnp.int32)


def next_probs(
    num_accepted: Int[Array, ""], draft_probs: Float[Array, "K V"], target_probs: Float[Array, "K+1 V"]
) -> tuple[Float[Array, " V"], Float[Array, " V"]]:
    """p and q at the position after the accepted tokens.

    Args:
        num_accepted: int32 [], 0 .. K.
        draft_probs: p, float32 [K V].
        target_probs: q, float32 [K+1 V].

    Returns:
        Two float32 [V]; p is 0 everywhere after K accepted tokens, where nothing was drafted.
    """
    length = draft_probs.shape[0]
    target = target_probs[num_accepted]
    if length == 0:
        return jnp.zeros_like(target), target
    return jnp.where(num_accepted < length, draft_probs[jnp.minimum(num_accepted, length - 1)], 0.0), target


def correct(
    key: KeyLike, num_accepted: Int[Array, ""], draft_probs: Float[Array, "K V"], target_probs: Float[Array, "K+1 V"]
) -> Int[Array, ""]:
    """The correction, drawn from norm([q - p]_+), or from q if that is empty; after K accepted tokens the bonus token, from q.

    Args:
        key: consumed.
        num_accepted: int32 [], 0 .. K.
        draft_probs: p, float32 [K V].
        target_probs: q, float32 [K+1 V].

    Returns:
        int32 [].
    """
    draft, target = next_probs(num_accepted, draft_probs, target_probs)
    residual = jnp.maximum(target - draft, 0.0)
    return sampling.sample(key, jnp.where((residual > 0).any(), residual, target))
