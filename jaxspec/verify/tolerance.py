"""Speech speculative decoding (SSD): acceptance with a constant bonus, approximate by a known amount."""

import numbers

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from jaxspec.keys import threefry_key
from jaxspec.types import Array, KeyLike, Verdict, Verify
from jaxspec.verify.exact import accepted, correct, count_accepted, count_exact, drafted_probs


def tolerance(beta: float) -> Verify:
    """The rule of SSD (arXiv 2505.15380, equations 5 and 6): a drafted x is accepted if r < min(1, q(x) / p(x)) + beta.

    Guarantee: approximate. With p the draft's distribution and q the target's, the distribution of the token emitted at a
    position is exactly D = sum over x of min([p(x) - q(x)]_+, beta p(x)) away from q in total variation, and the acceptance is
    1 - TV(p, q) + D: each unit of acceptance gained by beta costs one unit of total variation. ``beta`` 0 is ``exact()``, token
    for token. The correction is drawn from norm([q - p]_+), the bonus token from q.

    Args:
        beta: 0 to 1; the paper uses 0.4. An argument of the compiled program: another value does not recompile.

    Returns:
        A verifier, see ``jaxspec.types.Verify``; its key may be of any implementation, see ``jaxspec.keys.threefry_key``.

    Raises:
        ValueError: beta is not a number from 0 to 1.
    """
    return jax.tree_util.Partial(_verify, jnp.float32(check_beta(beta)))


def check_beta(beta: float) -> float:
    """The beta, checked: 0 to 1."""
    if not isinstance(beta, numbers.Real) or isinstance(beta, bool) or not 0 <= beta <= 1:
        raise ValueError(f"expected beta to be a number from 0 to 1, got {beta!r}: use 0 for the exact rule, 0.4 as in the paper")
    return float(beta)


def _verify(
    beta: Float[Array, ""],
    key: KeyLike,
    draft_tokens: Int[Array, " K"],
    draft_probs: Float[Array, "K V"],
    target_probs: Float[Array, "K+1 V"],
) -> Verdict:
    accept_key, token_key = jax.random.split(threefry_key(key))
    uniforms = jax.random.uniform(accept_key, draft_tokens.shape, jnp.float32)
    drafted, wanted = drafted_probs(draft_tokens, draft_probs, target_probs)
    # r < min(1, q/p) + beta, times p; the minimum can be left out since r is below 1.
    num_accepted = count_accepted(accepted(uniforms, drafted, wanted + beta * drafted))
    token = correct(token_key, num_accepted, draft_probs, target_probs)
    return Verdict(num_accepted, token, num_exact=count_exact(num_accepted, accepted(uniforms, drafted, wanted)))
