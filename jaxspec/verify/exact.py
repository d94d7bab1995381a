"""Standard speculative sampling: exact per token.

Every rule splits its key alike, and accepts with the same uniforms given the same key: so the limits of the others can be held
against this one draw by draw, and ``num_exact`` says what this one would have accepted.
"""

import jax
import jax.numpy as jnp

from jaxspec import sampling
from jaxspec.types import Array, Verdict, Verify


def exact() -> Verify:
    """The rule of Leviathan et al. 2022 (arXiv 2211.17192, algorithm 1) and Chen et al. 2023 (arXiv 2302.01318, algorithm 2).

    Promise: exact per token. Whatever the draft, each emitted token has the target's law given the tokens before it.

    With p the draft and q the target, a drafted x stands with probability min(1, q(x) / p(x)); at the first that falls the
    correction is drawn from norm([q - p]_+), and after K accepted ones a bonus token from q. If that residual is empty, which
    rounding alone can cause at a rejection, the correction is drawn from q.
    """
    return jax.tree_util.Partial(_verify)


def _verify(key: Array, draft_tokens: Array, draft_probs: Array, target_probs: Array) -> Verdict:
    accept_key, token_key = jax.random.split(key)
    uniforms = jax.random.uniform(accept_key, draft_tokens.shape)
    drafted, wanted = drafted_probs(draft_tokens, draft_probs, target_probs)
    num_accepted = count_accepted(uniforms * drafted < wanted)
    token = correct(token_key, num_accepted, draft_probs, target_probs)
    return Verdict(num_accepted, token, num_exact=num_accepted)


def drafted_probs(draft_tokens: Array, draft_probs: Array, target_probs: Array) -> tuple[Array, Array]:
    """p(x) and q(x) of the K drafted tokens, each [K]."""
    place = jnp.arange(draft_tokens.shape[0])
    return draft_probs[place, draft_tokens], target_probs[place, draft_tokens]


def count_accepted(accepted: Array) -> Array:
    """How many stand before the first that falls: int32 [] from bool [K].

    >>> leading(jnp.array([True, True, False, True])).item()
    2
    """
    return jnp.cumprod(accepted.astype(jnp.int32)).sum(dtype=jnp.int32)


def count_exact(num_accepted: Array, accepted: Array) -> Array:
    """How many of the accepted tokens the exact rule takes too: int32 [] from its verdicts ``accepted``, bool [K]."""
    return (accepted & (jnp.arange(accepted.size) < num_accepted)).sum(dtype=jnp.int32)


def next_probs(num_accepted: Array, draft_probs: Array, target_probs: Array) -> tuple[Array, Array]:
    """p and q [V] at the position after the accepted tokens; p is 0 everywhere after K of them, where nothing was drafted."""
    length = draft_probs.shape[0]
    target = target_probs[num_accepted]
    if length == 0:
        return jnp.zeros_like(target), target
    return jnp.where(num_accepted < length, draft_probs[jnp.minimum(num_accepted, length - 1)], 0.0), target


def correct(key: Array, num_accepted: Array, draft_probs: Array, target_probs: Array) -> Array:
    """The correction, drawn from norm([q - p]_+), or the bonus token, drawn from q: int32 []. The key is consumed."""
    draft, target = next_probs(num_accepted, draft_probs, target_probs)
    residual = jnp.maximum(target - draft, 0.0)
    return sampling.sample(key, jnp.where((residual > 0).any(), residual, target))
